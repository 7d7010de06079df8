#!/usr/bin/env bash
# The main job on real photos: pre-train `small` on mosaics of Caltech-101 photos and on coco740, once as CLIP and once
# as CLOC (same data, steps and seed, one core each, at the same time), then score both on photos never trained on.
# An hour on two AVX2 cores.  Run again to resume.  Extra arguments go to both trainings.
#   OPENCLOC_DATA  folder with caltech101/ and coco740/   OUT  folder of the runs
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/photos}
opencloc=.venv/bin/opencloc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

pretrain() {
    $opencloc train small --out "$out/$1" --data.weights 0.85 0.15 \
        --data.train "mosaic:$data/caltech101?grid=2-3&split=train&augment=true" "coco:$data/coco740?split=train" "${@:2}"
}
score() {
    $opencloc eval --data "$2" --num-images "$3" --out "$out/$1" --title "Photos: $1" --model \
        "clip_crop=$out/clip/model@crop" "clip_roi=$out/clip/model@roi" "cloc=$out/cloc/model"
}

pretrain clip --loss.region-weight 0 "$@" &
trap 'kill -INT $(jobs -p) 2>/dev/null; wait' INT TERM
pretrain cloc "$@"
wait %1
trap - INT TERM
score mosaics "mosaic:$data/caltech101?grid=2-3&split=test&seed=1" 500
score coco740 "coco:$data/coco740?split=test" 1000
facts recipes/photos.sh "$@" >"$out/run.txt"

#!/usr/bin/env bash
# The main job on real photos: pre-train `small` on mosaics of Caltech-101 photos, on coco740 and on flickr8k (captions and
# phrases by people), once as CLIP and once as CLOC (same data, steps and seed, one core each, at the same time), then
# score both on photos never trained on.  An hour on two AVX-512 cores.  Run again to resume.  Extra arguments go to both
# trainings.
#   OPENCLOC_DATA  folder with caltech101/, coco740/ and flickr8k/   OUT  folder of the runs
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/photos}
opencloc=.venv/bin/opencloc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

pretrain() {
    $opencloc train small --out "$out/$1" --steps 4500 --data.num-workers 0 --data.weights 0.3 0.1 0.6 --data.train \
        "mosaic:$data/caltech101?grid=2-3&split=train&augment=true" "coco:$data/coco740?split=train" \
        "shards:$data/flickr8k/train" "${@:2}"
}
score() {
    $opencloc eval --data "$2" --num-images "$3" --out "$out/$1" --title "Photos: $1" --model "clip_crop=$out/clip/model@crop" \
        "clip_roi=$out/clip/model@roi" "clip_maskclip=$out/clip/model@maskclip" "clip_pool=$out/clip/model@pool" \
        "cloc=$out/cloc/model" "${@:4}"
}

pretrain clip --loss.region-weight 0 "$@" &
trap 'kill -INT $(jobs -p) 2>/dev/null; wait' INT TERM
pretrain cloc "$@"
wait %1
trap - INT TERM
score mosaics "mosaic:$data/caltech101?grid=2-3&split=test&seed=1" 500
score coco740 "coco:$data/coco740?split=test" 1000
score flickr8k "shards:$data/flickr8k/val" 1000 --num-pictures 0 # its photos are not to be shown
# README's picture: the first three CC BY photos of coco740's test split that have three to six boxes of three classes or more
.venv/bin/python examples/name_and_find.py "$out/cloc/model" "coco:$data/coco740?split=test" "$out/picture.jpg" 0 5 7
facts recipes/photos.sh "$@" >"$out/run.txt"

#!/usr/bin/env bash
# Scores encoders, [NAME=]FOLDER[@WAY] ..., on real photos with public questions about them: boxes and captions of
# coco740's test photos; LVIS, FG-OVD and SugarCrepe cut down to coco740.  Each encoder sees the same photos and boxes.
#   recipes/eval_photos.sh cloc=runs/photos/cloc/model clip_pool=runs/photos/clip/model@pool
#   OPENCLOC_DATA  folder with coco740/ and benchmarks/   OUT  folder of the results
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: recipes/eval_photos.sh [NAME=]FOLDER[@WAY] ..." >&2; exit 2; }
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/eval}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

photos=runs/coco740 # the photos under the names that the sets give them
mkdir -p "$photos"
ln -sfn "$(realpath "$data/coco740/images")" "$photos/val2017"
for photo in "$data"/coco740/images/*.jpg; do ln -sf "$(realpath "$photo")" "$photos/COCO_val2014_${photo##*/}"; done

coco=$data/coco740 sets=$data/benchmarks
.venv/bin/opencloc eval coco-recognition coco-retrieval lvis-recognition fg-ovd sugarcrepe grounding --data \
    "coco-recognition=$coco?annotations=$coco/annotations/instances_test.json&images=$coco/images" \
    "coco-retrieval=$coco?annotations=$coco/annotations/captions_test.json&images=$coco/images" \
    "lvis-recognition=$sets/lvis?annotations=$sets/lvis/lvis_val_100.json&images=$photos" \
    "fg-ovd=$sets/fg_ovd?split=3_attributes&images=$photos" \
    "fg-ovd=$sets/fg_ovd?split=pattern&images=$photos" \
    "fg-ovd=$sets/fg_ovd?split=transparency&images=$photos" \
    "sugarcrepe=$sets/sugarcrepe?images=$photos/val2017" \
    "grounding=coco:$coco?split=test" \
    --out "$out" --title "Encoders on real photos" --model "$@"
facts recipes/eval_photos.sh "$@" >"$out/run.txt"

#!/usr/bin/env bash
# The picture of README: `small` on mosaics, coco740 and flickr8k (captions and phrases by people), then its names and boxes
# on the first three CC BY photos of coco740's test split that have three to six boxes of at least three classes.  A
# quarter of an hour on one AVX-512 core.  Run again to resume.  Extra arguments go to the training.
#   OPENCLOC_DATA  folder with caltech101/, coco740/ and flickr8k/   OUT  folder of the run
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
out=${OUT:-runs/picture}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

.venv/bin/opencloc train small --steps 1500 --out "$out" --data.weights 0.3 0.2 0.5 --data.num-workers 0 --data.train \
    "mosaic:$data/caltech101?grid=2-3&split=train&augment=true" "coco:$data/coco740?split=train" \
    "shards:$data/flickr8k/train" "$@"
.venv/bin/opencloc eval --model "cloc=$out/model" --data "coco:$data/coco740?split=test" --out "$out"
.venv/bin/python examples/name_and_find.py "$out/model" "coco:$data/coco740?split=test" "$out/picture.jpg" 0 5 7
facts recipes/picture.sh "$@" >"$out/run.txt"

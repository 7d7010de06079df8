#!/usr/bin/env bash
# What the photo library finds and what it costs: makes results/search.  MODEL: a CLOC trained on scenes (make
# quickstart).  PHOTO_MODEL: one trained on photos (recipes/photos.sh); without it the photos of OPENCLOC_DATA are left out.
# Extra arguments go to benchmarks.search, e.g. --sizes 10000.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
model=${MODEL:-runs/quickstart/cloc/model}
out=${OUT:-runs/search}
data=${OPENCLOC_DATA:-../shared/data}
python=.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

$python -m benchmarks.search_quality --model "$model" --data "scenes=scenes:rich?num_things=120&seed=1" --out "$out"
if [ -n "${PHOTO_MODEL:-}" ]; then
    $python -m benchmarks.search_quality --model "$PHOTO_MODEL" --out "$out/photos" \
        --data "coco740 test=coco:$data/coco740?split=test" "flickr8k val=shards:$data/flickr8k/val"
fi
$python -m benchmarks.search_kills --model "$model" --out "$out"
$python -m benchmarks.search --model "$model" --out "$out" "$@"
facts recipes/search.sh "$@" >"$out/run.txt"
echo "wrote $out/quality.md, $out/costs.md and $out/kills.json"

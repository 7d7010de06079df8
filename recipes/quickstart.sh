#!/usr/bin/env bash
# Pre-train CLIP and CLOC (`tiny`: same scenes, same steps, same seed; one core each, at the same time), score both on
# scenes never trained on, write runs/quickstart/metrics.json and report.html.  Run again to resume.
# Extra arguments go to both trainings, e.g. --steps 200.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
out=${OUT:-runs/quickstart}
opencloc=.venv/bin/opencloc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

$opencloc train tiny --out "$out/clip" --loss.region-weight 0 "$@" 2> >(sed 's/^/CLIP  /' >&2) &
trap 'kill -INT $(jobs -p) 2>/dev/null; wait' INT TERM
$opencloc train tiny --out "$out/cloc" "$@" 2> >(sed 's/^/CLOC  /' >&2)
wait %1
trap - INT TERM
$opencloc eval --data "scenes:rich?num_things=120&seed=1" --num-images 256 --out "$out" --title "opencloc quickstart" \
    --model "cloc=$out/cloc/model" "clip_crop=$out/clip/model@crop" "clip_roi=$out/clip/model@roi" \
    "clip_maskclip=$out/clip/model@maskclip" "clip_pool=$out/clip/model@pool"
facts recipes/quickstart.sh "$@" >"$out/run.txt"
echo "wrote $out/metrics.json and $out/report.html"

#!/usr/bin/env bash
# VESL on real photos: coco740's human captions -> phrases -> YOLOX -> sidecars, for the train and the test split, by
# noun phrases and by n-grams; then figures, a contact sheet, and precision and recall against the human boxes.  And
# flickr8k's validation photos, against the boxes and phrases of people.
# A few minutes on two cores.  Run again to resume.  Extra arguments go to every `opencloc label`.
#   OPENCLOC_DATA   folder with coco740/ and flickr8k/
#   OPENCLOC_YOLOX  YOLOX as ONNX
#   OUT             folder of the labels      RESULTS  folder of the figures
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
data=${OPENCLOC_DATA:-../shared/data}
yolox=${OPENCLOC_YOLOX:-../shared/models/yolox_nano.onnx}
out=${OUT:-runs/vesl}
results=${RESULTS:-results/vesl}
opencloc=.venv/bin/opencloc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

label() { # FOLDER SOURCE [option ...]
    $opencloc label --data "$2" --out "$out/$1" --shard-size 140 --workers 2 \
        --detector "examples/yolox_detector.py:make_detector?model=$yolox" "${@:3}"
}
for split in train test; do
    label one-caption "coco:$data/coco740?split=$split" --captions.existing-text caption "$@"
    label nouns "coco:$data/coco740?split=$split" --captions.existing-text all-captions "$@"
    label n-grams "coco:$data/coco740?split=$split" --captions.existing-text all-captions --phrases n-grams "$@"
done
label flickr8k "shards:$data/flickr8k/val" --captions.existing-text all-captions "$@"

labelled="coco:$data/coco740?split=train"
mkdir -p "$results"
for name in nouns n-grams; do
    $opencloc data stats --data "$labelled" --sidecar "$out/$name/vesl" --out "$results/stats-$name"
    $opencloc data view --data "$labelled" --sidecar "$out/$name/vesl" --out "$out/$name.html" --num-images 60
    cp "$out/$name/vesl_manifest.json" "$results/manifest-$name.json"
done
.venv/bin/python -m benchmarks.label_quality --data "$labelled" --out "$results" \
    --labels one-caption="$out/one-caption/vesl" nouns="$out/nouns/vesl" n-grams="$out/n-grams/vesl"
.venv/bin/python -m benchmarks.label_quality --data "shards:$data/flickr8k/val" --out "$results/flickr8k" \
    --labels nouns="$out/flickr8k/vesl"
facts recipes/vesl.sh "$@" >"$results/run.txt"
echo "wrote $results; look at $out/nouns.html"

#!/usr/bin/env bash
# VESL on real photos: coco740's human captions -> phrases -> YOLOX -> sidecars, for the train and the test split, by
# noun phrases and by n-grams; then figures, a contact sheet, and precision and recall against the human boxes.
# A few minutes on two cores.  Run again to resume.  Extra arguments go to every `opencloc label`.
#   OPENCLOC_DATA   folder with coco740/
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

label() { # FOLDER SPLIT [option ...]
    $opencloc label --data "coco:$data/coco740?split=$2" --out "$out/$1" --shard-size 140 --workers 2 \
        --detector "examples/yolox_detector.py:make_detector?model=$yolox" "${@:3}"
}
for split in train test; do
    label one-caption $split --captions.existing-text caption "$@"
    label nouns $split --captions.existing-text all-captions "$@"
    label n-grams $split --captions.existing-text all-captions --phrases n-grams "$@"
done

labelled="coco:$data/coco740?split=train"
mkdir -p "$results"
for name in nouns n-grams; do
    $opencloc data stats --data "$labelled" --sidecar "$out/$name/vesl" --out "$results/stats-$name"
    $opencloc data view --data "$labelled" --sidecar "$out/$name/vesl" --out "$out/$name.html" --num-images 60
    cp "$out/$name/vesl_manifest.json" "$results/manifest-$name.json"
done
.venv/bin/python -m benchmarks.label_quality --data "$labelled" --out "$results" \
    --labels one-caption="$out/one-caption/vesl" nouns="$out/nouns/vesl" n-grams="$out/n-grams/vesl"
facts recipes/vesl.sh "$@" >"$results/run.txt"
echo "wrote $results; look at $out/nouns.html"

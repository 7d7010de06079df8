#!/usr/bin/env bash
# The study: what each part of CLOC contributes, on generated scenes, five seeds, two runs at a time.  Run again to go on;
# Ctrl-C loses at most the steps since a checkpoint.
#   OUT  folder of the runs   RESULTS  folder of tables and plots     Extra arguments go to benchmarks/study.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
out=${OUT:-runs/study}
results=${RESULTS:-results/study}
.venv/bin/python -m benchmarks.study --out "$out" "$@"
.venv/bin/python -m benchmarks.study_report --runs "$out" --out "$results"
for labels in "$out"/labels/*/; do
    [ -d "$labels" ] || continue # none were asked for
    .venv/bin/opencloc data stats --data "shards:$out/labelled?sidecar=${labels}vesl" --out "$results/labels-$(basename "$labels")"
done
facts recipes/study.sh "$@" >"$results/run.txt"
echo "wrote $results"

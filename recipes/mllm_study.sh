#!/usr/bin/env bash
# The study of multimodal models: what CLOC's encoder and its Prompter contribute to a small LLaVA, on generated scenes.
# 3 encoders, a language model that learns to read (ten minutes of a CPU core) and 10 models (eight each), 3 seeds; with
# a GPU, run many at once: --at-once 12.  Run again to go on; Ctrl-C loses at most the steps since a checkpoint, and of a
# language model all.
#   OUT  folder of the runs   RESULTS  folder of tables and plots   PYTHON  the interpreter
# Extra arguments go to benchmarks/mllm_study.py (--only ARM ..., --seeds 0, --steps 150, --device cpu).
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
out=${OUT:-runs/mllm_study}
results=${RESULTS:-results/mllm}
python=${PYTHON:-.venv/bin/python}
"$python" -m benchmarks.mllm_study --out "$out" "$@"
"$python" -m benchmarks.mllm_study_report --runs "$out" --out "$results"
facts recipes/mllm_study.sh "$@" >"$results/run.txt"
echo "wrote $results"

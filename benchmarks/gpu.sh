#!/usr/bin/env bash
# What one GPU shows: the tests that need one, CLIP and CLOC steps at ViT-B/16, the loss at 16 k to 128 k rows, the
# quickstart's model, loading.  One script of minutes for a GPU that is at hand only for minutes:
#
#   benchmarks/gpu.sh --out results/gpu                    # at most 8 minutes
#   benchmarks/gpu.sh --out results/gpu --minutes 5
#   benchmarks/gpu.sh --out results/gpu --only loss data   # these parts; those found before stay in the file
#   benchmarks/gpu.sh --out /tmp/gpu --device cpu          # small sizes, to see that the script works
#
# Leaves figures.json, README.md and log.txt in the folder, all of them after every part.  Data are generated; nothing is
# downloaded.  It needs Python >= 3.11, a CUDA build of torch >= 2.9, transformers >= 5.17 and the other dependencies of
# pyproject.toml but openai, and pytest, hypothesis and beartype for the tests.  opencloc itself need not be installed.
# On a machine without a package index, bring what it lacks as wheels and name the folder they are installed in:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .whl NAME
#   python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
#   PYTHONPATH=/tmp/site benchmarks/gpu.sh --out results/gpu
#
# PYTHON: the interpreter (default: .venv/bin/python where there is one, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu "$@"

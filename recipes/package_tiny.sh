#!/usr/bin/env bash
# Put the quickstart's CLOC model into the package, as `opencloc.load("tiny")`: weights in float16, computed in float32.
# Scores both, writes results/tiny, and refuses weights that lose more than 0.1 % in any score.
# recipes/package_tiny.sh [RUN_FOLDER]; the run is one of recipes/quickstart.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/facts.sh
run=${1:-runs/quickstart}
package=${PACKAGE:-src/opencloc/pretrained/tiny}
results=${RESULTS:-results/tiny}
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
for file in cloc/model/model.safetensors cloc/config.json run.txt; do
    [[ -f $run/$file ]] || { echo "$run/$file is not there: run recipes/quickstart.sh first" >&2; exit 1; }
done

.venv/bin/python - "$run/cloc/model" "$new/tiny" <<'PYTHON'
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor

source, out = map(Path, sys.argv[1:])
ClocModel.from_pretrained(source).float().save_pretrained(out)  # its configuration says float32: what is computed in
ClocProcessor.from_pretrained(source).save_pretrained(out)
weights = {name: value.half() for name, value in load_file(out / "model.safetensors").items()}
save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
PYTHON
.venv/bin/opencloc eval --data "scenes:rich?num_things=120&seed=1" --num-images 256 --num-pictures 0 \
    --model "trained=$run/cloc/model" "tiny=$new/tiny" --out "$new/eval" --title "The packaged model"
.venv/bin/opencloc card --model "$new/tiny" --repo tiny --license apache-2.0 --evaluation "$new/eval" \
    --data "generated scenes of 120 things (scenes:rich?num_things=120), drawn with OpenMoji (CC BY-SA 4.0)"
facts recipes/package_tiny.sh "$@" >"$new/run.txt"
.venv/bin/python - "$run" "$new" <<'PYTHON'
import json
import sys
from pathlib import Path

from opencloc import files

run, new = map(Path, sys.argv[1:])
scores = json.loads((new / "eval" / "metrics.json").read_text())
lost = {name: scores["trained"][name] - value for name, value in scores["tiny"].items()}
if max(lost.values()) > 0.001:
    raise SystemExit(f"float16 loses more than 0.1 %: {lost}")


def facts(file: Path) -> dict[str, str]:
    return {name: value for name, value in (line.split(maxsplit=1) for line in file.read_text().splitlines())}


config = json.loads((run / "cloc" / "config.json").read_text())
config.pop("out")  # a path of the machine
made = {"training": facts(run / "run.txt") | {"config": config}, "packaging": facts(new / "run.txt")}
files.write_json(new / "tiny" / "provenance.json", made | {"scores": scores})
PYTHON
rm -rf "$package" "$results"
mkdir -p "$(dirname "$package")" "$results"
chmod -R a+rX "$new/tiny"
mv "$new/tiny" "$package"
mv "$new/eval/evaluation.json" "$new/eval/evaluation.md" "$new/eval/metrics.json" "$new/run.txt" "$results/"
echo "$package"
du -sh "$package"

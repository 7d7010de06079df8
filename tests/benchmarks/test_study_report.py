"""The study's report compares rows seed by seed."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import study
from benchmarks.study_report import differences, read_lines


def test_rows_are_compared_in_the_seeds_that_both_have(tmp_path: Path) -> None:
    ours, theirs = {0: 0.5, 1: 0.7, 2: 0.6}, {0: 0.4, 1: 0.8}  # seed 2 has no partner
    for name, values in {"cross": ours, "roi": theirs}.items():
        for seed, macc in values.items():
            final = {"prompter": {where: {"region_macc": macc, "i2t_r1": 0.5} for where in study.SETS}}
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            result = {"variant": name, "seed": seed, "steps": 1, "curve": [], "final": final}
            (folder / "result.json").write_text(json.dumps(result))
    (row,) = [line for line in differences(read_lines(tmp_path)).splitlines() if line.startswith("| noisy |")]
    assert "(+10.0 -10.0; 1 of 2)" in row
    assert "+0.0 ± 0.0 (+0.0 +0.0; 0 of 2)" in row

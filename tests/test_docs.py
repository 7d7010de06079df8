"""Docs do not drift: commands, files and flags that README and docs name exist; its Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from opencloc.cli import VERBS, main
from opencloc.presets import tiny
from opencloc.train.build import build_model
from opencloc.train.checkpoint import save_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_at_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_recipes_and_benchmarks_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", text)) <= targets
    for path in re.findall(r"(?<![\w/])((?:recipes|benchmarks|examples|results)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_existing_verbs_and_flags(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text().replace("\\\n", " ")
    for command in re.findall(r"opencloc ((?:train|eval|label|export|data)\b[^\n`#|&]*)", text):
        words = command.split()
        verb = next(v for v in sorted(VERBS, key=len, reverse=True) if words[: len(v.split())] == v.split())
        preset = ["tiny"] if verb == "train" else []
        with pytest.raises(SystemExit):
            main([*verb.split(), *preset, "--help"])
        known = re.sub(r"[│\s]+", " ", capsys.readouterr().out).replace("_", "-")
        for flag in re.findall(r"--[\w.-]+", command):
            assert flag.replace("_", "-") in known, f"{page.name}: opencloc {verb} has no {flag}"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build_model(tiny())
    save_model(tmp_path / "runs/quickstart/cloc/model", model, processor)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["regions"].shape == (3, 128)
    assert names["boxes_px"].shape == (len(names["scene"].texts), 4)

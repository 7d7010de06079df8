"""Docs do not drift: commands, files and flags that README and docs name exist; their Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from opencloc.cli import VERBS, main
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import export_clip
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.presets import tiny
from opencloc.train.build import tower_config
from opencloc.train.checkpoint import save_model
from tests.mllm.speakers import tiny_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def python_of(page: Path) -> list[str]:
    """The Python of a page, block by block; a later block uses what an earlier one made."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def save_untrained(folder: Path) -> None:
    """A model of the quickstart's sizes, with random weights and a tokenizer of a few words."""
    sizes = tiny().model
    tokenizer = train_tokenizer(["a red dog and a blue cat", "a photo of a pizza"], 400, sizes.text_length)
    config = tower_config(sizes, tokenizer)
    save_model(folder, ClocModel(ClocConfig(clip_config=config)), ClocProcessor.for_towers(config, tokenizer))


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
    for path in re.findall(r"(?<![\w/])((?:recipes|benchmarks|examples|results|tests)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_existing_verbs_and_flags(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text().replace("\\\n", " ")
    verbs = "|".join({verb.split()[0] for verb in VERBS})
    for command in re.findall(rf"opencloc ((?:{verbs})\b[^\n`#|&]*)", text):
        words = command.split()
        verb = next(v for v in sorted(VERBS, key=len, reverse=True) if words[: len(v.split())] == v.split())
        preset = {"train": ["tiny"], "mllm train": ["align"]}.get(verb, [])
        with pytest.raises(SystemExit):
            main([*verb.split(), *preset, "--help"])
        known = re.sub(r"[│\s]+", " ", capsys.readouterr().out).replace("_", "-")
        for flag in re.findall(r"--[\w.-]+", command):
            assert flag.replace("_", "-") in known, f"{page.name}: opencloc {verb} has no {flag}"


def test_every_page_is_in_the_menu_of_the_site() -> None:
    class Loader(yaml.SafeLoader):
        """Takes mkdocs.yml's names of Python functions as strings."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda _loader, suffix, _node: suffix)

    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        parts = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(pages, parts))

    menu = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert menu == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_every_result_names_what_made_it() -> None:
    """A recipe, a benchmark, the fuzzing, or a script that lies beside the figures."""
    names = {path.stem for folder in ("recipes", "benchmarks") for path in (ROOT / folder).iterdir()}
    for folder in sorted((ROOT / "results").iterdir()):
        text = " ".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".txt", ".json"))
        found = re.findall(r"(?:recipes|benchmarks|tests)[/.](\w+)", text)
        scripts = [path for path in folder.glob("*.py") if path.name in text]
        assert names.intersection(found) or scripts or "python -m tests.fuzz" in text, (
            f"results/{folder.name} names no command that exists"
        )


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the quickstart's model, untrained, its export, a multimodal model and a photo.

    A block may need a package in vain.
    """
    folder = tmp_path / "runs/quickstart/cloc/model"
    save_untrained(folder)
    export_clip(ClocModel.from_pretrained(folder), ClocProcessor.from_pretrained(folder), tmp_path / "clip")
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "runs/mllm/instruct/model")
    processor.save_pretrained(tmp_path / "runs/mllm/instruct/model")
    Image.new("RGB", (320, 240), "gray").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in python_of(page):
        try:
            exec(compile(code, str(page), "exec"), names)
        except ImportError as error:
            if "pip install" not in str(error):
                raise

"""Publishing: what arrives at a stand-in for the hub is the folder, and what comes back from it is the model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from opencloc.cli import main
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.export import export_clip
from opencloc.model.hub import PushConfig, push
from opencloc.model.processor import ClocProcessor
from opencloc.train.checkpoint import save_model
from tests.helpers.hub import TOKEN, Hub, running_hub

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tower_config("clip")
    save_model(
        tmp_path / "model", ClocModel(ClocConfig(clip_config=config)), ClocProcessor.for_towers(config, tokenizer)
    )
    return tmp_path / "model"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Runs Python as a user of the stand-in: the client reads its address when it is imported."""

    def run(*arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = own | hub.environment(str(tmp_path / "home"), token)
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_arrives_is_the_folder_and_what_is_loaded_from_there_is_the_model(
    folder: Path, hub: Hub, run: Run, tmp_path: Path
) -> None:
    sent = run("-m", "opencloc", "push", "--model", str(folder), "--repo", "me/cloc")
    assert (sent.returncode, sent.stdout.splitlines()[0]) == (0, f"{hub.url}/me/cloc"), sent.stderr
    repo = hub.repos["me/cloc"]
    assert repo.files == contents(folder)
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "README.md"} <= set(
        repo.files
    )
    assert (len(repo.commits), repo.private) == (1, False)
    assert list(hub.lfs.values()) == [(folder / "model.safetensors").read_bytes()]  # weights go by LFS
    program = f"""
import opencloc, torch
here, there = opencloc.load({str(folder)!r}), opencloc.load("me/cloc")
weights = there.model.state_dict()
assert all(torch.equal(value, weights[name]) for name, value in here.model.state_dict().items())
assert torch.equal(here.embed_texts(["a red dog"]), there.embed_texts(["a red dog"]))
assert there.processor.image_size == 32
opencloc.ClocModel.from_pretrained({str(folder)!r}).push_to_hub("me/again")
opencloc.ClocProcessor.from_pretrained({str(folder)!r}).push_to_hub("me/again")
again = opencloc.load("me/again").model.state_dict()
assert all(torch.equal(value, weights[name]) for name, value in again.items())
"""
    loaded = run("-c", program)
    assert loaded.returncode == 0, loaded.stderr
    again = hub.repos["me/again"].files  # by the methods that models of transformers have
    assert again.keys() == repo.files.keys()
    same = {name for name in again if again[name] == repo.files[name]}
    assert again.keys() - same <= {"config.json"}  # which says the weights' dtype once they were loaded


def test_a_second_push_replaces_the_weights_and_leaves_what_others_put_there(folder: Path, hub: Hub, run: Run) -> None:
    assert run("-m", "opencloc", "push", "--model", str(folder), "--repo", "me/cloc", "--private").returncode == 0
    repo = hub.repos["me/cloc"]
    assert repo.private
    repo.files |= {"model-00001-of-00002.safetensors": b"older", "picture.png": b"mine"}
    sent = run("-m", "opencloc", "push", "--model", str(folder), "--repo", "me/cloc", "--private")
    assert sent.returncode == 0, sent.stderr
    assert repo.files == contents(folder) | {"picture.png": b"mine"}
    repo.private = False
    refused = run("-m", "opencloc", "push", "--model", str(folder), "--repo", "me/cloc", "--private")
    assert (refused.returncode, len(repo.commits)) == (1, 2)
    assert "is public" in refused.stderr


def test_nothing_is_sent_without_a_token_or_with_a_wrong_one(folder: Path, hub: Hub, run: Run) -> None:
    refused = run("-m", "opencloc", "push", "--model", str(folder), "--repo", "me/cloc", token=None)
    assert (refused.returncode, hub.asked) == (1, [])
    assert "there is no token for the hub: run `hf auth login`" in refused.stderr
    refused = run("-m", "opencloc", "push", "--model", str(folder), "--repo", "me/cloc", token="hf_wrong")
    assert (refused.returncode, hub.repos) == (1, {})
    assert "does not let this token write" in refused.stderr
    assert "hf_wrong" not in refused.stderr


def test_an_export_is_pushed_too(folder: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    model, processor = ClocModel.from_pretrained(folder), ClocProcessor.from_pretrained(folder)
    export = export_clip(model, processor, tmp_path / "export")
    sent = run("-m", "opencloc", "push", "--model", str(export), "--repo", "me/clip")
    assert sent.returncode == 0, sent.stderr
    assert hub.repos["me/clip"].files == contents(export)


def test_a_folder_that_would_not_load_is_not_sent(folder: Path, tmp_path: Path) -> None:
    def refusal(break_it: Callable[[Path], object], repo: str = "me/cloc") -> str:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "broken")
        break_it(tmp_path / "broken")
        with pytest.raises((ValueError, OSError)) as error:
            push(PushConfig(model=str(tmp_path / "broken"), repo=repo))
        return str(error.value)

    assert "there is no README.md" in refusal(lambda f: (f / "README.md").unlink())
    assert "there is no model.safetensors" in refusal(lambda f: (f / "model.safetensors").unlink())
    assert "tokenizer" in refusal(lambda f: (f / "tokenizer.json").unlink())
    assert "no processor_config.json" in refusal(lambda f: (f / "processor_config.json").unlink())
    assert "middle of a run" in refusal(lambda f: (f / "optimizer.safetensors").write_bytes(b""))
    assert "no such folder" in refusal(shutil.rmtree)
    assert "ORGANISATION/NAME, not 'cloc'" in refusal(lambda f: None, repo="cloc")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--model", str(tmp_path / "nothing"), "--repo", "me/cloc"]) == 1
    assert capsys.readouterr().err == f"opencloc push: {tmp_path}/nothing: no such folder\n"

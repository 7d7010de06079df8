"""Loading: a checkpoint that is not whole, not sound or not what it says is refused with its name and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

import opencloc.model.processor  # noqa: F401 (registers the Auto classes)
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.loading import load_config, load_model, load_tokenizer, model_path
from opencloc.model.processor import ClocProcessor, train_tokenizer

Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def clip(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    AutoModel.from_config(tower_config("clip")).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def cloc(tower_config: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    config = tower_config("clip")
    ClocModel(ClocConfig(clip_config=config)).save_pretrained(tmp_path / "cloc")
    ClocProcessor.for_towers(config, tokenizer).save_pretrained(tmp_path / "cloc")
    return tmp_path / "cloc"


def load(folder: Path) -> None:
    """As the rest of the project opens a checkpoint."""
    if folder.name == "cloc":
        ClocModel.from_pretrained(folder)
        ClocProcessor.from_pretrained(folder)
    else:
        ClocModel.from_clip(folder)
        ClocProcessor.from_clip(folder)


def drop(prefix: str) -> Change:
    return lambda w: [w.pop(name) for name in list(w) if name.startswith(prefix)]


def with_prefix(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights["module." + name] = weights.pop(name)


def spoil(value: float) -> Change:
    return lambda w: w["logit_scale" if "logit_scale" in w else "clip.logit_scale"].fill_(value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("cloc", drop("prompter."), "missing weights: prompter"),
        ("cloc", drop("clip.text_projection"), "missing weights: clip.text_projection"),
        ("cloc", with_prefix, r"weights: "),
        ("cloc", lambda w: w.update(extra=torch.zeros(1)), "unexpected weights: extra"),
        ("cloc", lambda w: w.update(region_logit_scale=torch.zeros(2)), "region_logit_scale"),
        ("cloc", spoil(float("nan")), "not finite: clip.logit_scale"),
        ("clip", drop("visual_projection"), "missing weights: visual_projection"),
        ("clip", with_prefix, r"weights: "),
        ("clip", spoil(float("inf")), "not finite: logit_scale"),
    ],
)
def test_a_model_with_other_weights_than_its_own_is_never_loaded(
    request: pytest.FixtureRequest, kind: str, change: Change, message: str
) -> None:
    folder = request.getfixturevalue(kind)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for open_it in (load, *([AutoModel.from_pretrained] if kind == "cloc" else [])):
        with pytest.raises(ValueError, match=message) as error:
            open_it(folder)
        assert str(folder) in str(error.value)


def test_what_older_versions_saved_beside_the_weights_is_no_fault(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    for tower, count in (("text", 16), ("vision", 17)):
        weights[f"{tower}_model.embeddings.position_ids"] = torch.arange(count)[None]
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    load(clip)


@pytest.mark.parametrize("kind", ["cloc", "clip"])
def test_pickles_are_not_opened(request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors; pytorch_model\.bin is a pickle"):
        load(folder)


@pytest.mark.parametrize("kind", ["cloc", "clip"])
def test_foreign_code_is_neither_run_nor_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = request.getfixturevalue(kind)
    (folder / "code.py").write_text("raise SystemExit('ran')")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoConfig": "code.A", "AutoModel": "code.A", "AutoTokenizer": [None, "code.A"]}
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    load(folder)  # by the code that is installed


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"", b"null", b'{"model_type": 3}'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_broken_files_are_named(cloc: Path, name: str, content: bytes) -> None:
    (cloc / name).write_bytes(content)
    with pytest.raises(ValueError, match="cloc"):
        load(cloc)


@pytest.mark.parametrize("length", [0, 7, 1000])
def test_truncated_weights_are_named(cloc: Path, length: int) -> None:
    file = cloc / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cloc: model\.safetensors is broken"):
        load(cloc)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"box_head": {"a": 1}}),
        ("config.json", {"prompter": "cube"}),
        ("config.json", {"prompter_heads": 0}),
        ("config.json", {"clip_config": 3}),
        ("config.json", {"clip_config": {"model_type": "clip", "projection_dim": None}}),
        ("tokenizer_config.json", {"pad_token": "\ud800"}),
        ("processor_config.json", {"image_mean": [-1e25, 0.4, 0.4]}),
        ("processor_config.json", {"image_mean": [0.4, "0.5", 0.4]}),
        ("processor_config.json", {"image_mean": [0.4, 0.4, 0.4, 0.4]}),
        ("processor_config.json", {"image_std": [0.2, 0.2, {"a": 1}]}),
        ("processor_config.json", {"image_std": [0.2, 0, 0.2]}),
        ("processor_config.json", {"image_size": 64}),
        ("processor_config.json", {"max_text_length": "long"}),
    ],
)
def test_values_that_make_no_sense_are_refused(cloc: Path, name: str, change: dict[str, Any]) -> None:
    content = json.loads((cloc / name).read_text())
    (cloc / name).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match="cloc"):
        load(cloc)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b"\xff", b'{"image_mean": "x"}', b'{"image_mean": [0, 0, 0], "image_std": [0, 0, 0]}'],
)
def test_broken_settings_of_images_are_named(clip: Path, content: bytes) -> None:
    (clip / "preprocessor_config.json").write_bytes(b'{"image_mean": [0.5, 0.5, 0.5]}')
    load(clip)
    (clip / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{clip}: "):
        load(clip)


@pytest.mark.parametrize("path", ["nothere", "no/such/model", "runs/model", "/nowhere/at/all", Path("a/b")])
def test_a_folder_that_is_not_there_is_named_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for open_it in (load_config, load_tokenizer, ClocModel.from_pretrained, ClocProcessor.from_clip):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            open_it(path)
    assert model_path("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


def test_other_kinds_of_models_are_refused(cloc: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'clip' model, not a CLOC checkpoint"):
        ClocModel.from_pretrained(clip)
    with pytest.raises(ValueError, match="'clip' model"):
        ClocProcessor.from_pretrained(clip)
    with pytest.raises(ValueError, match="CLOC checkpoint already"):
        ClocModel.from_clip(cloc)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"bert.*must be one of clip, siglip, siglip2"):
        ClocModel.from_clip(tmp_path / "bert")


def test_a_folder_without_tokenizer_files_is_refused(cloc: Path, clip: Path) -> None:
    for folder in (cloc, clip):
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match=r"files are missing \(tokenizer\.json"):
            load(folder)


def test_another_models_tokenizer_is_refused(clip: Path) -> None:
    larger = train_tokenizer(["a red dog"], 300, 16)
    larger.add_tokens([f"word{i}" for i in range(100)])
    larger.save_pretrained(clip)
    with pytest.raises(ValueError, match="another model's"):
        load(clip)


def renumbered(tokenizer: PreTrainedTokenizerFast, end_id: int, ends: bool) -> PreTrainedTokenizerFast:
    """The tokenizer with the id of its end token exchanged, which it appends or not."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, old = content["model"]["vocab"], tokenizer.eos_token_id
    other = next(token for token, i in vocab.items() if i == end_id)
    vocab["<end>"], vocab[other] = end_id, old
    for token in content["added_tokens"]:
        token["id"] = vocab[token["content"]]
    content["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(content))
    template = "<start> $A <end>" if ends else "<start> $A"
    special = [(token, vocab[token]) for token in ("<start>", "<end>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<start>", eos_token="<end>")


@pytest.mark.parametrize(
    ("end_id", "ends", "text_config", "message"),
    [
        (1, True, {"eos_token_id": 1}, None),
        (1, True, {"eos_token_id": 5}, "off the first token of id 5"),
        (2, True, {"eos_token_id": 2}, "eos_token_id 2"),  # RoBERTa's, XLM-R's, Llama's
        (-1, True, {"eos_token_id": 2}, None),  # OpenAI's: the end token is the highest id
        (1, False, {"eos_token_id": 1}, "puts no end token"),
    ],
)
def test_texts_are_pooled_at_their_end_or_not_at_all(
    tower_config: Callable[[str], Any],
    tokenizer: PreTrainedTokenizerFast,
    end_id: int,
    ends: bool,
    text_config: dict[str, int],
    message: str | None,
) -> None:
    changed = renumbered(tokenizer, end_id % len(tokenizer), ends)
    config = tower_config("clip")
    for name, value in text_config.items():
        setattr(config.text_config, name, value)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            ClocProcessor.for_towers(config, changed)
        return
    processor, model = ClocProcessor.for_towers(config, changed), ClocModel(ClocConfig(clip_config=config)).eval()
    texts = ["a red dog", "two trains in the snow", "pizza"]
    with torch.no_grad():
        padded, packed = (model.encode_text(f(texts)) for f in (processor.tokenize, processor.pack))
    torch.testing.assert_close(padded, packed)
    assert (padded @ padded.T - torch.eye(3)).abs().max() < 0.999


def test_a_processor_saved_again_is_the_same_file_by_file(cloc: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(cloc)
    processor(text=["a dog", "two trains in the snow"])
    processor.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (cloc / file.name).read_bytes(), file.name


def test_a_model_card_is_written_once(cloc: Path) -> None:
    assert "opencloc.load(" in (cloc / "README.md").read_text()
    (cloc / "README.md").write_text("mine")
    ClocModel.from_pretrained(cloc).save_pretrained(cloc)
    assert (cloc / "README.md").read_text() == "mine"


def test_fresh_region_parts_say_so(clip: Path, tmp_path: Path) -> None:
    model = ClocModel.from_clip(clip)
    assert not model.config.regions_trained
    model.config.regions_trained = True
    model.save_pretrained(tmp_path / "trained")
    assert ClocModel.from_pretrained(tmp_path / "trained").config.regions_trained
    assert load_model(AutoModel, clip).config.model_type == "clip"
    shutil.rmtree(clip)


@pytest.mark.parametrize("of", ["image", "region"])
def test_a_temperature_at_its_bound_can_come_down(tower_config: Callable[[str], Any], of: Any) -> None:
    model = ClocModel(ClocConfig(clip_config=tower_config("clip")))
    parameter = model.clip.logit_scale if of == "image" else model.region_logit_scale
    assert parameter is not None
    for value, scale in ((2.0, torch.tensor(2.0).exp()), (4.6052, torch.tensor(100.0)), (9.0, torch.tensor(100.0))):
        with torch.no_grad():
            parameter.fill_(value)
        parameter.grad = None
        model.scale(of).backward()
        torch.testing.assert_close(model.scale(of).detach(), scale)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, scale)
    model.bound_scales()
    assert parameter.item() == pytest.approx(4.60517)


def test_the_towers_of_a_clip_baseline_take_any_prompter(cloc: Path, tmp_path: Path) -> None:
    baseline = ClocModel.from_pretrained(cloc)
    baseline.config.regions_trained = False
    baseline.save_pretrained(tmp_path / "baseline")
    for prompter in ("cross", "roi", "pool_cross"):
        model = ClocModel.from_clip(tmp_path / "baseline", prompter=prompter)
        assert model.config.prompter == prompter
        for name, weight in model.clip.state_dict().items():
            assert torch.equal(weight, baseline.clip.state_dict()[name]), name

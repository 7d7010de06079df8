"""The plug-in under a stand-in of lmms-eval, which is not installed: its registry's rules and its requests."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.mllm.answers import Answerer
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.lmms import conversation_of
from tests.mllm.speakers import CHATML, tiny_model

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


@dataclass(frozen=True)
class ModelManifest:
    """lmms-eval's: a name and where its class is."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    """lmms-eval's base class as far as a model sees it."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class as lmms-eval's registry finds it: entry point, manifest, class path, checks."""
    parts = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}}
    parts |= {"lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest}}
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    (entry,) = PYPROJECT["project"]["entry-points"]["lmms_eval.models"].values()
    home, _, function = entry.partition(":")
    payload = getattr(importlib.import_module(home), function)
    manifest = payload() if callable(payload) else payload
    assert isinstance(manifest, ModelManifest)
    assert manifest.model_id == "opencloc"
    assert manifest.chat_class_path is not None
    home, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(home), name)
    assert issubclass(found, Lmms)
    assert found.is_simple is False  # it resolves as a chat model
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lmms") / "model"
    model, processor = tiny_model(template=CHATML)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def to_messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


DOCUMENTS = [{"image": photo(i), "question": f"Where is dog {i}?", "answer": "a cat"} for i in range(3)]


@pytest.mark.parametrize("context", [(), ("ctx",)])
def test_answers_come_in_the_order_of_the_requests_and_end_at_the_stop(
    plug_in: type, folder: str, context: tuple[str, ...]
) -> None:
    model = plug_in(pretrained=folder, device="cpu", batch_size="2", dtype="float32")
    model.task_dict = {"task": {"test": DOCUMENTS}}
    settings = [{"max_new_tokens": 6}, {"max_new_tokens": 3}, {"max_new_tokens": 6}]
    requests = [
        SimpleNamespace(args=(*context, to_messages, settings[i], i, "task", "test")) for i in range(len(DOCUMENTS))
    ]
    answers = model.generate_until(requests)
    answerer = Answerer.from_pretrained(folder)
    for document, setting, answer in zip(DOCUMENTS, settings, answers, strict=True):
        asked = Conversation(image=document["image"], turns=(Turn("user", document["question"]),))
        assert answerer.answer([asked], setting["max_new_tokens"]) == [answer]
    stop = answers[0][1:2]
    assert stop
    cut = SimpleNamespace(args=(*context, to_messages, settings[0] | {"until": [stop]}, 0, "task", "test"))
    assert model.generate_until([cut]) == [answers[0].partition(stop)[0].strip()]


def test_likelihoods_are_those_of_the_model(plug_in: type, folder: str) -> None:
    model = plug_in(pretrained=folder, device="cpu", dtype="float32")
    model.task_dict = {"task": {"test": DOCUMENTS}}
    requests = [
        SimpleNamespace(args=("Where?", target, lambda d: [d["image"]], 1, "task", "test"))
        for target in ("a dog", lambda document: document["answer"])
    ]
    turns = [(Turn("user", "Where?"), Turn("assistant", text)) for text in ("a dog", "a cat")]
    asked = [Conversation(image=DOCUMENTS[1]["image"], turns=pair) for pair in turns]
    found = model.loglikelihood(requests)
    np.testing.assert_allclose(
        [value for value, _ in found], Answerer.from_pretrained(folder).log_likelihood(asked), rtol=1e-5
    )
    assert found[0][0] != found[1][0]


def test_what_it_does_not_take_is_refused_by_name(plug_in: type, folder: str) -> None:
    with pytest.raises(ValueError, match="unknown model_args: max_frames"):
        plug_in(pretrained=folder, device="cpu", max_frames=3)
    with pytest.raises(NotImplementedError, match="one round"):
        plug_in(pretrained=folder, device="cpu").generate_until_multi_round([])
    image = {"type": "image", "url": photo()}
    with pytest.raises(ValueError, match="mme, document 3: a second image"):
        conversation_of([{"role": "user", "content": [image, image]}], "mme, document 3")
    with pytest.raises(ValueError, match="video"):
        conversation_of([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}], "t")


def test_messages_of_every_form_become_a_conversation() -> None:
    image = photo()
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [{"type": "text", "text": "<image>\nWhat?"}, {"type": "image", "url": image}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Where?"},
    ]
    found = conversation_of(messages, "t")
    assert [(turn.role, turn.text) for turn in found.turns] == [
        ("user", "Be short.\nWhat?"),
        ("assistant", "A dog."),
        ("user", "Where?"),
    ]
    assert found.image is not None
    assert conversation_of([{"role": "user", "content": "Only words"}], "t").image is None

"""Chat: turns, regions in pixels, one encoding, pictures; and the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opencloc.boxes import Letterbox
from opencloc.cli import main
from opencloc.errors import BadSample
from opencloc.mllm.answers import Answerer
from opencloc.mllm.boxes_text import box_text
from opencloc.mllm.chat import Chat, read_answer
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.terminal import ChatConfig, run_chat
from opencloc.model.prompts import Box, Point
from tests.mllm.speakers import CHATML, tiny_answerer, tiny_model

BOX = [8.0, 3.0, 20.0, 27.0]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return tiny_answerer(template=CHATML)


@pytest.fixture
def chat(answerer: Answerer) -> Chat:
    return Chat(answerer)


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def test_an_answer_is_the_models_to_the_same_conversation(chat: Chat, answerer: Answerer) -> None:
    image = photo()
    first = chat.ask(image, "What is {region:0}?", boxes_px=[BOX], max_new_tokens=6)
    second = chat.follow_up("And {region:1}?", points_px=[[10, 15]], max_new_tokens=6)
    box, point = Box(0.2, 0.1, 0.5, 0.9), Point(0.25, 0.5)
    turns = (Turn("user", "What is {region:0}?"),)
    assert answerer.answer([Conversation(image=image, turns=turns, prompts=(box,))], 6) == [first.text]
    turns = (*turns, Turn("assistant", first.text), Turn("user", "And {region:1}?"))
    assert answerer.answer([Conversation(image=image, turns=turns, prompts=(box, point))], 6) == [second.text]
    assert chat.turns == (*turns, Turn("assistant", second.text))


def test_the_image_is_encoded_once_for_all_turns(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tower = chat.answerer.model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    chat.ask(photo(), "What?", max_new_tokens=3)
    chat.follow_up("Where?", boxes_px=[BOX], max_new_tokens=3)
    assert calls == [1]
    chat.ask(photo(1), "What?", max_new_tokens=3)
    assert calls == [1, 1]
    assert len(chat.turns) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"boxes_px": np.array([BOX], dtype=np.float32)},
        {"boxes_px": torch.tensor([BOX])},
        {"points_px": [(3, 4)]},
        {"masks": [np.eye(30, 40) > 0]},
    ],
)
def test_regions_that_the_question_does_not_name_come_last(chat: Chat, given: dict[str, Any]) -> None:
    chat.ask(photo(), "What is this?", max_new_tokens=2, **given)
    assert chat.turns[0].text == "What is this? {region:0}"
    chat.follow_up("And this?", max_new_tokens=2, **given)
    assert chat.turns[2].text == "And this? {region:1}"


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("What?", {"boxes_px": [[0, 0, 400, 10]]}, "reaches outside"),
        ("What?", {"boxes_px": [[0.1, 0.1, 0.5, 0.5]]}, "looks normalised"),
        ("What?", {"boxes_px": [1, 2, 3]}, "rows of 4 numbers"),
        ("What?", {"points_px": [[40, 31]]}, "does not lie in the image"),
        ("What?", {"masks": [np.ones((3, 3), bool)]}, "shape"),
        ("What is {region:1}?", {"boxes_px": [BOX]}, "placeholder without a prompt"),
        (" ", {}, "empty"),
        ("<image>", {}, "special token"),
    ],
)
def test_what_cannot_be_asked_leaves_the_conversation_as_it_was(
    chat: Chat, text: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="no image yet"):
        chat.follow_up("What?")
    chat.ask(photo(), "What is it?", max_new_tokens=2)
    before = chat.turns, chat.prompts, chat.image
    with pytest.raises((ValueError, BadSample), match=message):
        chat.follow_up(text, **given)
    with pytest.raises((ValueError, BadSample), match=message):
        chat.ask(photo(1), text, **given)
    assert (chat.turns, chat.prompts, chat.image) == before
    chat.follow_up("And?", max_new_tokens=2)


@pytest.mark.parametrize("size", [(40, 30), (30, 60), (50, 50)])
def test_boxes_of_an_answer_are_pixels_of_the_photo(size: tuple[int, int]) -> None:
    letterbox = Letterbox(width_px=size[0], height_px=size[1])
    boxes = np.array([[0.1, 0.2, 0.5, 0.6], [0.3, 0.1, 0.9, 1.0]])
    first, second = (box_text(letterbox.to_square(box).tolist()) for box in boxes)
    answer = read_answer(
        f"I see it. The small red dog {first}, a cat {second} [1, 2] and [5, 5, 5, 5].", Image.new("RGB", size)
    )
    step = max(size) / 999
    np.testing.assert_allclose(answer.boxes_px, boxes * [*size, *size], atol=step)
    assert answer.labels == ("The small red dog", "a cat")
    assert answer.unread == {"not four numbers": 1, "empty box": 1}
    empty = read_answer("No box.", Image.new("RGB", size))
    assert empty.boxes_px.shape == (0, 4)


def test_the_picture_shows_the_boxes_and_appears_whole(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 80), "white")
    answer = read_answer("a dog [200, 250, 600, 700]", image)
    path = answer.save(tmp_path / "new/answer.png")
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    x0, y0, x1, y1 = answer.boxes_px[0].round().astype(int)
    assert (pixels[y0 : y1 + 1, [x0, x1]] != 255).any(-1).all()
    assert (pixels[[y1], x0 : x1 + 1] != 255).any(-1).all()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["answer.png"]
    assert np.asarray(image).min() == 255  # a copy
    with pytest.raises(ValueError, match=r"\.jpg, \.png or \.webp"):
        answer.save(tmp_path / "answer.gif")


# -- the terminal ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    model, processor = tiny_model(template=CHATML)
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    for i in range(2):
        photo(i).save(path / f"{i}.png")
    return path


def test_lines_are_questions_and_orders_and_mistakes_do_not_end_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"""
What is it?
/box 8 3 20 27
/point 10, 15
What are these?
/box 1 2
/nonsense
/image {folder}/missing.png
/image {folder}/1.png
And here?
/new
Again?
/quit
never asked
"""
    config = ChatConfig(model=str(folder / "model"), image=str(folder / "0.png"), max_new_tokens=4, device="cpu")
    run_chat(config, io.StringIO(lines))
    said, complaints = capsys.readouterr()
    chat = Chat.from_pretrained(folder / "model")
    expected = [
        chat.ask(folder / "0.png", "What is it?", max_new_tokens=4).text,
        chat.follow_up("What are these?", boxes_px=[BOX], points_px=[[10, 15]], max_new_tokens=4).text,
        chat.ask(folder / "1.png", "And here?", max_new_tokens=4).text,
        chat.ask(folder / "1.png", "Again?", max_new_tokens=4).text,
    ]
    assert said == "".join(f"{text}\n" for text in expected)
    assert "4 numbers are needed" in complaints
    assert "no order /nonsense" in complaints
    assert "missing.png" in complaints


def test_boxes_are_printed_in_pixels_and_drawn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["a dog [100, 200, 500, 600]", "nothing [1, 2]", "a cat [0, 200, 999, 800]"])
    monkeypatch.setattr(Answerer, "answer", lambda *_: [next(said)])
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\nWhere?\nWhere?\n"))
    command = ["mllm", "chat", "--model", str(folder / "model"), "--image", str(folder / "0.png"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    out, complaints = capsys.readouterr()
    assert out.splitlines() == [
        "a dog [100, 200, 500, 600]",
        "  a dog: 4, 3, 20, 19",
        f"{tmp_path}/out/answer-1.png",
        "nothing [1, 2]",
        "a cat [0, 200, 999, 800]",
        "  a cat: 0, 3, 40, 27",
        f"{tmp_path}/out/answer-2.png",
    ]
    assert "can't be read: not four numbers (1)" in complaints
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["answer-1.png", "answer-2.png"]


def test_a_model_or_photo_that_cannot_be_opened_ends_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mllm", "chat", "--model", str(folder), "--image", str(folder / "0.png")]) == 1
    assert main(["mllm", "chat", "--model", str(folder / "model"), "--image", "none.png", "--device", "cpu"]) == 1
    assert "none.png" in capsys.readouterr().err


def test_the_export_verb_says_what_it_made(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mllm", "export", "--model", str(folder / "model"), "--out", str(tmp_path / "llava")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'llava'}\n")
    assert (tmp_path / "llava/model.safetensors").is_file()
    assert main(["mllm", "export", "--model", str(folder / "model"), "--out", str(folder / "model/llava")]) == 1
    assert "must lie outside" in capsys.readouterr().err

"""The study of multimodal models at a tiny size, from encoders to the report."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from benchmarks import mllm_language, mllm_study, mllm_study_report, mllm_transcript
from benchmarks.mllm_scores import score
from opencloc.boxes import Letterbox
from opencloc.data.sample import Sample
from opencloc.mllm import templates
from opencloc.mllm.boxes_text import box_text
from opencloc.mllm.model import RegionLlava


@pytest.mark.slow
def test_mllm_study_runs_from_encoders_to_mllm_study_report_and_mllm_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`benchmarks.mllm_study` arm by arm, then `benchmarks.mllm_study_report`, and `benchmarks.mllm_transcript`."""
    runs = tmp_path / "runs"
    size = ["--steps", "3", "--num-images", "4", "--device", "cpu"]
    names = ("encoder_cloc", "encoder_clip", "encoder_clip_long", "language", "no_image", "cloc_prompter")
    for name in names:
        monkeypatch.setattr(sys, "argv", ["mllm_study", "--out", str(runs), "--run", name, "0", *size])
        mllm_study.main()
        result = json.loads((runs / f"{name}-0" / "result.json").read_text())
        assert result["arm"] == name
        if "model" in result:
            assert (runs / result["model"] / "config.json").exists()
        else:
            assert {"refer", "ground", "exists", "caption recall"} <= result["third"].keys() & result["final"].keys()
            assert all(0 <= value <= 1 for value in result["final"].values())
    learned: Any = AutoModelForCausalLM.from_pretrained(runs / "language-0" / "model").get_input_embeddings().weight
    begun = RegionLlava.from_pretrained(runs / "cloc_prompter-0" / "start").get_input_embeddings().weight
    torch.testing.assert_close(begun[: len(learned)], learned, rtol=0.02, atol=0.0)  # numbers too, which `build` starts
    blind = runs / "no_image-0"
    shutil.rmtree(blind / "start")  # as after a kill when the seeing model was built
    (blind / "result.json").unlink()
    monkeypatch.setattr(sys, "argv", ["mllm_study", "--out", str(runs), "--run", "no_image", "0", *size])
    mllm_study.main()
    tower = RegionLlava.from_pretrained(blind / "start").model.vision_tower
    assert not tower.embeddings.patch_embedding.weight.any()
    command = [sys.executable, "-m", "benchmarks.mllm_study", "--out", str(runs), "--only", "no_image", "--seeds", "0"]
    again = subprocess.run([*command, *size], capture_output=True, text=True, check=True)
    assert again.stdout.startswith("0 runs to do")
    monkeypatch.setattr(sys, "argv", ["mllm_study_report", "--runs", str(runs), "--out", str(tmp_path / "results")])
    mllm_study_report.main()
    page = (tmp_path / "results" / "README.md").read_text()
    assert "CLOC + Prompter" in page
    assert "no image" in page
    assert "tables of words" in page
    assert (tmp_path / "results" / "scores.svg").stat().st_size > 1000
    model, out = runs / "cloc_prompter-0" / "instruct" / "model", tmp_path / "transcript"
    words = ["--model", str(model), "--data", mllm_study.WORLD, "--num-photos", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["mllm_transcript", *words])
    mllm_transcript.main()
    said = json.loads((out / "figures.json").read_text())["said"]
    assert len(said) == 10
    page = (out / "README.md").read_text()
    assert all(one["answer"] in page for one in said)
    assert (out / "photo-2.jpg").exists()


def test_every_arm_stands_on_an_encoder_that_comes_before_it() -> None:
    seen: set[str] = set()
    for arm in mllm_study.arms():
        assert set(arm.needs) <= seen
        seen.add(arm.name)


def test_words_of_the_study_are_all_in_its_vocabulary() -> None:
    """A word that is none would be learned as unknown: no question or answer may have one."""
    from opencloc.mllm.conversation import PLACEHOLDER
    from opencloc.mllm.readers import Asked, open_conversations

    tokenizer = mllm_language.words_tokenizer()
    asked = Asked(open_conversations(f"{mllm_study.WORLD}&seed=5", image_px=32), mllm_study.QUESTIONS)
    for number in range(100):
        for turn in asked.conversation(number, random.Random(number)).turns:
            ids = tokenizer(PLACEHOLDER.sub("", turn.text))["input_ids"]
            assert tokenizer.unk_token_id not in ids, turn.text
    box = tokenizer(box_text([0.1, 0.2, 0.55, 0.9], mllm_study.COORDINATE_STEPS))["input_ids"]
    assert len(box) == 9
    assert tokenizer.unk_token_id not in box


def test_scene_as_a_table_names_what_is_in_each_cell_and_statements_say_where() -> None:
    """Written by hand: a picture of 64 x 64 px has 8 x 8 cells of 8 px."""
    tokenizer = mllm_language.words_tokenizer()
    reader = mllm_language.Reader(mllm_language.new_llama(len(tokenizer), seed=0), tokenizer, "cpu")
    boxes = np.array([[0.0, 0.0, 0.25, 0.25], [0.51, 0.51, 0.56, 0.56], [0.75, 0.0, 1.0, 0.125], [0.1, 0.1, 0.3, 0.3]])
    names = ("apple", "bento box", "camel", "drum")
    sample = Sample(image=Image.new("RGB", (64, 64)), captions=(), boxes=boxes, texts=names, key="drawn")
    # the drum lies on the apple's last cell, in which its centre is; the box covers the centre of no cell
    expected = {0: "apple", 1: "apple", 8: "apple", 9: "drum", 36: "bento box", 6: "camel", 7: "camel"}
    nearest = torch.cdist(reader.table(sample) - reader.places, reader.cells).argmin(1)
    known = {number: name for name, number in reader.number_of.items()}
    assert [known[int(number)] for number in nearest] == [expected.get(cell, ".") for cell in range(64)]
    numbers = {
        "apple": "0 0 254 254",
        "bento box": "507 507 555 555",
        "camel": "745 0 999 127",
        "drum": "95 95 301 301",
    }
    orders: set[bool] = set()
    for seed in range(10):
        row = reader.statement(sample, random.Random(seed))
        assert row.input_ids[:64] == [reader.processor.image_token_id] * 64
        said = tokenizer.decode(row.input_ids[64:]).removesuffix(" .").split(" . ")
        learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == token]
        answers: list[str] = []
        for name, statement in zip(sorted(names, key=lambda name: " ".join(said).index(name)), said, strict=True):
            name_first = statement[0].isalpha()
            orders.add(name_first)
            assert statement == (f"{name} {numbers[name]}" if name_first else f"{numbers[name]} {name}")
            answers.append(numbers[name] if name_first else name)
        assert tokenizer.decode(learned) == " ".join(answers)
        assert row.num_supervised == len(learned)
    assert orders == {True, False}


def test_right_answers_score_fully_and_wrong_ones_not_at_all() -> None:
    source = mllm_language.new_scenes()

    def right(samples: Any, conversations: Any, length: int) -> list[str]:
        answers: list[str] = []
        for sample, conversation in zip(samples, conversations, strict=True):
            asked = conversation.turns[0].text
            square = Letterbox(width_px=sample.image.width, height_px=sample.image.height)
            if asked == templates.CAPTION:
                answers.append(" and ".join(sample.texts))
            elif asked == templates.refer():
                box = np.array([getattr(conversation.prompts[0], edge) for edge in ("x0", "y0", "x1", "y1")])
                answers.append(sample.texts[int(np.abs(sample.boxes - box).sum(1).argmin())])
            elif asked in (names := {templates.ground(name): number for number, name in enumerate(sample.texts)}):
                answers.append(box_text(square.to_square(sample.boxes[names[asked]]).tolist(), 64))
            else:
                there = asked in {templates.exists(name) for name in sample.texts}
                answers.append(templates.YES if there else templates.NO)
        return answers

    shares = score(right, source, 40)
    for name in ("refer", "exists", "boxes read", "ground", "of some thing", "caption recall"):
        assert shares[name] == 1, name
    assert shares["said yes"] == 0.5
    assert shares["mean IoU"] > 0.8  # of boxes in steps of a pixel
    silent = score(lambda samples, *_: ["" for _ in samples], source, 40)
    assert set(silent.values()) == {0}
    wrong = score(lambda samples, *_: ["[0, 0, 16, 16] nothing" for _ in samples], source, 40)
    assert wrong.pop("boxes read") == 1
    assert max(wrong.values()) == wrong["mean IoU"] < 0.1


def test_language_model_learns_to_read() -> None:
    tokenizer = mllm_language.words_tokenizer()
    reader = mllm_language.Reader(mllm_language.new_llama(len(tokenizer), seed=0), tokenizer, "cpu")
    places = reader.model.get_input_embeddings().weight.clone()
    source = mllm_language.new_scenes()
    scenes = [source[number] for number in range(8)]
    rows = [reader.question(scene, random.Random(0)) for scene in scenes]

    def loss() -> float:
        with torch.no_grad():
            return float(reader._loss(rows, scenes)) / sum(row.num_supervised for row in rows)

    before = loss()
    reader.train(20, seed=0)
    assert loss() < before - 1
    assert torch.equal(places, reader.model.get_input_embeddings().weight)


def test_study_refuses_a_folder_of_other_settings(tmp_path: Path) -> None:
    mllm_study.check_settings(tmp_path, 1500, 512)
    mllm_study.check_settings(tmp_path, 1500, 512)
    with pytest.raises(SystemExit, match=r"steps 1500, now 150;"):
        mllm_study.check_settings(tmp_path, 150, 512)

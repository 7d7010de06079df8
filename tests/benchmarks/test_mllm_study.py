"""The study of multimodal models at a tiny size, from encoders to the report."""

from __future__ import annotations

import json
import random
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
from opencloc.data.sample import Sample
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
    from opencloc.mllm.boxes_text import box_text
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


def test_scene_as_a_table_names_what_is_in_each_cell() -> None:
    """Written by hand: a picture of 64 x 64 px has 8 x 8 cells of 8 px."""
    tokenizer = mllm_language.words_tokenizer()
    reader = mllm_language.Reader(mllm_language.new_llama(len(tokenizer), seed=0), tokenizer, "cpu")
    boxes = np.array([[0.0, 0.0, 0.25, 0.25], [0.51, 0.51, 0.56, 0.56], [0.75, 0.0, 1.0, 0.125]])
    sample = Sample(
        image=Image.new("RGB", (64, 64)), captions=(), boxes=boxes, texts=("apple", "bento box", "camel"), key="drawn"
    )
    expected = {0: "apple", 1: "apple", 8: "apple", 9: "apple", 36: "bento box", 6: "camel", 7: "camel"}
    nearest = torch.cdist(reader.table(sample) - reader.places, reader.cells).argmin(1)
    names = {number: name for name, number in reader.number_of.items()}
    assert [names[int(number)] for number in nearest] == [expected.get(cell, ".") for cell in range(64)]
    row = reader.statement(sample, random.Random(0))
    text = tokenizer.decode([token for token in row.input_ids if token != reader.processor.image_token_id])
    assert set(text.replace(" .", ".").rstrip(".").split(". ")) <= {
        *("apple 0 0 254 254", "0 0 254 254 apple"),
        *("bento box 507 507 555 555", "507 507 555 555 bento box"),
        *("camel 745 0 999 127", "745 0 999 127 camel"),
    }, text
    assert row.num_supervised == sum(4 if one[0].isalpha() else len(one.split()) - 4 for one in text.split(" . "))

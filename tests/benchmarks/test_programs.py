"""Every program in `benchmarks/` runs from its command line at a tiny size and leaves the files that it names.

What they measure is not looked at: no test depends on how fast the machine is.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data_libraries, gpu, patch_dropout, presence, scene_detector, step_setup, study
from examples.yolox_detector import COCO_CLASSES
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.coco import Coco, CocoConfig
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import ShardWriter, iter_shard
from opencloc.images import letterbox_array
from opencloc.presets import tiny
from tests.test_docs import save_untrained
from tests.vesl.checkpoints import save_owl

ROOT = Path(__file__).parents[2]
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `python -m benchmarks.NAME ARGUMENTS --out OUT` in this process and returns OUT."""

    def call(name: str, *arguments: object) -> Path:
        module, out = importlib.import_module(f"benchmarks.{name}"), tmp_path / name
        words = [str(module.__file__), *map(str, arguments), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        threads = torch.get_num_threads()
        try:
            assert module.main() in (None, 0)
        finally:
            torch.set_num_threads(threads)
        return out

    return call


def test_every_program_has_a_smoke_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    programs = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert "step" in programs
    assert [name for name in programs if not re.search(rf"def test_\w*{name}|import {name}\b", tests)] == []


# -- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_step(run: Run, photos: Path) -> None:
    sizes = "--preset", "tiny", "--batch-size", 2, "--rounds", 1, "--flops-batch-size", 2
    out = run("step", "--data", photos, *sizes)
    figures = json.loads((out / "figures.json").read_text())
    assert figures["command"].startswith("python -m benchmarks.step --data ")
    assert all(len(times) == 1 for times in figures["seconds"].values())
    gflop = figures["gflop_per_image"]["2"]
    assert gflop["CLOC cross, towers frozen"] < 0.5 * gflop["CLOC cross"]
    assert gflop["CLIP"] < gflop["CLOC cross"] < gflop["CLOC as published: encoder, all texts of 77 tokens"]
    tables = (out / "tables.md").read_text()
    assert "| CLOC cross |" in tables
    assert "times the images per second of full training" in tables


def test_no_tower_runs_when_the_prompter_and_the_box_head_are_timed(photos: Path) -> None:
    device = torch.device("cpu")
    inputs, config = step_setup.make_inputs(photos, tiny().model, 2, 2, device)
    models, optimizer = step_setup.make_models(config, device)
    parts = step_setup.make_parts(models["cross"], optimizer, inputs, bf16=False)
    calls: list[str] = []
    for name in ("vision_model", "text_model"):
        getattr(models["cross"].clip, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with FlopCounterMode(display=False) as counter:
        parts["CLOC: Prompter and box head"]()
    assert calls == []
    assert counter.get_total_flops() > 0
    parts["CLIP: vision tower"]()
    assert calls == ["vision_model"]


def test_open_clip_step_answers_every_line_with_seconds(tmp_path: Path) -> None:
    """With a stand-in for open_clip, which is not installed here: a model and a loss of its interface."""
    (tmp_path / "open_clip.py").write_text(
        "import torch\n"
        "__version__ = '0'\n"
        "class Model(torch.nn.Linear):\n"
        "    def forward(self, pixels, texts): return super().forward(pixels), texts.float(), torch.tensor(1.0)\n"
        "def create_model(name): return Model(3, 2)\n"
        "def ClipLoss(): return lambda image, text, scale: (image * text * scale).mean()\n"
    )
    batch = {"pixel_values": torch.ones(4, 3), "texts": torch.ones(4, 2).long(), "device": "cpu"}
    torch.save(batch, tmp_path / "batch.pt")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.open_clip_step", str(tmp_path / "batch.pt"), "1", "fp32"],
        input="step\nstep\n",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    first, *answers = map(json.loads, done.stdout.splitlines())
    assert first == {"open_clip": "0", "torch": torch.__version__}
    assert [sorted(answer) for answer in answers] == [["busy_s", "wall_s"]] * 2


def test_patch_dropout() -> None:
    config = replace(tiny(), batch_size=2, data=replace(tiny().data, patch_dropout=0.5))
    whole, part = patch_dropout.measure(config, rounds=1)
    assert len(whole) == len(part) == 1


def test_features(run: Run, photos: Path) -> None:
    out = run("features", "--data", photos, "--preset", "tiny", "--batch-size", 2, "--num-images", 4, "--rounds", 1)
    figures = json.loads((out / "figures.json").read_text())
    assert figures["encoding"]["images"] == 4
    assert all(len(times) == 1 for times in figures["seconds"].values())
    assert (out / "tables.md").read_text().count(": features |") == 2


def test_regions(run: Run, photos: Path) -> None:
    out = run("regions", "--data", photos, "--rounds", 1, "--layers", 1, "--crops", 2)
    assert set(json.loads((out / "figures.json").read_text())["counts"]) == {"1", "10", "100", "1000"}
    assert (out / "tables.md").read_text().count("\n| ") == 5


def test_presence(run: Run, tmp_path: Path) -> None:
    save_untrained(tmp_path / "model")
    out = run("presence", "--model", tmp_path / "model", "--num-images", 2)
    figures = json.loads((out / "figures.json").read_text())
    assert figures["present"] >= figures["absent"] > 0
    assert set(figures["auc"]) == {"score", "own box", "whole image"}


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert presence.auc(np.array([0.1, 0.9, 0.5, 0.5]), np.array([False, True, True, False])) == 0.875


def test_loss(run: Run) -> None:
    out = run("loss", "--rows", 64, "--repeats", 1)
    (case,) = json.loads((out / "figures.json").read_text())["cases"]
    assert case["dense"]["loss"] == pytest.approx(case["tiled"]["loss"], rel=1e-5)
    assert "| 64 |" in (out / "README.md").read_text()


# -- one GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["machine", "steps", "loss", "data"])
def test_gpu_parts_find_what_the_page_shows(run: Run, part: str) -> None:
    found = json.loads(run("gpu_parts", part, "--device", "cpu").read_text())
    page = gpu.report({"command": "", "commit": "", "parts": {part: {"outcome": "done", "found": found}}})
    assert "## " in page
    if part == "steps":
        assert {"2", "4"} == set(found["batches"])
        assert "| CLOC, both towers frozen |" in page


@pytest.mark.slow
def test_gpu_runs_each_part_in_its_own_process_and_keeps_what_earlier_runs_found(run: Run) -> None:
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in threads.items():
            patch.setenv(name, value)
        patch.setattr(gpu, "LIMITS_S", dict.fromkeys(gpu.LIMITS_S, 900))
        run("gpu", "--device", "cpu", "--minutes", 60, "--only", "tests", "tiny", "compiled")
        out = run("gpu", "--device", "cpu", "--minutes", 60, "--only", "machine")
    figures = json.loads((out / "figures.json").read_text())
    assert set(figures["parts"]) == {"machine", "tests", "tiny", "compiled"}
    assert figures["parts"]["tiny"]["found"]["steps"] == 2
    assert "| a step never waits for the gpu |" in (out / "README.md").read_text()


def test_gpu_names_parts_that_fail_and_parts_without_time(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as log:
        failed = gpu.run_part("no such part", "cpu", 900, log)
        late = gpu.run_part("machine", "cpu", 1, log)
    assert failed["outcome"].startswith("failed with exit code 2")
    assert late["outcome"].startswith("left out")
    page = gpu.report({"command": "", "commit": "", "parts": {"steps": failed, "machine": late}})
    assert "| machine | left out: no time was left |" in page
    assert "invalid choice" in (tmp_path / "log.txt").read_text()


def test_gpu_shell_script_says_how_it_is_used() -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run(
        [script, "--help"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout


# -- data ----------------------------------------------------------------------------------------------------------


def test_data(run: Run, photos: Path) -> None:
    out = run("data", "--data", photos, "--photos", 16, "--batch-size", 4, "--rounds", 1)
    sets = json.loads((out / "figures.json").read_text())["sets"]
    assert [found["photos"] for found in sets.values()] == [16, 4]
    assert "opencloc, with regions" in (out / "README.md").read_text()


def test_data_open(run: Run) -> None:
    out = run("data_open", "--images", 8, "--boxes", 30, "--rounds", 1)
    figures = json.loads((out / "figures.json").read_text())
    assert {name: len(rounds) for name, rounds in figures["seconds"].items()} == {
        "json.load": 1,
        "first": 1,
        "again": 1,
    }
    assert "| opening again, in any process |" in (out / "README.md").read_text()


def test_scale_counts_every_sample_once_and_lists_a_folder_once(run: Run) -> None:
    out = run("scale", "--shards", 40, "--samples", 5000, "--ranks", 4, "--preset", "tiny")
    figures = json.loads((out / "figures.json").read_text())
    assert figures["exact"]["once"] == figures["exact"]["positions"] == 80
    assert all(one["tars_in_no_lane"] == 0 for one in figures["sharing"].values())
    opened, labels = figures["opening"], figures["labelling"]
    assert opened["first"]["calls"]["reads"] == 40
    assert "reads" not in opened["again"]["calls"]
    assert opened["again"]["calls"]["looks"] < 10
    assert labels["find"]["calls"]["looks"] < 10
    assert labels["find"]["calls"]["listings"] == labels["resume"]["calls"]["listings"] == 1
    assert (labels["pending"], labels["finished"], labels["retry"]["redone"]) == (20, 20, 2)
    assert "| measured | tiny |" in (out / "README.md").read_text()


def test_data_libraries_decode_at_the_scale_needed_and_letterbox_as_opencloc_does() -> None:
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8)
    image = Image.fromarray(ramp)
    side = data_libraries.SIDE
    expected = letterbox_array(image, side)
    found = data_libraries.letterbox(image)
    inside = slice(side // 5, -side // 5)
    np.testing.assert_allclose(found[inside].astype(int), expected[inside].astype(int), atol=1)


@pytest.mark.slow
def test_soak(run: Run) -> None:
    out = run("soak", "--seconds", 1, "--kill-every", 0.01, 0.02, "--max-kills", 1)
    assert json.loads((out / "figures.json").read_text())["equal"]


# -- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_label(run: Run, photos: Path, tmp_path: Path) -> None:
    owl = save_owl(tmp_path / "owl")
    out = run("label", "--data", photos, "--yolox", "", "--owlv2", owl, "--images", 3, "--workers", 0)
    figures = json.loads((out / "label.json").read_text())
    assert figures["engine_cpu_ms"]["total"] > 0
    assert "## Local workers" in (out / "label.md").read_text()


def test_label_quality_is_perfect_for_labels_that_equal_the_human_boxes(run: Run, tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "1.png")
    dog = COCO_CLASSES.index("dog")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": dog, "bbox": [4, 2, 20, 10], "iscrowd": 0}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(COCO_CLASSES)],
    }
    (tmp_path / "annotations" / "instances_x.json").write_text(json.dumps(content))
    source = Coco(str(tmp_path), CocoConfig())
    sample = source[0]
    labels = tmp_path / "labels" / "vesl"
    row = SidecarRow(
        key=sample.key,
        boxes=sample.boxes,
        texts=("a brown dog",),
        scores=np.ones(1, np.float32),
        caption="a brown dog on the grass",
    )
    write_sidecar(sidecar_path(source.instances_path, str(labels), 0), [row], {"phrases": 1})
    out = run("label_quality", "--data", f"coco:{tmp_path}", "--labels", f"mine={labels}")
    (found,) = json.loads((out / "quality.json").read_text())
    assert [found[name] for name in found if name.startswith(("precision", "recall"))] == [1.0] * 5
    assert "| regions | 1 |" in (out / "quality.md").read_text()


def test_label_quality_compares_phrases_where_people_named_their_boxes(run: Run, tmp_path: Path) -> None:
    boxes = np.array([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.2, 0.9]], np.float32)
    image = Image.new("RGB", (40, 20))
    person = Sample(key="a", image=image, captions=("two dogs",), boxes=boxes, texts=("Brown dog", "small cat", "tree"))
    with ShardWriter(str(tmp_path / "people")) as writer:
        writer.write(person)
    (tar,) = writer.paths
    moved = np.array([boxes[0], boxes[1], [0.5, 0.0, 1.0, 0.4]], np.float32)
    texts = ("brown  dog", "a big cat", "a bird")
    row = SidecarRow(
        key="a", boxes=moved, texts=texts, scores=np.array([0.5, 0.9, 0.8], np.float32), caption="two dogs"
    )
    labels = tmp_path / "labels" / "vesl"
    write_sidecar(sidecar_path(tar, str(labels)), [row], {"phrases": 3})
    out = run("label_quality", "--data", f"shards:{tmp_path}/people", "--labels", f"mine={labels}")
    (found,) = json.loads((out / "quality.json").read_text())
    assert found["precision (box)"] == found["recall (box)"] == pytest.approx(2 / 3)
    assert found["same phrase, of these"] == 0.5
    assert found["same last word, of these"] == 1.0


def test_scene_detector_finds_things_by_their_names(tmp_path: Path) -> None:
    scenes: Any = open_source(f"scenes:rich?{study.WORLDS['things']}")
    with ShardWriter(str(tmp_path), samples_per_shard=4) as writer:
        for number in range(4):
            writer.write(replace(scenes[number], key=f"{number:06d}"))
    detector = scene_detector.factory(str(tmp_path))
    samples = [sample for sample in iter_shard(writer.paths[0]) if not isinstance(sample, Exception)]
    found = detector([sample.image for sample in samples], [sample.texts for sample in samples])
    assert sum(len(one.boxes) for one in found) > 0
    for one, sample in zip(found, samples, strict=True):
        assert set(one.phrase) <= set(range(len(sample.texts)))


# -- the study -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_study_trains_on_labels_that_it_made_and_study_report_shows_the_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NUM_IMAGES": 4, "NUM_IMAGES_ON_THE_WAY": 4, "NUM_LABELLED": 40, "POINTS": 1}.items():
        monkeypatch.setattr(study, name, value)
    runs = tmp_path / "study"
    runs.mkdir()
    study.make_labels(runs, workers=0)
    scores = {name: {"region_macc": 0.5} for name in study.SETS}
    for rate in study.LEARNING_RATES:  # as if they had been tried
        tried = runs / f"cross_lr{rate:g}-{study.TUNING_SEED}"
        tried.mkdir()
        (tried / "result.json").write_text(json.dumps({"final": {"prompter": scores}}))
    for variant in ("vesl", "cross"):
        run("study", "--run", variant, 0, "--steps", 1)
    out = run("study_report", "--runs", runs)
    assert "VESL: phrases of captions" in (out / "table.md").read_text()
    assert (out / "curves.png").exists()
    assert (out / "examples.png").exists()


# -- photo libraries -----------------------------------------------------------------------------------------------


def test_search(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lancedb", reason="needs the extra `search`")
    save_untrained(tmp_path / "model")
    out = run("search", "--model", tmp_path / "model", "--num-images", 2, "--rounds", 1, "--sizes", 500, "--queries", 3)
    figures = json.loads((out / "costs.json").read_text())
    assert figures["indexing"]["ratio"] > 0
    assert figures["queries"]["500"]["lancedb, all"]["recall"] > 0.95
    assert (out / "costs.md").read_text().count("| 500 |") == 4


def test_search_quality(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lancedb", reason="needs the extra `search`")
    save_untrained(tmp_path / "model")
    out = run("search_quality", "--model", tmp_path / "model", "--data", "s=scenes:easy", "--num-images", 3)
    (found,) = json.loads((out / "quality.json").read_text())["sets"].values()
    assert found["regions"]["photo"] == found["whole photos"]["photo"] == 1  # three photos, ten shown
    assert 0 <= found["regions"]["region"] <= 1


@pytest.mark.slow
def test_search_kills(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lancedb", reason="needs the extra `search`")
    save_untrained(tmp_path / "model")
    out = run("search_kills", "--model", tmp_path / "model", "--kills", 1, "--num-images", 12, "--longest", 0.1)
    figures = json.loads((out / "kills.json").read_text())
    assert figures["equal"]
    assert figures["whole"]


def test_mllm_is_compared_with_plain_llava_of_the_same_size(run: Run) -> None:
    small = ["--layers", 1, "--tower-layers", 2, "--width", 64, "--image-px", 32, "--new-tokens", 3]
    out = run("mllm", "--rounds", 1, "--batch", 2, "--device", "cpu", *small)
    rates = json.loads((out / "figures.json").read_text())["rates"]
    assert set(rates) == {"plain", "no regions", "roi", "points", "prompter"}
    assert rates["plain"]["train, time against plain"] == rates["plain"]["generate, time against plain"] == 1
    assert "| no regions |" in (out / "README.md").read_text()


@pytest.mark.slow
def test_onnx(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes would fix the graphs' sizes
    found = json.loads((run("onnx", "--num-images", 2, "--rounds", 1) / "figures.json").read_text())["found"]
    assert found["onnx fp32"]["top1"] == found["torch"]["top1"]
    assert found["onnx fp32"]["largest difference to torch"] < 1e-4

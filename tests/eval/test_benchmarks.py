"""Tasks on public sets: what counts as right, and a whole command line per task with small random checkpoints."""

from __future__ import annotations

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, CLIPImageProcessor

sys.path.insert(0, str(Path(__file__).parent))
import sets_on_disk as disk

from opencloc.cli import main
from opencloc.eval.encoders import EncodedImages
from opencloc.eval.protocols import Result, Settings, run
from opencloc.eval.registry import BENCHMARKS, open_set
from opencloc.eval.report import to_markdown
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor

WIDTH = 256


class Oracle:
    """Embeds a text as a direction of its own, and images and boxes as what `knows` says of their photo's colour.

    `knows[colour]` is the text of the whole image, `knows[colour, box]` that of a box; `finds[text]` is a box.
    """

    def __init__(self, knows: dict[Any, str], finds: dict[str, list[float]] | None = None) -> None:
        self.name, self.device = "oracle", torch.device("cpu")
        self.knows, self.finds = knows, finds
        self.encoded: Counter[str] = Counter()
        self.asked: dict[str, Tensor] = {}

    def vector(self, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return F.normalize(torch.randn(WIDTH, generator=generator), dim=0)

    def encode_images(self, images: Sequence[Image.Image]) -> EncodedImages:
        colours = [list(disk.COLOURS)[int(np.asarray(image)[3, 3].argmax())] for image in images]
        self.encoded.update(colours)
        embedding = torch.stack([self.vector(self.knows.get(colour, "nothing")) for colour in colours])
        return EncodedImages(embedding=embedding, state=colours)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.encoded.update(texts)
        self.asked |= {text: self.vector(text) for text in texts}
        return torch.stack([self.vector(text) for text in texts])

    def encode_regions(self, encoded: EncodedImages, boxes: Sequence[np.ndarray]) -> list[Tensor]:
        return [
            torch.stack([self.vector(self.knows[colour, tuple(box.tolist())]) for box in rows])
            for colour, rows in zip(encoded.state, boxes, strict=True)
        ]

    def ground(self, encoded: EncodedImages, texts: Sequence[Tensor]) -> list[Tensor] | None:
        if self.finds is None:
            return None
        names = [[next(n for n, v in self.asked.items() if torch.equal(v, row)) for row in rows] for rows in texts]
        return [torch.tensor([self.finds[name] for name in of_image]) for of_image in names]


def scores_of(task: str, place: str, oracle: Oracle, **settings: Any) -> Result:
    data = open_set(task, place)
    return run(oracle, data, BENCHMARKS[task].protocol, Settings(resamples=20, progress=False, **settings))


def values(result: Result, *keys: str) -> list[float]:
    return [result.scores[key].value for key in keys]


# -- what counts as right ----------------------------------------------------------------------------------------------


def test_recognition_counts_boxes_classes_sizes_and_frequencies(tmp_path: Path) -> None:
    disk.write_lvis(tmp_path)
    can, mouse, zebra = "aerosol can", "mouse (computer equipment)", "zebra"
    boxes = [tuple(box.tolist()) for item in open_set("lvis-recognition", str(tmp_path)).items for box in item.boxes]
    oracle = Oracle({("red", boxes[0]): can, ("red", boxes[1]): can, ("green", boxes[2]): zebra})
    got = scores_of("lvis-recognition", str(tmp_path), oracle)
    assert values(got, "top1", "macc") == pytest.approx([2 / 3, 2 / 3])
    assert values(got, "top1_rare", "top1_common", "top1_frequent") == [1, 1, 0]
    assert values(got, "top1_small", "top1_medium") == [0.5, 1]  # 88 and 390 pixels; 1024 is medium
    assert got.scores["macc"].of == "3 classes present of 3"
    assert oracle.encoded == {"red": 1, "green": 1, can: 1, mouse: 1, zebra: 1}  # each image and text once


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_classification_is_by_bare_names_and_by_the_mean_over_templates(tmp_path: Path, batch_size: int) -> None:
    disk.write_imagenet(tmp_path / "v2", {"0": "red", "1": "green", "2": "blue"})
    (tmp_path / "names.txt").write_text("n1 tench\nn2 goldfish\nn3 shark\n")
    place = f"{tmp_path}/v2?templates=7&names={tmp_path}/names.txt"
    # Each is one of the seven templates, and so nearer to its class than to any other; blue is a shark.
    by_template = {"red": "a origami tench.", "green": "a goldfish in a video game.", "blue": "art of the tench."}
    oracle = Oracle(by_template)
    got = scores_of("imagenet-v2", place, oracle, batch_size=batch_size)
    assert values(got, "top1_templates", "top5_templates", "macc_templates") == pytest.approx([2 / 3, 1, 2 / 3])
    assert got.scores["top1_templates"].label == "top-1, 7 templates"
    assert got.scores["top1"].of == "3 images"
    assert oracle.encoded == dict.fromkeys(oracle.encoded, 1)  # 3 photos, 3 names, 21 texts, each once
    assert len(oracle.encoded) == 27
    bare = Oracle({"red": "tench", "green": "goldfish", "blue": "tench"})
    assert values(scores_of("imagenet-v2", place, bare), "top1", "top5", "macc") == pytest.approx([2 / 3, 1, 2 / 3])


def test_retrieval_takes_any_caption_of_an_image_and_every_caption_as_a_query(tmp_path: Path) -> None:
    disk.write_karpathy(tmp_path, "flickr30k")
    oracle = Oracle({"red": "a red photo, said 3.", "green": "a red photo, said 4."})
    got = scores_of("flickr30k-retrieval", str(tmp_path), oracle)
    assert values(got, "i2t_r1", "i2t_r10") == [0.5, 1.0]
    assert (got.scores["i2t_r1"].of, got.scores["t2i_r1"].of) == ("2 images among 10", "10 captions among 2")
    assert got.images == 2


def test_regions_with_equal_texts_are_all_hits(tmp_path: Path) -> None:
    disk.write_grit(tmp_path, parquet=True)
    dog, ball = (0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 1.0, 0.75)
    knows = {(colour, box): text for colour in ("red", "green") for box, text in ((dog, "a dog"), (ball, "a red ball"))}
    got = scores_of("grit-retrieval", str(tmp_path), Oracle(knows))
    assert values(got, "r2t_r1", "t2r_r1") == [1.0, 1.0]
    assert got.scores["t2r_r1"].of == "4 regions among 4"
    swapped = {key: {"a dog": "a red ball"}.get(text, "a dog") for key, text in knows.items()}
    assert values(scores_of("grit-retrieval", str(tmp_path), Oracle(swapped)), "r2t_r1", "t2r_r1") == [0.0, 0.0]


def test_a_tie_with_a_hard_negative_is_wrong(tmp_path: Path) -> None:
    disk.write_fg_ovd(tmp_path)
    place = f"{tmp_path}?images={tmp_path}/coco"
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    brown, black = "a light brown dog.", "a black dog."
    got = scores_of("fg-ovd", place, Oracle({("red", left): brown, ("red", right): brown}))
    assert values(got, "top1") == [0.5]
    assert got.scores["top1"].of == "2 boxes, each against 1 to 2 false texts"
    assert values(scores_of("fg-ovd", place, Oracle({("red", left): brown, ("red", right): black})), "top1") == [1.0]
    flat = Oracle({("red", left): brown, ("red", right): brown})
    flat.vector = lambda text: torch.ones(WIDTH) / WIDTH**0.5  # knows nothing
    assert values(scores_of("fg-ovd", place, flat), "top1") == [0.0]


def test_grounding_is_plain_iou_of_one_half(tmp_path: Path) -> None:
    disk.write_refer(tmp_path)
    finds = {
        "left half": [0.0, 0.0, 0.5, 0.5],  # half of the truth: counts
        "the dark one": [0.0, 0.0, 0.5, 0.49],
        "right half": [1.0, 1.0, 0.5, 0.0],  # corners swapped: no box
    }
    got = scores_of("refcoco", str(tmp_path), Oracle({}, finds))
    assert values(got, "acc50") == pytest.approx([1 / 3])
    assert values(got, "miou") == pytest.approx([(0.5 + 0.49 + 0) / 3])
    assert got.scores["acc50_small"].of == "3 texts"  # 20 x 20 pixels


def test_phrases_of_several_boxes_have_two_protocols(tmp_path: Path) -> None:
    disk.write_entities(tmp_path)
    finds = {
        "two young guys": [0.0, 0.0, 0.5, 1.0],
        "two men": [0.0, 0.0, 1.0, 1.0],
        "shaggy hair": [0.0, 0.0, 0.5, 1.0],
    }
    got = scores_of("flickr30k-entities", str(tmp_path), Oracle({}, finds))
    # the men's boxes are the left half and the lower right corner: all of the image is IoU 1/2 with the first
    assert values(got, "acc50_any", "acc50_merged") == pytest.approx([1.0, 1.0])
    finds["two men"] = [0.5, 0.0, 1.0, 1.0]
    got = scores_of("flickr30k-entities", str(tmp_path), Oracle({}, finds))
    assert values(got, "acc50_any", "acc50_merged") == pytest.approx([2 / 3, 1.0])
    assert values(got, "miou_any", "miou_merged") == pytest.approx([(1 + 0.25 + 1) / 3, (0.5 + 0.5 + 1) / 3])


def test_an_encoder_that_cannot_ground_has_a_dash(tmp_path: Path) -> None:
    disk.write_refer(tmp_path)
    blind = scores_of("refcoco", str(tmp_path), Oracle({}))
    assert (blind.scores, blind.left_out, blind.images) == ({}, {"this encoder cannot ground": 3}, 0)
    finds = {text: [0.0, 0.0, 0.5, 1.0] for text in ("left half", "the dark one", "right half")}
    sees = scores_of("refcoco", str(tmp_path), Oracle({}, finds))
    sees = Result(**{**vars(sees), "encoder": "sees"})
    table = to_markdown([], [blind, sees])
    assert "| refcoco val: IoU ≥ 0.5 | – | 66.7 | 3 texts |" in table
    assert "* refcoco val: this encoder cannot ground (3): oracle" in table


def test_missing_images_are_counted_and_too_many_end_the_run(tmp_path: Path) -> None:
    disk.write_karpathy(tmp_path, "flickr30k")
    (tmp_path / "flickr30k-images/1001.jpg").unlink()
    oracle = Oracle({"red": "a red photo, said 3."})
    got = scores_of("flickr30k-retrieval", str(tmp_path), oracle, max_missing=0.5)
    assert (got.left_out, got.images) == ({"missing image file": 1}, 1)
    assert got.scores["i2t_r1"].of == "1 images among 5"
    with pytest.raises(
        ValueError, match=r"1 images could not be read, at most 0 may be missing; the last: .*1001\.jpg"
    ):
        scores_of("flickr30k-retrieval", str(tmp_path), oracle)
    (tmp_path / "flickr30k-images/1000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no 1000\.jpg"):
        scores_of("flickr30k-retrieval", str(tmp_path), oracle, max_missing=1.0)


# -- whole command lines -----------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], Any]] = {
    "imagenet": lambda root: disk.write_imagenet(root / "val", {"n01440764": "red", "n01443537": "green"}),
    "imagenet-v2": lambda root: disk.write_imagenet(root, {"0": "red", "1": "green"}),
    "coco-retrieval": lambda root: disk.write_karpathy(root, "coco"),
    "flickr30k-retrieval": lambda root: disk.write_karpathy(root, "flickr30k"),
    "coco-recognition": disk.write_coco,
    "lvis-recognition": disk.write_lvis,
    "grit-retrieval": lambda root: disk.write_grit(root, parquet=True),
    "fg-ovd": disk.write_fg_ovd,
    "refcoco": disk.write_refer,
    "refcoco+": lambda root: disk.write_refer(root, "refcoco+"),
    "refcocog": lambda root: disk.write_refer(root, "refcocog", "umd"),
    "flickr30k-entities": disk.write_entities,
}
OPTIONS = {"imagenet": "?templates=none", "imagenet-v2": "?templates=none"}


@pytest.fixture(scope="module")
def models(tower_config: Callable[[str], Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of a CLOC, a CLIP and a SigLIP checkpoint with random weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    clip = tower_config("clip")
    ClocModel(ClocConfig(clip_config=clip)).save_pretrained(root / "cloc")
    ClocProcessor.for_towers(clip, tokenizer).save_pretrained(root / "cloc")
    for family in ("clip", "siglip"):
        AutoModel.from_config(tower_config(family)).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        CLIPImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / family)
    return [str(root / name) for name in ("cloc", "clip", "siglip")]


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_task_runs_from_the_command_line(
    task: str, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    WRITERS[task](data)
    place = f"{data}?images={data}/coco" if task == "fg-ovd" else f"{data}{OPTIONS.get(task, '')}"
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md"), "--resamples", "20"]
    assert main(["eval", task, "--data", place, "--model", *models, *files]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out.md").read_text().strip()
    assert "| score in % | cloc, prompter | clip, crop | siglip, crop | of |" in printed
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["encoder"] for result in results] == ["cloc, prompter", "clip, crop", "siglip, crop"]
    grounds = [bool(result["scores"]) for result in results]
    assert grounds == ([True, False, False] if "refcoco" in task or "entities" in task else [True] * 3)
    for score in results[0]["scores"].values():
        assert set(score) == {"label", "value", "low", "high", "count", "of"}
        if score["count"]:
            assert 0 <= score["value"] <= 1
            assert score["low"] is None or 0 <= score["low"] <= score["value"] + 1e-9 <= score["high"] + 2e-9


def test_several_tasks_models_and_places_share_one_table(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.write_refer(tmp_path / "refer")
    disk.write_coco(tmp_path / "coco")
    cloc, clip, _ = models
    places = [f"refcoco={tmp_path}/refer?split={split}" for split in ("val", "testA")]
    command = ["eval", "coco-recognition", "refcoco", "region-recognition", "--data", *places, f"{tmp_path}/coco"]
    source = [f"region-recognition=coco:{tmp_path}/coco?images={tmp_path}/coco/val2017"]
    out = ["--out", str(tmp_path / "out"), "--num-images", "1", "--regions", "roi", "--num-pictures", "1"]
    assert main([*command, *source, "--model", f"a={cloc}@prompter", clip, *out]) == 0
    printed = capsys.readouterr().out
    assert "| score in % | a | clip, roi | of |" in printed
    groups = dict.fromkeys(line.split(":")[0] for line in printed.splitlines() if line.startswith("| r"))
    assert list(groups) == ["| region recognition", "| refcoco val", "| refcoco testA"]
    assert "coco-recognition instances_val2017: image after the first 1 (1)" in printed
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"region_top1", "coco-recognition instances_val2017 top1", "refcoco testA acc50"} <= metrics["a"].keys()
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly", "--data", "x", "--model", "x"], "unknown task 'fly'; there are region-recognition, "),
        (
            ["refcoco", "--data", "coco-recognition=x", "--model", "CLOC"],
            "no data for refcoco: --data refcoco=LOCATION",
        ),
        (["refcoco", "--data", "x", "--model", "CLOC"], "no such file: x/refcoco/refs(unc).p"),
        (["refcoco", "--data", "x", "--model", "CLOC", "CLOC"], "two models of one name"),
        (["imagenet-v2", "--data", "V2", "V2", "--model", "CLIP"], "the same set twice: imagenet-v2, imagenet-v2"),
        (["imagenet-v2", "--data", "V2", "--model", "CLIP", "--regions", "prompter"], "which has no Prompter"),
        (["refcoco", "--data", "x", "--model", "x", "--max-missing", "2"], "max_missing must be in [0, 1], got 2"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: list[str], message: str, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.write_imagenet(tmp_path, {"0": "red"})
    meant = {"CLOC": models[0], "CLIP": models[1], "V2": str(tmp_path)}
    arguments = [meant.get(argument, argument) for argument in arguments]
    try:
        status = main(["eval", *arguments])
    except SystemExit as stop:  # a field out of range, shown in tyro's frame
        status = int(stop.code or 0)
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status != 0
    assert message in error

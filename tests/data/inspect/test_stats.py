"""Figures of a data set: equal to plain counting, the same from sidecars and from the images, safe to print."""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from opencloc.cli import main
from opencloc.data.inspect import stats as stats_module
from opencloc.data.inspect.report import NUM_BINS, ORIENTED, Stats, markdown, plot
from opencloc.data.inspect.stats import StatsConfig, compute_stats, reason_of, write_stats
from opencloc.data.inspect.view import ViewConfig, write_view
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.sources.coco_json import OUTSIDE
from opencloc.data.tars.shards import ShardWriter

TEXTS = ["dog", "red car", "a very long name", "cat | pipe", "<b>$x$</b>", "犬"]


def regions(seed: int, count: int) -> dict[str, Any]:
    """Boxes, texts and scores of some regions."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1e-3], axis=1).clip(0, 1).astype(np.float32)
    texts = tuple(TEXTS[i] for i in rng.integers(0, len(TEXTS), count))
    return {"boxes": boxes, "texts": texts, "scores": rng.uniform(0, 1, count).astype(np.float32)}


def write_tars(folder: Path, counts: list[int], per_shard: int = 3) -> list[Sample]:
    """Samples with so many regions each, written as tars into a folder."""
    samples = [
        Sample(key=f"{i:04d}", image=Image.new("RGB", (8, 6)), captions=(f"caption {i} of a dog",), **regions(i, n))
        for i, n in enumerate(counts)
    ]
    with ShardWriter(str(folder), samples_per_shard=per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return samples


def label_tars(folder: Path, rows: list[SidecarRow], name: str = "vesl", per_shard: int = 3) -> None:
    for number in range(0, len(rows), per_shard):
        path = sidecar_path(str(folder / f"{number // per_shard:05d}.tar"), name)
        write_sidecar(path, rows[number : number + per_shard], {})


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_figures_equal_plain_counting(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    folder = tmp_path_factory.mktemp("tars")
    samples = write_tars(folder, counts)
    found = compute_stats(StatsConfig(data=str(folder)))
    texts = Counter(text for sample in samples for text in sample.texts)
    assert (found.images, found.regions) == (len(counts), sum(counts))
    assert found.images_with_regions == sum(count > 0 for count in counts)
    assert found.regions_per_image == pytest.approx(mean(counts))
    assert found.image_text_tokens == 5
    assert dict(found.top_texts) == texts
    assert found.distinct_texts == len(texts)
    assert found.skipped == {}
    if texts:
        words = sum(len(text.split()) * count for text, count in texts.items())
        assert found.region_text_tokens == pytest.approx(words / texts.total())
    scores = [score for sample in samples if sample.scores is not None for score in sample.scores]
    sides = [
        math.sqrt(max(0.0, (float(x1) - float(x0)) * (float(y1) - float(y0))))
        for sample in samples
        for x0, y0, x1, y1 in sample.boxes
    ]
    for histogram, values in ((found.scores, scores), (found.box_sizes, sides)):
        assert histogram.sum() == len(values)
        cumulated = np.cumsum(histogram)
        for edge in (10, 25, 40):
            assert abs(cumulated[edge - 1] - sum(value < edge / NUM_BINS for value in values)) <= 1
    assert [int(found.region_counts[n]) for n in range(7)] == [counts.count(n) for n in range(7)]


def test_a_sidecar_gives_the_same_figures_as_regions_inside_the_tars(tmp_path: Path) -> None:
    samples = write_tars(tmp_path, [2, 0, 5, 1])
    inside = compute_stats(StatsConfig(data=str(tmp_path)))
    rows = [
        SidecarRow(key=s.key, caption=s.captions[0], boxes=s.boxes, texts=s.texts, scores=np.asarray(s.scores))
        if s.scores is not None
        else SidecarRow(key=s.key, caption=s.captions[0])
        for s in samples
    ]
    label_tars(tmp_path, rows)
    beside = compute_stats(StatsConfig(data=str(tmp_path)))
    assert (inside.labels, beside.labels) == (None, "vesl")
    for name, value in vars(inside).items():
        if name != "labels":
            assert np.array_equal(value, getattr(beside, name)), name


def test_failures_are_counted_by_reason(tmp_path: Path) -> None:
    write_tars(tmp_path, [0] * 6)
    second = tmp_path / "00001.tar"
    with tarfile.open(second) as tar:
        end = tar.getmembers()[-1].offset
    second.write_bytes(second.read_bytes()[:end])  # its last sample loses a member
    errors = ["broken image: 3 bytes", "broken image: 9 bytes: or so", "no caption"]
    rows = [SidecarRow(key=f"{i:04d}", error=error) for i, error in enumerate(errors)]
    label_tars(tmp_path, [*rows, SidecarRow(key="0003", caption="a dog", **regions(1, 2))])
    found = compute_stats(StatsConfig(data=str(tmp_path)))
    assert found.skipped == {"broken image": 2, "no caption": 1, "not in the sidecar": 1, "truncated tar": 1}
    assert (found.images, found.images_with_regions) == (5, 1)
    assert found.regions_per_image == 2  # of the one image that has labels


def test_rare_texts_are_pruned_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = np.asarray([[0, 0, 1, 1]], dtype=np.float32)
    texts = ["common", *"abcdefgh", "common", "common"]
    with ShardWriter(str(tmp_path)) as writer:
        for i, text in enumerate(texts):
            writer.write(Sample(key=str(i), image=Image.new("RGB", (4, 4)), boxes=box, texts=(text,)))
    monkeypatch.setattr(stats_module, "MAX_TEXTS", 4)
    found = compute_stats(StatsConfig(data=str(tmp_path)))
    assert found.pruned
    assert found.top_texts[0] == ("common", 3)
    assert found.distinct_texts <= 4
    assert found.regions == len(texts)
    assert "lower bounds" in markdown(found)


def test_labels_must_be_chosen_where_several_lie_beside_the_images(tmp_path: Path) -> None:
    write_tars(tmp_path, [1])
    label_tars(tmp_path, [SidecarRow(key="0000", **regions(0, 2))], "vesl")
    label_tars(tmp_path, [SidecarRow(key="0000", **regions(0, 3))], "grit")
    with pytest.raises(ValueError, match="has the labels grit, vesl: choose one"):
        compute_stats(StatsConfig(data=str(tmp_path)))
    assert compute_stats(StatsConfig(data=str(tmp_path), sidecar="grit")).regions == 3
    assert compute_stats(StatsConfig(data=f"{tmp_path}?sidecar=vesl")).regions == 2


def test_labels_of_a_folder_in_parts_are_found(tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(images / f"{name}.png")
    for part, key in enumerate("ab"):
        write_sidecar(sidecar_path(str(images), "vesl", part), [SidecarRow(key=key, **regions(part, 2))], {})
    found = compute_stats(StatsConfig(data=str(images)))
    assert (found.labels, found.images, found.regions) == ("vesl", 2, 4)


def test_a_tokenizer_counts_its_own_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]").save_pretrained(tmp_path / "tok")
    write_tars(tmp_path / "tars", [1])
    found = compute_stats(StatsConfig(data=str(tmp_path / "tars"), tokenizer=str(tmp_path / "tok")))
    assert found.image_text_tokens == len("caption 0 of a dog")
    assert "tok" in found.tokens


def test_limit_ends_the_count_early(tmp_path: Path) -> None:
    write_tars(tmp_path, [1, 2, 3, 4])
    assert compute_stats(StatsConfig(data=str(tmp_path), num_images=2)).regions == 3
    label_tars(tmp_path, [SidecarRow(key=f"{i:04d}", **regions(i, i)) for i in range(4)])
    found = compute_stats(StatsConfig(data=str(tmp_path), num_images=3))
    assert (found.images, found.regions, found.skipped) == (3, 3, {})


def test_data_without_images_have_figures_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    spec = f"coco:{tmp_path}?instances={tmp_path}/instances.json"
    assert compute_stats(StatsConfig(data=spec, num_images=3)).images == 0


def test_endless_data_need_a_limit() -> None:
    with pytest.raises(ValueError, match="has no end: set num_images"):
        compute_stats(StatsConfig(data="scenes:easy"))
    assert compute_stats(StatsConfig(data="scenes:easy", num_images=2)).images == 2


@pytest.mark.parametrize(("field", "value"), [("top", 0), ("num_images", 0)])
def test_limits_below_one_are_refused_by_name(field: str, value: int) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}.*\n.*greater than or equal to 1"):
        StatsConfig(data="x", **fields)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("no caption", "no caption"),
        ("broken image: x.jpg: bad", "broken image"),
        ("detector failed (ValueError): too big", "detector failed (ValueError)"),
    ],
)
def test_a_reason_stands_before_the_detail(error: str, reason: str) -> None:
    assert reason_of(error) == reason


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", [2, 30, 0, 150])
    found = write_stats(StatsConfig(data=str(tmp_path / "tars"), out=str(tmp_path / "out"), top=3))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stats.json", "stats.md", "stats.png"]
    values = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert values["regions"] == 182
    assert sum(values["box_sizes"]) == 182
    assert values["region_counts"][-1] == 1  # 150 regions: in the bin for 100 and more
    report = (tmp_path / "out" / "stats.md").read_text()
    assert len(found.top_texts) == 3
    assert "| this data set | 4 | 3 | 182 | 45.50 |" in report
    with Image.open(tmp_path / "out" / "stats.png") as image:
        assert image.width > 1000
        assert np.asarray(image).std() > 10  # something is drawn


def test_texts_cannot_break_the_report(tmp_path: Path) -> None:
    box = np.asarray([[0, 0, 1, 1]] * len(TEXTS), dtype=np.float32)
    with ShardWriter(str(tmp_path)) as writer:
        writer.write(Sample(key="k", image=Image.new("RGB", (4, 4)), boxes=box, texts=(*TEXTS[:-1], "two\nlines")))
    found = compute_stats(StatsConfig(data=str(tmp_path)))
    report = markdown(found)
    table = report[report.index("| text |") : report.index("## Skipped")].strip().splitlines()
    assert len(table) == 2 + len(TEXTS)
    assert r"| cat \| pipe |" in report
    assert "<b>" not in report
    assert "| two lines |" in report
    assert plot(found).startswith(b"\x89PNG")


def test_oriented_images_and_boxes_far_outside_are_counted(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, orientation in (("a", 1), ("b", 6)):
        image = Image.new("RGB", (60, 40))
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image.save(tmp_path / f"images/{name}.jpg", exif=image.getexif())
    box = [30, 20, 59, 39]  # x0, y0, x1, y1
    content = {
        "images": [{"id": i, "file_name": f"{name}.jpg", "width": 60, "height": 40} for i, name in enumerate("ab")],
        "annotations": [{"image_id": i, "category_id": 1, "bbox": box} for i in range(2)],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "annotations/instances_all.json").write_text(json.dumps(content))
    found = compute_stats(StatsConfig(data=str(tmp_path)))
    assert found.noticed == {OUTSIDE: 2, ORIENTED: 1}
    report = markdown(found)
    assert "x0, y0, x1, y1 look like this" in report
    assert "as stored" in report


def test_nothing_in_a_path_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<script>`x` | <b"
    write_tars(folder, [1])
    report = markdown(compute_stats(StatsConfig(data=str(folder))))
    assert "&lt;script&gt;\\`x\\` \\| &lt;b" in report
    assert "<" not in report


def test_a_path_that_is_not_utf_8_is_reported_on(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"tars\xff")
    write_tars(folder, [1])
    write_stats(StatsConfig(data=str(folder), out=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out/stats.json").read_text())["data"] == str(folder)
    write_view(ViewConfig(data=str(folder), out=str(tmp_path / "view.html")))
    assert "tars\\udcff" in (tmp_path / "view.html").read_text()


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", [1])
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "stats.json")
    config = StatsConfig(data=str(tmp_path / "tars"), out=str(out))
    with pytest.raises(OSError, match=r"stats\.json is not a regular file"):
        write_stats(config)
    assert (out / "stats.json").is_fifo()
    (out / "stats.json").unlink()
    write_stats(config)
    assert sorted(path.name for path in out.iterdir()) == ["stats.json", "stats.md", "stats.png"]


def test_the_command_prints_the_folder_then_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tars(tmp_path / "tars", [2, 0, 1])
    out = str(tmp_path / "out")
    assert main(["data", "stats", "--data", str(tmp_path / "tars"), "--out", out]) == 0
    assert capsys.readouterr().out.splitlines() == [out, "3 regions on 2 of 3 images"]


def test_a_data_set_without_labels_has_a_report_too(tmp_path: Path) -> None:
    write_tars(tmp_path, [0, 0])
    found: Stats = write_stats(StatsConfig(data=str(tmp_path), out=str(tmp_path / "out")))
    assert math.isnan(found.region_text_tokens)
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["region_text_tokens"] is None
    assert "| n/a |" in markdown(found)

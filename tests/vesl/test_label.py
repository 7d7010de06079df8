"""One shard through the whole chain: exact with an oracle, and with everything that can be broken in it."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.data.scenes.scenes import SceneConfig, write_scenes
from opencloc.data.sidecar import read_sidecar, sidecar_path, stats_path
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import expand_urls, iter_shard
from opencloc.vesl import engine as engine_module
from opencloc.vesl.config import LabelConfig, config_hash
from opencloc.vesl.detect import Detections, no_detections
from opencloc.vesl.engine import ModelFailure
from opencloc.vesl.filters import FilterConfig
from opencloc.vesl.label import Shard, find_shards, label_shard, load_engine
from opencloc.vesl.phrases import extract_phrases

sys.path.insert(0, str(Path(__file__).parent))  # the oracle and the checkpoints lie beside this file
import oracle
from checkpoints import save_grounding_dino, save_owl


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    """Three tars of four scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(SceneConfig(mode="rich", num_things=120), 12, str(folder), images_per_shard=4)
    return str(folder)


def configure(scenes: str, output: Path, **changes) -> LabelConfig:
    return LabelConfig(**{"data": (scenes,), "out": str(output), "detector": oracle_of(scenes), **changes})


def oracle_of(scenes: str, **options: object) -> str:
    query = "&".join(f"{name}={value}" for name, value in {"shards": scenes, **options}.items())
    return f"{oracle.__file__}:factory?{query}"


def label_all(config: LabelConfig, **options):
    return [label_shard(config, shard, **options) for shard in find_shards(config)]


def labels(config: LabelConfig) -> dict:
    return {key: row for shard in find_shards(config) for key, row in read_sidecar(shard.sidecar).items()}


def samples_of(scenes: str) -> list[Sample]:
    return [item for url in expand_urls(scenes) for item in iter_shard(url) if isinstance(item, Sample)]


def as_regions(boxes, texts) -> set:
    return {(text, *box.tolist()) for box, text in zip(boxes, texts, strict=True)}


def write_tar(path: Path, members: dict[str, bytes], end: bool = True) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if not end:
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    return str(path)


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# The proof


def test_with_an_oracle_detector_and_n_grams_the_chain_recovers_every_region_exactly(scenes: str, tmp_path) -> None:
    config = configure(scenes, tmp_path, phrases="n-grams")
    label_all(config)
    found, samples = labels(config), samples_of(scenes)
    assert list(found) == [sample.key for sample in samples]
    for sample in samples:
        row = found[sample.key]
        assert as_regions(row.boxes, row.texts) == as_regions(sample.boxes, sample.texts)
        assert row.caption == sample.captions[0]
        assert (row.scores == np.float32(oracle.SCORE)).all()
        assert row.error is None


def test_with_an_oracle_detector_and_noun_phrases_it_recovers_exactly_what_the_phrases_name(scenes, tmp_path) -> None:
    config = configure(scenes, tmp_path)
    label_all(config)
    found, recovered, total = labels(config), 0, 0
    for sample in samples_of(scenes):
        phrases = extract_phrases(sample.captions[0])
        named = [i for i, text in enumerate(sample.texts) if text in phrases]
        row = found[sample.key]
        assert as_regions(row.boxes, row.texts) == as_regions(sample.boxes[named], [sample.texts[i] for i in named])
        recovered, total = recovered + len(named), total + len(sample.texts)
    assert recovered / total > 0.8


def test_training_reads_images_and_labels_together(scenes: str, tmp_path: Path) -> None:
    config = configure(scenes, tmp_path, phrases="n-grams")
    label_all(config)
    source = open_source(f"shards:{scenes}?sidecar={tmp_path}/vesl")
    for index, sample in enumerate(samples_of(scenes)):
        assert as_regions(source[index].boxes, source[index].texts) == as_regions(sample.boxes, sample.texts)


# Batching


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_nothing(scenes: str, tmp_path: Path, batch_size: int) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    label_all(configure(scenes, one))
    label_all(configure(scenes, other, batch_size=batch_size))
    for path in one.glob("*.parquet"):
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_a_detector_error_on_one_image_costs_only_that_image(scenes: str, tmp_path: Path) -> None:
    bad = samples_of(scenes)[1].key
    config = configure(scenes, tmp_path, detector=oracle_of(scenes, fail=bad))
    shard = find_shards(config)[0]
    report = label_shard(config, shard)
    rows = read_sidecar(shard.sidecar)
    assert rows[bad].error == f"detector failed (RuntimeError): cannot look at {bad}"
    assert all(row.texts for key, row in rows.items() if key != bad)
    assert report.skipped["detector failed (RuntimeError)"].examples == [bad]
    detector: Any = load_engine(config).detector
    assert [len(batch) for batch in detector.batches] == [4, 1, 1, 1, 1]  # after the batch failed, one by one


def test_a_detector_that_fails_on_everything_gives_up_the_shard_and_writes_nothing(
    scenes: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_FAILURES_IN_A_ROW", 3)
    config = configure(scenes, tmp_path, detector=f"{oracle.__file__}:always_failing")
    with pytest.raises(ModelFailure, match="failed on 3 images in a row, last with RuntimeError: CUDA error"):
        label_all(config)
    assert not list(tmp_path.iterdir())


def test_a_users_detector_that_answers_for_too_few_images_is_asked_one_by_one(scenes: str, tmp_path: Path) -> None:
    config = configure(scenes, tmp_path)
    batches = []

    def detector(images, phrases):
        batches.append(len(images))
        return [no_detections()]

    engine = dataclasses.replace(load_engine(config), detector=detector, batch_size=4)
    assert not label_shard(config, find_shards(config)[0], engine=engine).skipped
    assert batches == [4, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            Detections(boxes=np.array([[0, 0, 1, 1]]), scores=np.array([0.5]), phrase=np.array([99])),
            "detector failed (ValueError): the detector returned phrase numbers 99 to 99 for",
        ),
        ([0, 0, 1, 1], "detector failed (TypeError): the detector returned list instead of Detections"),
    ],
)
def test_a_users_detector_that_breaks_the_protocol_is_an_error_in_the_rows(scenes, tmp_path, answer, error) -> None:
    config = configure(scenes, tmp_path)
    engine = dataclasses.replace(load_engine(config), detector=lambda images, phrases: [answer] * len(images))
    shard = find_shards(config)[0]
    assert sum(one.count for one in label_shard(config, shard, engine=engine).skipped.values()) == 4
    assert all((row.error or "").startswith(error) for row in read_sidecar(shard.sidecar).values())


# Broken input


def test_whatever_is_broken_in_a_tar_is_in_its_row_or_counted_and_the_rest_is_labelled(scenes, tmp_path) -> None:
    good = samples_of(scenes)[0]
    buffer = io.BytesIO()
    good.image.save(buffer, "PNG")
    caption = good.captions[0].encode()
    url = write_tar(
        tmp_path / "mixed.tar",
        {
            "a.png": buffer.getvalue(),
            "a.txt": caption,
            "broken.png": b"no image",
            "broken.txt": caption,
            "silent.png": png(1),
            "wordless.png": png(2),
            "wordless.txt": b"it is what it is",
            "spanish.png": png(5),
            "spanish.txt": b"un perro en la hierba",
            "badjson.png": png(3),
            "badjson.json": b"{",
            "imageless.txt": caption,
            "a.jpg": png(4),  # the key again
            "z.png": buffer.getvalue(),
            "z.txt": caption,
        },
        end=False,
    )
    config = configure(scenes, tmp_path, data=(url,))
    report = label_shard(config, find_shards(config)[0])
    rows = labels(config)
    # The tar has no end, so its last sample may be incomplete and is left out.
    assert list(rows) == ["a", "broken", "silent", "wordless", "spanish", "badjson", "imageless"]
    errors = {key: row.error.partition(": ")[0] for key, row in rows.items() if row.error}
    assert errors == {
        "broken": "broken image",
        "silent": "no caption",
        "spanish": "not English",
        "badjson": "bad json",
        "imageless": "no image",
    }
    assert set(rows["a"].texts) <= set(good.texts)
    assert rows["a"].texts
    assert rows["wordless"].texts == ()
    expected = dict.fromkeys([*errors.values(), "duplicate key", "truncated tar"], 1)
    assert {reason: one.count for reason, one in report.skipped.items()} == expected
    assert (report.images, report.labelled, report.regions) == (7, 2, len(rows["a"].texts))
    assert report.images_without_phrases == 1


def test_what_is_no_tar_is_reported_and_finished(scenes: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 100)
    config = configure(scenes, tmp_path, data=(str(tmp_path / "x.tar"),))
    report = label_shard(config, find_shards(config)[0])
    assert list(report.skipped) == ["not a tar"]
    assert labels(config) == {}


def test_a_tar_that_cannot_be_read_raises_and_leaves_nothing(scenes: str, tmp_path: Path) -> None:
    config = configure(scenes, tmp_path / "out")
    gone = Shard(source=str(tmp_path / "gone.tar"), sidecar=str(tmp_path / "out" / "gone.vesl.parquet"))
    with pytest.raises(FileNotFoundError):
        label_shard(config, gone)
    assert not (tmp_path / "out").exists()


def test_retry_redoes_only_the_rows_with_an_error_and_gives_what_an_untroubled_run_gives(scenes, tmp_path) -> None:
    bad = samples_of(scenes)[2].key
    marks = tmp_path / "marks"
    marks.mkdir()
    config = configure(scenes, tmp_path / "a", detector=oracle_of(scenes, fail=bad, once=marks), batch_size=1)
    shard = find_shards(config)[0]
    detector: Any = load_engine(config).detector
    assert label_shard(config, shard).skipped
    detector.batches.clear()
    report = label_shard(config, shard, retry=True)
    assert detector.batches == [[bad]]
    untroubled = configure(scenes, tmp_path / "b")
    expected = label_shard(untroubled, find_shards(untroubled)[0])
    assert not report.skipped
    for name in ("images", "labelled", "regions", "phrases", "dropped", "images_without_phrases"):
        assert getattr(report, name) == getattr(expected, name)
    assert Path(shard.sidecar).read_bytes() == Path(expected.sidecar).read_bytes()


def test_retry_labels_what_a_repaired_tar_has_gained(scenes: str, tmp_path: Path) -> None:
    samples = samples_of(scenes)[:2]
    members = {}
    for sample in samples:
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        members |= {f"{sample.key}.png": buffer.getvalue(), f"{sample.key}.txt": sample.captions[0].encode()}
    url = write_tar(tmp_path / "x.tar", members, end=False)
    config = configure(scenes, tmp_path, data=(url,))
    (shard,) = find_shards(config)
    assert label_shard(config, shard).images == 1
    write_tar(tmp_path / "x.tar", members)
    report = label_shard(config, shard, retry=True)
    assert (report.images, report.skipped) == (2, {})


# Kinds of input


def test_an_image_folder_is_labelled_in_parts_in_it(scenes: str, tmp_path: Path) -> None:
    folder, samples = tmp_path / "photos", samples_of(scenes)[:5]
    (folder / "sub").mkdir(parents=True)
    for i, sample in enumerate(samples):
        sample.image.save(folder / "sub" / f"{i}.png")
        (folder / "sub" / f"{i}.txt").write_text(sample.captions[0])
    (folder / "sub" / "2.png").write_bytes(b"broken")
    config = LabelConfig(data=(str(folder),), detector=oracle_of(scenes), shard_size=2, phrases="n-grams")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    label_all(config)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert sorted(path.name for path in folder.glob("*.parquet")) == [f"photos-0000{i}.vesl.parquet" for i in range(3)]
    assert {path: path.read_bytes() for path in before} == before
    source = open_source(f"folder:{folder}?sidecar=vesl")
    assert isinstance(source, ImageFolder)
    assert not source.skipped
    for i in (0, 1, 3, 4):
        assert as_regions(source[i].boxes, source[i].texts) == as_regions(samples[i].boxes, samples[i].texts)
    assert labels(config)["sub/2"].error.startswith("broken image")


def test_a_coco_folder_is_labelled_from_its_captions(scenes: str, tmp_path: Path) -> None:
    samples = samples_of(scenes)[:3]
    (tmp_path / "coco" / "images").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir()
    images, captions = [], []
    for i, sample in enumerate(samples):
        sample.image.save(tmp_path / "coco" / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        captions.append({"id": i, "image_id": i, "caption": sample.captions[0]})
    annotations = tmp_path / "coco" / "annotations"
    (annotations / "instances_x.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    (annotations / "captions_x.json").write_text(json.dumps({"images": images, "annotations": captions}))
    spec = f"coco:{tmp_path}/coco?split=x"
    config = configure(scenes, tmp_path / "out", data=(spec,), phrases="n-grams")
    label_all(config)
    source = open_source(f"{spec}&sidecar={tmp_path}/out/vesl")
    for i, sample in enumerate(samples):
        assert as_regions(source[i].boxes, source[i].texts) == as_regions(sample.boxes, sample.texts)


def test_tars_at_an_fsspec_url_are_labelled_beside_themselves(scenes: str) -> None:
    memory = fsspec.filesystem("memory")
    for url in expand_urls(scenes):
        memory.pipe_file(f"/bucket/{Path(url).name}", Path(url).read_bytes())
    config = LabelConfig(data=("memory://bucket/{00000..00002}.tar",), detector=oracle_of(scenes), phrases="n-grams")
    label_all(config)
    found = read_sidecar("memory://bucket/00001.vesl.parquet")
    samples = samples_of(scenes)[4:8]
    assert [found[sample.key].texts != () for sample in samples] == [True] * 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("scenes:easy",), "labels can be made for tars, image folders and COCO folders, not for scenes"),
        (("shards:{scenes}?sidecar=x",), "take no options, got sidecar"),
        (("{scenes}", "{scenes}/00001.tar"), "would both be labelled in"),
    ],
)
def test_input_that_cannot_be_labelled_is_refused_with_the_reason(scenes: str, tmp_path, data, message: str) -> None:
    specs = tuple(spec.replace("{scenes}", scenes) for spec in data)
    with pytest.raises(ValueError, match=message):
        find_shards(configure(scenes, tmp_path, data=specs))


# Models


@pytest.mark.parametrize("save", [save_owl, save_grounding_dino])
def test_a_checkpoint_labels_a_shard(scenes: str, tmp_path: Path, save) -> None:
    path = save(tmp_path / "model")
    config = configure(
        scenes,
        tmp_path,
        detector=str(path),
        resolution=96,
        precision="fp32",
        device="cpu",
        filters=FilterConfig(score=0.01),
    )
    shard = find_shards(config)[0]
    report = label_shard(config, shard)
    rows = read_sidecar(shard.sidecar)
    assert not report.skipped
    assert report.models["detector"] == f"{path}, 96 px, fp32"
    for row in rows.values():
        assert row.caption is not None
        assert set(row.texts) <= set(extract_phrases(row.caption))
    assert sum(len(row.texts) for row in rows.values()) == report.regions > 0


def test_a_caption_or_key_that_cannot_be_written_is_counted(scenes: str, tmp_path: Path, monkeypatch) -> None:
    config = configure(scenes, tmp_path)
    captions = iter(["a dog \ud800", "a dog", "a cat", "a tree"])

    class Captioner:
        model_id = "broken"

        def caption(self, samples):
            return [next(captions) for _ in samples]

    engine = dataclasses.replace(load_engine(config), captioner=Captioner())
    report = label_shard(config, find_shards(config)[0], engine=engine)
    assert {reason: one.count for reason, one in report.skipped.items()} == {"not Unicode": 1}


def test_the_stats_of_a_shard_say_how_it_was_made(scenes: str, tmp_path: Path) -> None:
    config = configure(scenes, tmp_path)
    shard = find_shards(config)[0]
    report = label_shard(config, shard)
    stats = json.loads(Path(stats_path(shard.sidecar)).read_text())
    assert shard.sidecar == sidecar_path(f"{scenes}/00000.tar", f"{tmp_path}/vesl")
    assert stats["config_hash"] == config_hash(config)
    assert stats["models"]["detector"] == "oracle"
    assert stats["images"] == report.images == 4
    assert set(stats["seconds"]) == {"caption", "detect", "filter", "phrases", "total", "wait"}

"""Broken images and data sets, and what must hold for each."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from opencloc.data.batch import collate, join
from opencloc.data.sample import Sample, encode_record, parse_record
from opencloc.data.sidecar import SidecarRow, read_sidecar, write_sidecar
from opencloc.data.sources.coco import Coco, CocoConfig, read_coco
from opencloc.data.sources.spec import open_source, take
from opencloc.data.stream import TrainingExamples
from opencloc.data.tars.shards import Shards, index_shard, iter_shard
from opencloc.errors import BadSample
from opencloc.eval.sets import captions, coco, flickr_entities, grit, open_images, panoptic, refcoco, statements
from opencloc.eval.sets.item import IMAGES, EvalSet, Unread, load
from opencloc.images import decode_image, is_oriented
from tests.eval import sets_on_disk as on_disk
from tests.fuzz.mutate import broken_bytes, broken_json
from tests.fuzz.world import Refused, World, check, check_boxes, check_unit, refusing

RECORD = {
    "caption": ["a red dog and a blue cat", "two animals"],
    "alt_text": "IMG 1",
    "url": "http://example.com/1.jpg",
    "regions": [
        {"box": [0.1, 0.2, 0.5, 0.9], "text": "red dog", "score": 0.9},
        {"box": [0.5, 0.0, 1.0, 1.0], "text": "blue cat", "score": 0.4},
    ],
}


def images(world: World, rng: Random) -> None:
    """image files: JPEG, PNG, WebP, GIF, BMP, AVIF and others, in many modes"""
    data = broken_bytes(rng.choice(world.images), rng)
    is_oriented(data)
    with refusing("photo.jpg"):
        image = decode_image(data, "photo.jpg", rng.choice((None, 8, 32)))
    check(image.mode == "RGB" and min(image.size) >= 1, f"{image.mode} of {image.size}")
    check_unit(world.predictor.encode(data).features.embedding, 1)


@dataclass(frozen=True)
class _Two:
    """A source of a broken sample and a sound one."""

    image: Image.Image
    json_bytes: bytes | None
    text: bytes | None
    size: int = 2

    def __getitem__(self, index: int) -> Sample:
        if index == 1:
            return Sample(key="b", image=self.image, captions=("a dog",))
        record = parse_record("photo.json", self.json_bytes, self.text)
        return Sample(key="photo", image=self.image, where="photo.json", **record)


def records(world: World, rng: Random) -> None:
    """.json and .txt beside an image, through the training stream"""
    json_bytes = broken_json(RECORD, rng) if rng.random() < 0.8 else None
    text = rng.choice((None, broken_bytes("a dog, é".encode(), rng)))
    source = _Two(world.image, json_bytes, text)
    examples = TrainingExamples([source], [1.0], num_regions=3, image_size=32, seed=0)
    parts = [examples[position] for position in range(2)]
    batch = join([collate(parts, world.predictor.processor)], world.predictor.processor, torch.device("cpu"))
    check_boxes(batch.boxes.numpy())
    check(
        batch.pixel_values is not None and bool(torch.isfinite(batch.pixel_values).all()), "pixels that are not finite"
    )
    with refusing("photo"):
        sample = source[0]
        check(not batch.skipped or not (sample.captions or sample.alt_text or sample.texts), "a sound sample skipped")
        again = parse_record("again", encode_record(sample), None)
        check(again["texts"] == sample.texts and (again["boxes"] == sample.boxes).all(), "another record read back")
        if batch.skipped:
            raise Refused
    check(not batch.skipped, "a sound sample skipped")


def _seen(data: EvalSet) -> Counter[str]:
    """Images, boxes and texts of a set, all of which are sound; images that are gone are counted."""
    seen: Counter[str] = Counter()
    unread = Unread(allowed=10**9)
    for loaded in (one for batch in load(data, None, 4, unread) for one in batch):
        check_boxes(loaded.item.boxes)
        for truth in loaded.item.truths:
            check_boxes(truth)
        seen["images"] += 1
    assert data.num_items is not None
    check(seen["images"] + unread.reasons.total() == data.num_items, f"{seen} and {unread.reasons} of {data.num_items}")
    return seen


def annotation_files(world: World, rng: Random) -> None:
    """annotations of COCO, LVIS, Open Images, Karpathy, FG-OVD, SugarCrepe, VSR, RefCOCO, Flickr30k Entities"""
    name, file = rng.choice(
        (
            ("coco", "annotations/instances_val2017.json"),
            ("coco", "annotations/captions_val2017.json"),
            ("lvis", "lvis_v1_val.json"),
            ("fg_ovd", "benchmarks/1_attributes.json"),
            ("karpathy", "dataset_coco.json"),
            ("flickr", "dataset_flickr30k.json"),
            ("mdetr", "finetune_refcoco_val.json"),
            ("refer", "refcoco/instances.json"),
            ("refer", "refcoco/refs(unc).p"),
            ("entities", "Annotations/36979.xml"),
            ("entities", "Sentences/36979.txt"),
            ("entities", "test.txt"),
            ("panoptic", "annotations/panoptic_val2017.json"),
            ("panoptic", "annotations/panoptic_val2017/000000000001.png"),
            ("open_images", "validation-annotations-bbox.csv"),
            ("open_images", "class-descriptions-boxable.csv"),
            ("sugarcrepe", "data/add_att.json"),
            ("vsr", "data/splits/random/test.jsonl"),
        )
    )
    with world.fresh(world.sets / name) as folder:
        path, sound = folder / file, (folder / file).read_bytes()
        if file.endswith(".json"):
            path.write_bytes(broken_json(json.loads(sound), rng))
        elif file.endswith(".p") and rng.random() < 0.7:
            path.write_bytes(pickle.dumps(json.loads(_readable(broken_json(on_disk.refs(), rng)))))
        else:
            path.write_bytes(broken_bytes(sound, rng))
        _read_set(name, file, folder)


def _read_set(name: str, file: str, folder: Path) -> None:
    location, path = str(folder), str(folder / file)
    readers: dict[str, Callable[[str], EvalSet]] = {
        "coco": captions.coco_retrieval if "captions" in file else coco.coco_recognition,
        "lvis": coco.lvis_recognition,
        "fg_ovd": coco.fg_ovd,
        "karpathy": captions.coco_retrieval,
        "flickr": captions.flickr30k_retrieval,
        "mdetr": refcoco.refcoco,
        "refer": refcoco.refcoco,
        "entities": flickr_entities.flickr30k_entities,
        "panoptic": panoptic.coco_panoptic,
        "open_images": open_images.open_images_recognition,
        "sugarcrepe": statements.sugarcrepe,
        "vsr": statements.vsr,
    }
    with refusing(location):
        data = readers[name](location)
        _seen(data)
    left_out = sum(number for (unit, _), number in data.skipped.items() if unit == IMAGES)
    if file.endswith(".json") and name in ("coco", "lvis", "fg_ovd"):
        content = json.loads(Path(path).read_bytes())
        assert data.num_items is not None
        check(data.num_items + left_out == len(content["images"]), "images neither used nor counted")
    if "captions" not in file and name in ("coco", "lvis"):
        read = read_coco(path)
        counted = sum(n for why, n in read.skipped.items() if why not in ("bad file name", "bad image size"))
        check(len(read.boxes) + counted == len(content["annotations"]), "boxes neither used nor counted")
        check_boxes(read.boxes)
    if name == "coco":
        with refusing(location):
            source = Coco(location, CocoConfig(images=f"{location}/val2017"))
        samples, skipped = take(source, 10**6)
        check(len(samples) + skipped.total() == source.size, "samples neither used nor counted")


def _tar(world: World, rng: Random) -> bytes:
    """A tar of samples, sometimes with odd names, members missing, doubled or in another order."""
    members = [(f"{number:04d}.{kind}", data) for number in range(3) for kind, data in (
        ("jpg", world.images[0]), ("json", json.dumps(RECORD).encode()), ("txt", b"a dog"))]  # fmt: skip
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        place = rng.randrange(len(members))
        name, data = members[place]
        odd = rng.choice(("", ".jpg", "a/b/0001.jpg", "../../evil.jpg", "/abs/evil.json", "x" * 300 + ".jpg", "é.jpg",
                          "0001.JPG", "0001.seg.png", "0002.jpg", "a\nb.jpg", "\udcff.txt", "0001/", name))  # fmt: skip
        broken = broken_json(RECORD, rng) if name.endswith("json") else broken_bytes(data, rng)
        members[place] = rng.choice(((odd, data), (name, broken)))
        if rng.random() < 0.3:
            members.insert(rng.randrange(len(members)), members[place])
        if rng.random() < 0.1:
            rng.shuffle(members)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = rng.choice((tarfile.REGTYPE,) * 30 + (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE))
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tars(world: World, rng: Random) -> None:
    """tars, with img2dataset's _stats.json beside them"""
    with world.fresh() as folder:
        path, data = folder / "00000.tar", _tar(world, rng)
        path.write_bytes(broken_bytes(data, rng) if rng.random() < 0.7 else data)
        if rng.random() < 0.4:
            stats = {"count": 3, "successes": 3, "failed_to_download": 0, "duration": 1.5}
            (folder / "00000_stats.json").write_bytes(broken_json(stats, rng))
        streamed, index = list(iter_shard(str(path))), index_shard(str(path))
        of_tar = Counter(one.reason for one in streamed if isinstance(one, BadSample) and one.where == str(path))
        problems = Counter(index.problems)
        imageless = problems.pop("no image", 0)
        check(of_tar == problems, f"problems {of_tar} when streamed, {problems} when indexed")
        check(len(streamed) - of_tar.total() == len(index.keys) + imageless, "another number of samples when streamed")
        with refusing(folder):
            source = Shards(str(path))
        samples, skipped = take(source, 10**6)
        check(len(samples) + skipped.total() == source.size >= 1, "samples neither used nor counted")
        sound = sum(isinstance(one, Sample) for one in streamed)
        check(len(samples) <= sound, f"{len(samples)} samples by number, {sound} when streamed")


def grit_sets(world: World, rng: Random) -> None:
    """GRIT: tars, their JSON and Parquet"""
    with world.fresh() as folder:
        spans = json.loads(_readable(broken_json(on_disk.grit_row("0")["noun_chunks"], rng)))
        on_disk.write_grit(folder, parquet=rng.random() < 0.4, spans=spans)
        for path in sorted(folder.iterdir()):
            if rng.random() < 0.4:
                path.write_bytes(broken_bytes(path.read_bytes(), rng))
        with refusing(folder):
            data = grit.grit_retrieval(str(folder), texts=rng.choice(grit.COLUMNS))
            _seen(data)


def _readable(data: bytes) -> bytes:
    """The JSON, or an empty list where nothing can be read."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return b"[]"
    return data


def sidecars(world: World, rng: Random) -> None:
    """labels in Parquet beside an image folder"""
    with world.fresh() as folder:
        for key in ("a", "b"):
            (folder / f"{key}.jpg").write_bytes(world.images[0])
        path = folder / f"{folder.name}.vesl.parquet"
        boxes = np.array([[0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]], dtype=np.float32)
        rows = [SidecarRow(key=key, caption="c", boxes=boxes, texts=("a dog", "x"), scores=np.ones(2)) for key in "ab"]
        write_sidecar(str(path), rows, {})
        if rng.random() < 0.5:
            path.write_bytes(broken_bytes(path.read_bytes(), rng))
        else:
            columns = pq.read_table(path).to_pydict()
            with contextlib.suppress(ValueError, RecursionError):
                columns = json.loads(broken_json(columns, rng))
            with contextlib.suppress(pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
                pq.write_table(pa.table(columns), path)
        with refusing(path):
            found = read_sidecar(str(path))
            source = open_source(f"folder:{folder}?sidecar=vesl")
        check(len(found) == pq.read_table(path).num_rows, "rows neither read nor counted")
        for row in found.values():
            check_boxes(row.boxes)
        samples, skipped = take(source, 10)
        check(len(samples) + skipped.total() == 2, "samples neither used nor counted")

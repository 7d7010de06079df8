"""The kinds of broken input, and what must hold for each: a sound result, or an error that names file or argument."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import shutil
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import opencloc
from opencloc.config import DataConfig, ModelConfig, TrainConfig, from_json, to_json
from opencloc.data.batch import collate, join
from opencloc.data.sample import Sample, encode_record, parse_record
from opencloc.data.sidecar import SidecarRow, read_sidecar, write_sidecar
from opencloc.data.sources.coco import Coco, CocoConfig, read_coco
from opencloc.data.sources.spec import open_source, take
from opencloc.data.stream import TrainingExamples
from opencloc.data.tars.shards import Shards, index_shard, iter_shard
from opencloc.errors import BadSample
from opencloc.eval.sets import captions, coco, flickr_entities, grit, refcoco
from opencloc.eval.sets.item import IMAGES, EvalSet, Unread, load
from opencloc.images import decode_image, is_oriented
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.predictor import Predictor
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.model.prompts import Box, Mask, Point, Text
from opencloc.train.build import tower_config
from opencloc.vesl.config import LabelConfig
from tests.eval import sets_on_disk as on_disk
from tests.fuzz.mutate import ODD, broken_bytes, broken_json

TINY = ModelConfig(
    image_size=32, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2, text_width=32, text_layers=1,
    text_heads=2, text_length=16, embed_dim=24, vocab_size=300,
)  # fmt: skip
RECORD = {
    "caption": ["a red dog and a blue cat", "two animals"],
    "alt_text": "IMG 1",
    "url": "http://example.com/1.jpg",
    "regions": [
        {"box": [0.1, 0.2, 0.5, 0.9], "text": "red dog", "score": 0.9},
        {"box": [0.5, 0.0, 1.0, 1.0], "text": "blue cat", "score": 0.4},
    ],
}


class Refused(Exception):
    """The input was refused, as it may be."""


class World:
    """What the inputs are broken versions of, made once in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        tokenizer = train_tokenizer(["a red dog and a blue cat", "two trains in the snow"] * 5, 300, 16)
        torch.manual_seed(0)
        clip = tower_config(TINY, tokenizer)
        model, processor = ClocModel(ClocConfig(clip_config=clip)), ClocProcessor.for_towers(clip, tokenizer)
        self.predictor = Predictor(model, processor)
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
        self.photo = self.predictor.encode(self.image)
        self.images = _image_files(self.image)
        self.checkpoints = [folder / "cloc", folder / "clip"]
        for part in (model, processor):
            part.save_pretrained(self.checkpoints[0])
        for part in (model.clip, tokenizer):
            part.save_pretrained(self.checkpoints[1])
        self.sets = folder / "sets"
        on_disk.write_coco(self.sets / "coco")
        on_disk.write_lvis(self.sets / "lvis")
        on_disk.write_fg_ovd(self.sets / "fg_ovd")
        on_disk.write_karpathy(self.sets / "karpathy", "coco")
        on_disk.write_karpathy(self.sets / "flickr", "flickr30k")
        on_disk.write_refer(self.sets / "refer")
        on_disk.write_mdetr(self.sets / "mdetr")
        on_disk.write_entities(self.sets / "entities")
        on_disk.write_grit(self.sets / "grit", parquet=True)

    @contextlib.contextmanager
    def fresh(self, copy_of: Path | None = None) -> Iterator[Path]:
        """A new folder, a copy of another one if that is given, which is removed after use."""
        self._count += 1
        folder = self.folder / f"{self._count:06d}"
        if copy_of is None:
            folder.mkdir()
        else:
            shutil.copytree(copy_of, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Kind:
    share: int  # of 100 inputs
    attempt: Callable[[World, Random], None]  # raises Refused, or whatever is a finding


@contextlib.contextmanager
def refusing(*names: object) -> Iterator[None]:
    """Turns an error of a documented type, whose message holds one of the names, into `Refused`."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        is_ours = isinstance(error, BadSample) or type(error) in (ValueError, TypeError)
        if is_ours:  # raised by a line of ours, not by a library below
            is_ours = "/opencloc/" in traceback.extract_tb(error.__traceback__)[-1].filename
        if not is_ours and not (isinstance(error, OSError) and type(error).__module__ == "builtins"):
            raise
        if not any(str(name) in str(error) for name in names):
            raise AssertionError(f"the error names none of {names}: {error!r}") from error
        raise Refused from error


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def check_unit(embeddings: Tensor, count: int) -> None:
    check(len(embeddings) == count, f"{len(embeddings)} embeddings of {count}")
    norms = embeddings.detach().float().norm(dim=-1)
    check(bool(torch.isfinite(embeddings).all() and ((norms - 1).abs() < 1e-3).all()), "embeddings of another length")


def check_boxes(boxes: Any, what: str = "boxes") -> None:
    boxes = np.asarray(boxes).reshape(-1, 4)
    inside = (boxes >= -1e-6).all() and (boxes <= 1 + 1e-6).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    check(bool(inside), f"{what} outside the image or empty: {boxes.tolist()}")


# -- images ------------------------------------------------------------------------------------------------------------


def _image_files(image: Image.Image) -> list[bytes]:
    rgba = image.copy()
    rgba.putalpha(100)
    deep = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [
        (image, "JPEG", {}),
        (image, "JPEG", {"exif": exif, "progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
    ]
    forms += [(one, "PNG", {}) for one in (image, rgba, deep, image.convert("LA"), image.convert("1"))]
    forms += [(image.quantize(16), "PNG", {"transparency": 3}), (image, "WEBP", {}), (rgba, "WEBP", {"lossless": True})]
    forms += [(image, "GIF", {"save_all": True, "append_images": [rgba.convert("RGB")]}), (image, "BMP", {})]
    forms += [(image, "AVIF", {}), (image, "TIFF", {}), (image, "PPM", {})]  # the last two are not read
    found = []
    for one, form, options in forms:
        buffer = io.BytesIO()
        one.save(buffer, form, **options)
        found.append(buffer.getvalue())
    return found


def images(world: World, rng: Random) -> None:
    """image files: JPEG, PNG, WebP, GIF, BMP, AVIF and others, in many modes"""
    data = broken_bytes(rng.choice(world.images), rng)
    is_oriented(data)
    with refusing("photo.jpg"):
        image = decode_image(data, "photo.jpg", rng.choice((None, 8, 32)))
    check(image.mode == "RGB" and min(image.size) >= 1, f"{image.mode} of {image.size}")
    check_unit(world.predictor.encode(data).features.embedding, 1)


# -- data --------------------------------------------------------------------------------------------------------------


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
    check(bool(torch.isfinite(batch.pixel_values).all()), "pixels that are not finite")
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
    """annotations of COCO, LVIS, Karpathy, FG-OVD, RefCOCO, Flickr30k Entities"""
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


# -- configurations and checkpoints ------------------------------------------------------------------------------------


def configs(world: World, rng: Random) -> None:
    """configuration files of training and labelling"""
    train = TrainConfig(model=TINY, data=DataConfig(train=("scenes:easy",), weights=(1.0,)), steps=10, batch_size=8)
    sound = rng.choice((train, LabelConfig(data=("photos",), detector="owl")))
    data = broken_json(asdict(sound), rng)
    with refusing("config.json"):
        config = from_json(type(sound), data, "config.json")
    json.dumps(asdict(config), allow_nan=False)
    check(from_json(type(sound), to_json(config), "again") == config, "another configuration read back")
    if isinstance(config, TrainConfig) and all(
        number <= 4096 and (number <= 16 or "layers" not in name)
        for name, number in asdict(config.model).items()
        if type(number) is int
    ):
        with refusing("model.", "Prompter", "vision tower"):
            clip = tower_config(config.model, world.predictor.processor.tokenizer)
            model = ClocModel(ClocConfig(clip_config=clip, prompter=config.model.prompter))
        check(all(bool(torch.isfinite(value).all()) for value in model.parameters()), "weights that are not finite")


def checkpoints(world: World, rng: Random) -> None:
    """checkpoints: configuration, processor, tokenizer, weights"""
    with world.fresh(rng.choice(world.checkpoints)) as folder:
        path = rng.choice(sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors")))
        _break_checkpoint(path, rng)
        with refusing(folder):
            predictor = opencloc.load(folder)
        with refusing("weights are damaged", "Prompter was never trained"):
            photo = predictor.encode(world.image)
            check_unit(photo.features.embedding, 1)
            check_unit(predictor.embed_texts(["a dog", "a cat"]), 2)
            check_unit(predictor.embed(photo, boxes_px=[[0, 0, 10, 10]]), 1)


def _break_checkpoint(path: Path, rng: Random) -> None:
    if rng.random() < 0.05:
        path.unlink()
    elif path.suffix == ".json":
        path.write_bytes(broken_json(json.loads(path.read_bytes()), rng))
    elif rng.random() < 0.5:
        path.write_bytes(broken_bytes(path.read_bytes(), rng))
    else:
        weights = load_file(path)
        name = rng.choice(sorted(weights))
        weight = weights.pop(name)
        match rng.randrange(6):
            case 0:
                weights[name] = torch.full_like(weight, rng.choice((float("nan"), float("inf"))))
            case 1:
                weights[f"module.{name}"] = weight
            case 2:
                weights[name] = torch.cat([weight.reshape(-1), weight.reshape(-1)])
            case 3:
                weights[name] = weight.to(rng.choice((torch.float16, torch.int8, torch.float64, torch.bool)))
            case 4:
                weights[name] = weight[:0] if weight.ndim else weight[None]
        save_file(weights, path, metadata={"format": "pt"})


# -- calls -------------------------------------------------------------------------------------------------------------


def _value(rng: Random) -> Any:
    return rng.choice((*ODD[:-1], np.nan, 1j, b"a", object(), torch.tensor(0.5), torch.tensor([1 + 2j]), np.int64(3)))


def _number(rng: Random) -> Any:
    return rng.choice((0, 1, 5, 10, 20.5, 24, 40, 40.3, -0.2, 41, 1e9)) if rng.random() < 0.85 else _value(rng)


def _boxes(rng: Random, count: int = 4) -> Any:
    if rng.random() < 0.15:
        return _value(rng)
    rows = [[_number(rng) for _ in range(count + (rng.random() < 0.03))] for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if rng.random() < 0.5:
        rows = [[1, 1, 20, 20][:count] for _ in rows]
    as_type: Any = rng.choice((list, list, tuple, np.array, torch.tensor))
    try:
        return as_type(rows)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return rows


def _text(rng: Random) -> Any:
    return (
        rng.choice(("a dog", "two  trains", "e\u0301", "<end> a", "dog " * 50, "狗"))
        if rng.random() < 0.8
        else _value(rng)
    )


def _texts(rng: Random) -> Any:
    if rng.random() < 0.2:
        return _text(rng)
    return rng.choice((list, tuple))(_text(rng) for _ in range(rng.choice((0, 1, 2, 3))))


def _mask(rng: Random) -> Any:
    if rng.random() < 0.2:
        return _value(rng)
    shape = rng.choice(((24, 40), (24, 40), (24, 40), (40, 24), (1, 24, 40), (0, 40)))
    mask = np.random.default_rng(rng.getrandbits(32)).integers(0, 2, shape)
    odd = rng.choice((1, 1, 255, 7, -1, 0.5, np.nan, 1e30))
    kind = rng.choice((bool, np.uint8, np.float32, np.int64, object, str))
    with np.errstate(all="ignore"):
        mask = (mask * odd).astype(kind)
    return rng.choice((lambda m: m, np.flipud, lambda m: m.tolist(), lambda m: torch.tensor(m.tolist())))(mask) if (
        kind in (bool, np.uint8, np.float32)) else mask  # fmt: skip


def _prompt(rng: Random, deep: int = 0) -> Any:
    match rng.randrange(7):
        case 0:
            return Box(*(_number(rng) for _ in range(4)))
        case 1:
            return Point(_number(rng), _number(rng))
        case 2:
            return Mask(_mask(rng))
        case 3:
            return Text(rng.choice((_text(rng), torch.randn(24), torch.randn(7), torch.full((24,), torch.nan))))
        case 4 if deep < 2:
            return tuple(_prompt(rng, deep + 1) for _ in range(rng.randrange(4)))
        case 5:
            return _value(rng)
        case _:
            return rng.choice((Box(1, 1, 20, 20), Point(3, 3), Text("a dog"), (Box(1, 1, 20, 20), Text("a dog"))))


def _prompts(rng: Random) -> Any:
    return [_prompt(rng) for _ in range(rng.choice((0, 1, 2)))] if rng.random() < 0.8 else _prompt(rng)


def _pixels(rng: Random) -> Any:
    shape = rng.choice(((24, 40, 3), (3, 24, 40), (24, 40), (24, 40, 4), (1, 1, 3), (0, 4, 3), (2, 3, 24, 40), ()))
    kind = rng.choice((np.uint8, np.uint8, np.uint8, np.float32, bool, np.int64, np.complex64))
    array = (np.random.default_rng(rng.getrandbits(32)).random(shape) * 255).astype(kind)
    return rng.choice((array, torch.tensor(array), array.tolist(), _value(rng), "nothere.jpg", "\0.jpg"))


def calls(world: World, rng: Random) -> None:
    """arguments of Predictor, ClocModel and ClocProcessor"""
    predictor, photo, model = world.predictor, world.photo, world.predictor.model
    about = ("image", "box", "point", "mask", "text", "prompt", "names", "labels", "scores", "nothere", "[Errno", "Box",
             "Point")  # fmt: skip
    with refusing(*about):
        match rng.randrange(9):
            case 0:
                encoded = predictor.encode(_pixels(rng))
                for one in encoded if isinstance(encoded, list) else [encoded]:
                    check_unit(one.features.embedding, 1)
            case 1:
                texts = _texts(rng)
                check_unit(predictor.embed_texts(texts), 1 if isinstance(texts, str) else len(texts))
            case 2:
                boxes, points = _boxes(rng), _boxes(rng, 2)
                found = predictor.embed(photo, boxes_px=boxes, points_px=points)
                check_unit(found, len(boxes) + len(points))
            case 3:
                masks, texts = [_mask(rng)], _texts(rng)
                found = predictor.embed(photo, masks=masks, texts=texts)
                check_unit(found, 1 + (1 if isinstance(texts, str) else len(texts)))
            case 4:
                prompts = _prompts(rng)
                found = predictor.embed(photo, prompts)
                check_unit(found, len(prompts) if isinstance(prompts, list) else len(found))
            case 5:
                boxes, names = _boxes(rng), _texts(rng)
                best, probabilities = predictor.classify(photo, boxes, names)
                check(bool(np.isfinite(probabilities).all()), "probabilities that are not finite")
                check(len(best) == len(boxes) or not len(names), "boxes without a name")
            case 6:
                boxes, scores = predictor.ground(photo, _texts(rng))
                check(bool(np.isfinite(boxes).all() and ((scores >= 0) & (scores <= 1)).all()), "boxes or scores odd")
                check(bool((boxes >= 0).all() and (boxes <= [40, 24, 40, 24]).all()), "boxes outside the image")
            case 7:
                prompts = rng.choice(([_prompts(rng)], torch.rand(1, 2, 4), torch.tensor([[[0.1, 0.1, 0.5, 0.5]]]),
                                      [torch.rand(2, 4)], _value(rng)))  # fmt: skip
                for rows in model.encode_regions(photo.features, prompts):
                    check_unit(rows, len(rows))
            case _:
                boxes, labels = _boxes(rng), _texts(rng)
                check(predictor.draw(photo, boxes, labels, rng.choice((None, [0.5], _value(rng)))).size == (40, 24), "")


def specs(world: World, rng: Random) -> None:
    """sources as they are named on the command line and in configurations"""
    folder = world.sets / "coco"
    sound = rng.choice((
        "scenes:rich?num_things=12&seed=1", "scenes:easy?max_objects=4&split=unseen_things",
        f"coco:{folder}?split=val2017",
        f"folder:{folder}/val2017", f"{folder}/val2017", f"shards:{world.sets}/grit/{{00000..00003}}.tar",
        f"mosaic:folder:{folder}/val2017?grid=2-3", f"crops:coco:{folder}?split=val2017?seed=1",
        f"{world.sets}/grit/00000.tar?cache_gb=1",
    ))  # fmt: skip
    start = rng.randrange(max(0, sound.find("/sets")), len(sound) + 1) if rng.random() < 0.6 else sound.find("=") + 1
    odd = (
        str(rng.choice(ODD[:-1]))
        if rng.random() < 0.5
        else rng.choice(("?", "&", "=", ":", "{", "}", "..", ",", "*", "-1", "e9"))
    )
    spec = sound[:start] + odd + sound[start + rng.choice((0, 0, 1, 3)) :]
    if "://" in spec:
        spec = sound
    with refusing(*(part for part in re.split(r"[:?{}*\[\]\0\s]", spec) if len(part) > 3)):
        source = open_source(spec)
    try:
        sample = source[0]
    except BadSample as error:
        raise Refused from error
    check(sample.image.mode == "RGB", sample.image.mode)
    check_boxes(sample.boxes)


KINDS: dict[str, Kind] = {
    "images": Kind(share=24, attempt=images),
    "records": Kind(share=16, attempt=records),
    "annotations": Kind(share=16, attempt=annotation_files),
    "tars": Kind(share=9, attempt=tars),
    "grit": Kind(share=4, attempt=grit_sets),
    "sidecars": Kind(share=7, attempt=sidecars),
    "configs": Kind(share=7, attempt=configs),
    "checkpoints": Kind(share=4, attempt=checkpoints),
    "calls": Kind(share=10, attempt=calls),
    "specs": Kind(share=3, attempt=specs),
}

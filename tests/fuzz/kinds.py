"""The kinds of broken input, and what must hold for each: a sound result, or an error that names file or argument.

Images and data are in `data.py`; here are configurations, checkpoints, calls, and the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import opencloc
from opencloc.config import DataConfig, TrainConfig, from_json, to_json
from opencloc.data.sources.spec import open_source
from opencloc.errors import BadSample
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.prompts import Box, Mask, Point, Text
from opencloc.train.build import tower_config
from opencloc.vesl.config import LabelConfig
from tests.fuzz.data import annotation_files, grit_sets, images, records, sidecars, tars
from tests.fuzz.mutate import ODD, broken_bytes, broken_json
from tests.fuzz.world import TINY, Refused, World, check, check_boxes, check_unit, refusing


@dataclass(frozen=True, kw_only=True)
class Kind:
    share: int  # of 100 inputs
    attempt: Callable[[World, Random], None]  # raises Refused, or whatever is a finding


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
    with refusing(*(part for part in re.split(r"[:?{}*\[\]\s]|[^ -~]", spec) if len(part) > 3)):
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

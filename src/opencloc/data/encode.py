"""Images encoded once by a checkpoint's vision tower, into tars of features (`opencloc data features`).

Training that leaves the tower frozen reads them in place of the images (`opencloc.data.sources.features`).  A source of
tars gets a tar of features for each, of the same name, so that labels beside its tars fit these too; the images of
other sources are cut into tars of 1,000.  A tar appears when it is whole, then its `_stats.json`, which says that it is
done.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from opencloc import files
from opencloc.config import Count, Strict, Whole, changed_fields, from_json, to_json
from opencloc.data.loader import make_loader
from opencloc.data.sample import Source, encode_record
from opencloc.data.sources.features import INFO, FeaturesInfo
from opencloc.data.sources.labelled import left_out
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import OF_A_FILE, Shards
from opencloc.data.tars.tar import FEATURES
from opencloc.data.tars.urls import UNFINISHED
from opencloc.data.tars.writer import TarWriter
from opencloc.devices import Precision, computes_in_bf16
from opencloc.errors import BadSample, and_skipped, redacted
from opencloc.images import letterbox_array
from opencloc.model import towers
from opencloc.model.fingerprint import vision_tower_id
from opencloc.model.loading import load_config
from opencloc.model.predictor import Predictor, load
from opencloc.model.prompter import PROMPTERS
from opencloc.progress import Meter

SAMPLES_PER_TAR = 1000  # of sources that are no tars
MAX_ATTEMPTS = 3  # at a tar whose source cannot be read
NOT_FINITE = "features are not finite in float16"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Strict):
    """Images encoded once, for training that leaves the vision tower frozen.

    `opencloc train ... --optim.lr-factors.vision 0 --data.train features:OUT` then neither decodes images nor runs the
    tower.  An image takes about 300 KB at ViT-B/16 and 224 pixels (196 tokens of 768 float16 numbers).
    """

    model: str
    """Folder or hub id of the CLOC, CLIP, SigLIP or SigLIP 2 checkpoint that training will start from."""
    data: str
    """The images and their labels: a folder, tars, or any `KIND:LOCATION?key=value`, as training would read them."""
    out: str
    """Folder for the tars, on this machine; holds none yet, or those of the same command when it was stopped."""
    prompter: Literal["cross", "encoder", "roi", "pool", "pool_cross"] | None = None
    """The Prompter that will be trained; None: the checkpoint's own, of others `cross`.  For `pool` and `pool_cross`
    on a CLIP twice as much is stored."""
    num_images: Count | None = None
    """How many images, the first ones; None: all of a source that has an end."""
    batch_size: Count = 64
    """Images encoded at once."""
    num_workers: Whole = 1
    """Processes that decode images; 0 decodes in this one."""
    precision: Precision = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 where the hardware has it, as in training."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER or auto."""


@dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """What a folder of features holds."""

    images: int
    tars: int
    num_bytes: int  # of the tars
    skipped: Counter[str]  # by reason
    failed: dict[str, str] = field(default_factory=dict)  # tars that are missing -> why, after all attempts

    @property
    def exit_code(self) -> int:
        """Exit status of the command: 1 if a tar is missing."""
        return 1 if self.failed else 0

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e9:.2f} GB, {self.num_bytes / self.images / 1e3:.0f} KB per image"
        lines = [f"features of {self.images:,} images in {self.tars:,} tars, {size}{and_skipped(self.skipped)}"]
        if self.failed:
            lines += [*_given_up(self.failed), "Run the same command again to go on; finished tars are kept."]
        return "\n".join(lines)


def _given_up(failed: Mapping[str, str]) -> list[str]:
    count = f"{len(failed):,} tar{'' if len(failed) == 1 else 's'} given up:"
    return [count, *(redacted(f"  {tar}: {why}") for tar, why in failed.items())]


@dataclass(frozen=True, kw_only=True)
class TarStats(Strict):
    """What the `_stats.json` of a tar says."""

    successes: Whole  # samples in it (`opencloc.data.tars.index` reads this)
    skipped: dict[str, int]  # by reason


def encode(config: EncodeConfig) -> EncodeReport:
    """Writes the features and says what is there; a finished folder of the same command is left as it is.

    A sample that cannot be used is left out and counted.  A tar whose source cannot be read is tried `MAX_ATTEMPTS`
    times, again after the others; the report names it, training does without it, and the same command makes it later.
    Run again after it was stopped, the same command goes on after the last whole tar, and ends with the same files.

    Raises as `open_source` and `opencloc.load`, `FileExistsError` if the folder holds something else, `ValueError` if
    some of the source's tars cannot be counted, none of the images can be used or another process writes there.
    """
    predictor = load(config.model, config.device)
    source = open_source(config.data, image_px=predictor.processor.image_size)
    if isinstance(source, Shards) and (unknown := source.unknown):  # the numbers of all later samples depend on them
        raise ValueError(f"{config.data}: {len(unknown)} of {len(source.urls)} tars cannot be read, first {unknown[0]}")
    size = source.size if config.num_images is None else min(config.num_images, source.size or config.num_images)
    if size is None:
        raise ValueError(f"{config.data} has no end: say how many images by --num-images")
    info, out = _info(config, predictor, size), Path(config.out)
    tars = _tars(source, size, out)
    with files.held(out, "another process is writing in this folder"):
        _check_folder(out, info)
        files.sweep(out)
        failed: dict[str, str] = {}
        if todo := {path: numbers for path, numbers in tars.items() if _done(path) is None}:
            files.write_text(out / UNFINISHED, to_json(info))
            failed = _write(config, predictor, source, info, todo)
        else:
            print(f"{out} is finished: nothing is left to do", file=sys.stderr)
        done = [stats for stats in map(_done, tars) if stats is not None]
        images = sum(one.successes for one in done)
        skipped = sum((Counter(one.skipped) for one in done), left_out(source))
        if not images:
            for leftover in [*map(_stats, tars), out / UNFINISHED]:
                leftover.unlink(missing_ok=True)
            why = "\n".join([and_skipped(skipped), *(_given_up(failed) if failed else [])])
            raise ValueError(f"{config.data}: none of {size:,} images can be used{why}")
        files.write_text(out / INFO, to_json(info))
        (out / UNFINISHED).unlink(missing_ok=True)
    made = [path.stat().st_size for path in tars if path.exists()]
    skipped = Counter(dict(skipped.most_common()))
    return EncodeReport(images=images, tars=len(made), num_bytes=sum(made), skipped=skipped, failed=failed)


def _info(config: EncodeConfig, predictor: Predictor, size: int) -> FeaturesInfo:
    """What `features.json` will say."""
    model, processor = predictor.model, predictor.processor
    clip: Any = model.config.clip_config
    is_cloc = load_config(config.model).model_type == "cloc"
    prompter = config.prompter or (model.config.prompter if is_cloc else "cross")
    width, num_patches = clip.vision_config.hidden_size, model.grid[0] * model.grid[1]
    shapes = {"tokens": (num_patches, width), "embedding": (model.embed_dim,)}
    if PROMPTERS[prompter].reads_pool_input and not towers.pools_tokens(clip):
        shapes["pool_input"] = (num_patches + 1, width)
    return FeaturesInfo(
        model=config.model,
        vision_tower=vision_tower_id(model.clip),
        image_size=processor.image_size,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        grid=model.grid,
        shapes=shapes,
        precision="bf16" if computes_in_bf16(config.precision, model.device) else "fp32",
        data=redacted(config.data),
        num_images=size,
    )


def _tars(source: Source, size: int, out: Path) -> dict[Path, range]:
    """The tars to be made, and the numbers of the samples of each."""
    if not isinstance(source, Shards):
        starts = range(0, size, SAMPLES_PER_TAR)
        return {out / f"{i:05d}.tar": range(n, min(n + SAMPLES_PER_TAR, size)) for i, n in enumerate(starts)}
    ends = np.minimum(np.cumsum(source.counts), size).tolist()
    names = [url.rsplit("/", 1)[-1] for url in source.urls]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-][\w.-]*\.tar", name) for name in names):
        names = [f"{i:05d}.tar" for i in range(len(names))]  # from several folders, or of URLs with more than a name
    numbers = map(range, [0, *ends[:-1]], ends)
    return {out / name: own for name, own in zip(names, numbers, strict=True) if own}


def _stats(path: Path) -> Path:
    return path.with_name(f"{path.stem}_stats.json")


def _done(path: Path) -> TarStats | None:
    """What is in a tar; None if it is still to be made, or again, since it is gone or its figures are damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        stats = from_json(TarStats, _stats(path).read_bytes(), path)
        return stats if path.exists() or not stats.successes else None


def _check_folder(out: Path, info: FeaturesInfo) -> None:
    """Raises `FileExistsError` if the folder holds anything else than such features, finished or not."""
    for path in (out / UNFINISHED, out / INFO):
        if path.exists():
            try:
                changed = changed_fields(from_json(FeaturesInfo, path.read_bytes(), path), info)
            except ValueError:
                raise FileExistsError(f"{path} is not what this command writes: choose an empty folder") from None
            if changed:
                lines = "\n".join(f"  {field}: {values}" for field, values in changed.items())
                raise FileExistsError(f"{out} holds other features; choose an empty folder\n{lines}")
            return
    if tar := next(out.glob("*.tar"), None):
        raise FileExistsError(f"{out} holds tars already ({tar.name}, ...): choose an empty folder")


# -- encoding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Image:
    """An image made ready, and what is stored beside its features."""

    number: int
    key: str
    record: bytes
    size_px: tuple[int, int]
    square: UInt8[np.ndarray, "S S 3"]


class _Images(Dataset[_Image | BadSample]):
    """Number of a sample -> its image, or why it cannot be used."""

    def __init__(self, source: Source, image_size: int) -> None:
        self.source, self.image_size = source, image_size

    def __getitem__(self, number: int) -> _Image | BadSample:
        try:
            sample = self.source[number]
        except BadSample as bad:
            return bad
        return _Image(
            number=number,
            key=sample.key,
            record=encode_record(sample),
            size_px=sample.size_px,
            square=letterbox_array(sample.image, self.image_size),
        )


def _write(
    config: EncodeConfig, predictor: Predictor, source: Source, info: FeaturesInfo, todo: Mapping[Path, range]
) -> dict[str, str]:
    """Makes the tars, and says of which none could be made, and why."""
    done, failed = info.num_images - sum(map(len, todo.values())), dict[Path, str]()
    if done:
        print(f"{config.out}: going on at image {done:,} of {info.num_images:,}", file=sys.stderr)
    with Meter("encoding", info.num_images, start=done) as meter:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            failed.clear()
            for path, problem in _attempt(config, predictor, source, info, todo, meter):
                print(redacted(f"{path}: attempt {attempt} of {MAX_ATTEMPTS} failed: {problem}"), file=sys.stderr)
                failed[path] = problem
            if not failed:
                break
            todo = {path: todo[path] for path in failed}
    return {str(path): problem for path, problem in failed.items()}


def _attempt(
    config: EncodeConfig,
    predictor: Predictor,
    source: Source,
    info: FeaturesInfo,
    todo: Mapping[Path, range],
    meter: Meter,
) -> Iterator[tuple[Path, str]]:
    """Makes the tars; those of which none can be made come out, each with the reason."""
    size = config.batch_size
    order = [own[i : i + size] for own in todo.values() for i in range(0, len(own), size)]
    images = _Images(copy.copy(source), info.image_size)  # a copy remembers no unreadable files
    made = iter(make_loader(images, order, num_workers=config.num_workers))
    for path, numbers in todo.items():
        batches, before = itertools.islice(made, math.ceil(len(numbers) / size)), meter.done
        try:
            stats = _write_tar(path, batches, predictor, info, meter)
        except BadSample as bad:
            for _ in batches:  # of this tar
                pass
            meter.advance(before - meter.done)
            yield path, str(bad)
        else:
            files.write_text(_stats(path), to_json(stats))


def _write_tar(
    path: Path, batches: Iterable[list[_Image | BadSample]], predictor: Predictor, info: FeaturesInfo, meter: Meter
) -> TarStats:
    """Makes one tar.  Raises `BadSample` if not a sample but a file of many cannot be read."""
    skipped = Counter[str]()
    with TarWriter(str(path)) as tar:
        for batch in batches:
            for bad in batch:
                if isinstance(bad, BadSample):
                    if bad.reason in OF_A_FILE:
                        raise bad
                    skipped[bad.reason] += 1
            images = [one for one in batch if isinstance(one, _Image)]
            for image, features in zip(images, _features(predictor, images, info), strict=True):
                if features is None:
                    skipped[NOT_FINITE] += 1
                else:
                    _add(tar, image, features)
            meter.advance(len(batch))
    return TarStats(successes=len(tar.keys), skipped=dict(skipped))


def _add(tar: TarWriter, image: _Image, features: Mapping[str, Tensor]) -> None:
    """Adds an image's features and record, under another key where the tar cannot have its own."""
    members = {FEATURES: save({**features, "size_px": torch.tensor(image.size_px, dtype=torch.int32)})}
    members["json"] = image.record
    try:
        tar.add(image.key, members)
    except ValueError:
        tar.add(f"sample-{image.number}", members)


@torch.no_grad()
def _features(predictor: Predictor, images: Sequence[_Image], info: FeaturesInfo) -> Iterator[dict[str, Tensor] | None]:
    """The tensors of each image as they are stored; None where one of their numbers is none, or too large."""
    if not images:
        return
    clip, device = predictor.model.clip, predictor.model.device
    squares = torch.from_numpy(np.stack([image.square for image in images])).to(device)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=info.precision == "bf16"),
        towers.recorded_pool_input(clip) as pool_inputs,
    ):
        pooled, tokens = towers.vision_forward(clip, predictor.processor.normalize(squares))
    made = {"tokens": tokens, "embedding": F.normalize(pooled.float(), dim=-1), "pool_input": pool_inputs[0]}
    stored = {name: made[name].to(torch.float16) for name in info.shapes}
    sound = torch.stack([value.flatten(1).isfinite().all(dim=1) for value in stored.values()]).all(dim=0).tolist()
    stored = {name: value.cpu().contiguous() for name, value in stored.items()}
    for row, is_sound in enumerate(sound):
        yield {name: value[row] for name, value in stored.items()} if is_sound else None

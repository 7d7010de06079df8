"""Configuration of a labelling run, and the manifest that keeps labels of different configurations apart."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from opencloc import files
from opencloc.config import Strict
from opencloc.devices import Precision
from opencloc.errors import redacted
from opencloc.vesl.captioners import CaptionConfig
from opencloc.vesl.filters import FilterConfig

_VERSIONS_OF = ("opencloc", "torch", "transformers", "nltk", "numpy", "pillow", "pyarrow")
# What may differ between runs that write labels of one name: where the data is and how fast it goes.
_NOT_HASHED = ("data", "out", "name", "device", "batch_size")
_CAPTIONS_NOT_HASHED = ("batch_size", "device", "concurrency", "retries", "timeout_s", "api_key_env")


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Strict):
    """What is labelled, and how.  The defaults are the paper's (section 3.3), on existing captions.

    Raises ValueError, naming the field, for values out of range.
    """

    data: tuple[str, ...]
    """Tars (`DIR`, `{00000..00099}.tar`, `s3://...`), image folders or COCO folders (`coco:DIR?split=train`)."""
    detector: str
    """Step 3: folder or hub id of an OWLv2, OWL-ViT or Grounding DINO checkpoint (published:
    google/owlv2-large-patch14-ensemble), or your own detector as `FILE.py:FACTORY?key=value`."""
    out: str | None = None
    """Folder for the labels.  By default they lie beside the tars or the COCO JSON, or in the image folder."""
    name: str = "vesl"
    """Name of these labels; several may lie side by side."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """Step 1."""
    phrases: Literal["nouns", "n-grams"] = "nouns"
    """Step 2: noun phrases, or the n-gram baseline of OWL-ST.  Both are for English captions; others are counted as
    `not English` and get no labels."""
    max_phrases: int | None = None
    """Most phrases per image; by default the published 20 noun phrases or 300 n-grams."""
    resolution: int = 448
    """Long side of the detector's input in pixels."""
    precision: Precision = "auto"
    """Of the detector.  `auto`: bf16 where the hardware has it."""
    device: str = "auto"
    """Where the detector runs: `auto` (the GPU if there is one), `cpu`, `cuda:1`, ..."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which detections become regions."""
    image_px: int = 1024
    """JPEGs are decoded no larger than needed for a long side of this many pixels."""
    batch_size: int = 16
    """Images per pass of the detector."""
    shard_size: int = 1000
    """Images per shard of an image folder or COCO JSON; a tar is always one shard."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one input")
        if not self.name or "/" in self.name or "." in self.name:
            raise ValueError(f"name must be a plain word such as 'vesl' without '/' or '.', got {self.name!r}")
        for name in ("resolution", "image_px", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_px < self.resolution:
            raise ValueError(f"image_px must be at least resolution ({self.resolution}), got {self.image_px}")
        if self.max_phrases is not None and self.max_phrases < 1:
            raise ValueError(f"max_phrases must be at least 1, got {self.max_phrases}")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that have a say in the labels."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


def recipe(config: LabelConfig) -> dict[str, Any]:
    """The part of the configuration that decides what the labels are.

    A caption server's address is left out where the model is named by `server_model`: it changes with every job.
    Passwords and keys are left out.
    """
    parts = {name: value for name, value in asdict(config).items() if name not in _NOT_HASHED}
    captions = {name: value for name, value in parts["captions"].items() if name not in _CAPTIONS_NOT_HASHED}
    if config.captions.uses_server and config.captions.server_model:
        captions["captioner"] = "server"
    return parts | {"captions": captions, "detector": redacted(config.detector)}


def config_hash(config: LabelConfig) -> str:
    """16 hexadecimal digits of the recipe."""
    return hashlib.sha256(json.dumps(recipe(config), sort_keys=True).encode()).hexdigest()[:16]


def manifest_path(folder: str, name: str) -> str:
    """Where the manifest of the labels `name` of a folder lies."""
    return f"{folder}/{name}_manifest.json" if folder else f"{name}_manifest.json"


def write_manifests(config: LabelConfig, folders: Iterable[str]) -> list[str]:
    """Paths of the manifests written: one into every folder that gets labels, unless it is there and agrees.

    Raises ValueError, naming the manifest and every field that differs, if the labels of this name were made with
    another recipe.
    """
    written = []
    for folder in folders:
        path = manifest_path(folder, config.name)
        if files.exists(path):
            _check_manifest(path, config)
            continue
        shown = asdict(config)
        shown |= {"data": [redacted(spec) for spec in config.data], "detector": redacted(config.detector)}
        shown["out"] = None if config.out is None else redacted(config.out)
        content = {
            "name": config.name,
            "config": shown,
            "recipe": recipe(config),
            "config_hash": config_hash(config),
            "versions": versions(),
        }
        files.write_json(path, content)
        written.append(path)
    return written


def _check_manifest(path: str, config: LabelConfig) -> None:
    try:
        manifest = json.loads(files.read_bytes(path))
        theirs = manifest["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of labels ({error!r})") from error
    ours = json.loads(json.dumps(recipe(config)))
    if differing := _differences(theirs, ours):
        raise ValueError(
            f"{path}: the labels {config.name!r} there were made with another configuration. Choose another name, or "
            "remove them.\n" + "\n".join(f"  {line}" for line in differing)
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `field: theirs there, ours here` for what differs."""
    lines = []
    for name in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} there, {b!r} now")
    return lines

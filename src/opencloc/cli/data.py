"""Verbs that make and look at data sets: data scenes, stats, view, check, pack, features, cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from opencloc.cli.arguments import group, parse


def scenes(arguments: list[str]) -> None:
    """Write generated scenes as shards"""
    from opencloc.data.scenes.scenes import SceneConfig, write_scenes

    @dataclass(frozen=True, kw_only=True)
    class Out:
        """Where the tars go."""

        out: str
        """Folder for the tars."""
        num_images: int = 1000
        images_per_shard: int = 1000

    parsed = parse(group("WriteScenes", out=Out, scenes=SceneConfig), arguments, "data scenes")
    out = parsed.out
    paths = write_scenes(parsed.scenes, out.num_images, out.out, out.images_per_shard)
    print(out.out)
    print(f"{out.num_images:,} images in {len(paths):,} tars")


def stats(arguments: list[str]) -> None:
    """Figures of a labelled data set: counts, lengths, histograms, frequent texts"""
    from opencloc.data.inspect.stats import StatsConfig, write_stats
    from opencloc.errors import and_skipped, counted

    config = parse(StatsConfig, arguments, "data stats")
    stats = write_stats(config)
    print(config.out)
    images = f"{stats.images_with_regions:,} of {stats.images:,} images"
    print(f"{stats.regions:,} regions on {images}{and_skipped(stats.skipped)}")
    if stats.noticed:
        print(
            f"opencloc data stats: worth a look: {counted(stats.noticed)}; see {config.out}/stats.md", file=sys.stderr
        )


def view(arguments: list[str]) -> None:
    """An HTML contact sheet with boxes and texts drawn on the images"""
    from opencloc.data.inspect.view import ViewConfig, write_view
    from opencloc.errors import and_skipped

    config = parse(ViewConfig, arguments, "data view")
    sheet = write_view(config)
    print(config.out)
    print(f"{sheet.regions:,} regions on {sheet.images:,} images{and_skipped(sheet.skipped)}")


def check(arguments: list[str]) -> None:
    """Look at a data set before training: counts, skips, suspicious boxes, a picture of samples"""
    from opencloc.data.inspect.check import CheckConfig, write_check
    from opencloc.errors import and_skipped

    config = parse(CheckConfig, arguments, "data check")
    found = write_check(config)
    print(config.out)
    images = f"{found.stats.images_with_regions:,} of {found.stats.images:,} images read"
    print(f"{found.stats.regions:,} regions on {images}{and_skipped(found.stats.skipped)}")
    for one in found.suspicions:
        print(f"opencloc data check: SUSPICIOUS: {one.what} ({one.share:.0%}): {one.advice}", file=sys.stderr)
    if not found.suspicions:
        print(f"Nothing suspicious; look at {config.out}/samples.png all the same.")


def pack_shards(arguments: list[str]) -> None:
    """Write images and their labels as self-contained shards"""
    from opencloc.data.inspect.pack import PackConfig, pack

    config = parse(PackConfig, arguments, "data pack")
    report = pack(config)
    print(f"{config.out}\n{report}")


def features(arguments: list[str]) -> int:
    """Encode images once by a checkpoint's vision tower, for training that leaves it frozen"""
    from transformers.utils.logging import disable_progress_bar

    from opencloc.data.encode import EncodeConfig, encode

    config = parse(EncodeConfig, arguments, "data features")
    disable_progress_bar()  # transformers' own
    report = encode(config)
    print(f"{config.out}\n{report}")
    return report.exit_code


def cache(arguments: list[str]) -> None:
    """Show or clear the cache of remote tars: its place, its size"""
    from opencloc.data.tars.cache import CacheConfig, cache_report

    print(cache_report(parse(CacheConfig, arguments, "data cache")))

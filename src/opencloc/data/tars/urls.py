"""Which tars a pattern means: files, folders, globs and brace ranges, local or at an fsspec URL.  Reads no tar."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from opencloc import files

UNFINISHED = "_unfinished.json"  # in a folder of tars while it is being written
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")


def expand_urls(pattern: str | Sequence[str], *, must_exist: bool = True) -> list[str]:
    """The tars that a pattern means, in order.

    A pattern is a file, a folder (its `*.tar`), a glob, or any of these with braces (`{00000..00007}.tar`, `{a,b}`), on
    this machine or at an fsspec URL; or several of them.  A file or folder of exactly that name goes before a pattern.
    Unless `must_exist`, a name that ends in `.tar` is taken as it is, without a look: at many remote shards each look
    is a request.

    Raises `FileNotFoundError` naming what is not there, and `ValueError` for a brace range that runs backwards or a
    folder whose writing was not finished.
    """
    if not isinstance(pattern, str):
        return [url for one in pattern for url in expand_urls(one, must_exist=must_exist)]
    found: list[str] = []
    urls = [pattern] if "{" not in pattern or files.exists(pattern) else _expand_braces(pattern)
    listings: dict[str, Collection[str]] = {}  # folder -> names: of many tars not every one is asked for
    for url in urls:
        is_name = url.endswith(".tar") and not re.search(r"[*?\[]", url)
        if is_name and (not must_exist or (len(urls) > 1 and _is_listed(url, listings))):
            found.append(url)
        elif files.is_folder(url):
            inside = files.children(url)
            tars = [path for path in inside if path.endswith(".tar")]
            if any(os.path.basename(path) == UNFINISHED for path in inside):
                raise ValueError(_not_finished(url))
            if not tars:
                raise FileNotFoundError(f"{url}: no *.tar in this folder")
            found += tars
        elif files.exists(url):
            found.append(url)
        elif re.search(r"[*?\[]", url):
            tars = files.glob(url)
            if not tars:
                raise FileNotFoundError(f"{url}: no file matches")
            for folder in sorted({os.path.dirname(tar) for tar in tars}):
                if files.exists(os.path.join(folder, UNFINISHED)):
                    raise ValueError(_not_finished(folder))
            found += tars
        else:
            raise FileNotFoundError(f"{url}: no such shard" + (f" (from {pattern})" if url != pattern else ""))
    return found


def _is_listed(url: str, listings: dict[str, Collection[str]]) -> bool:
    """Whether a file of this name is in the listing of its folder, which is made once."""
    folder, name = os.path.split(url)
    if folder not in listings:
        listings[folder] = files.versions(folder) or ()
    return name in listings[folder]


def _not_finished(folder: str) -> str:
    return f"{folder} was not finished ({UNFINISHED} lies in it): run the command that writes it again, or delete it"


def _expand_braces(pattern: str) -> list[str]:
    if not (match := _BRACES.search(pattern)):
        return [pattern]
    if span := _RANGE.match(match[1]):
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"{pattern}: range {{{match[1]}}} runs backwards")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    tails = _expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{choice}{tail}" for choice in choices for tail in tails]

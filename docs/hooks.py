"""Lets the pages of docs/ link to files elsewhere in the repository: the site gets a copy of what they link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")  # out of docs/
ANY_LINK = re.compile(r"(?<=\]\()[^)#\s:]+")


def target(page: str, link: str) -> str | None:
    """Where the link of a page leads, relative to the repository; None if that is a page of docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return path if not path.startswith(("docs/", "..")) and (ROOT / path).is_file() else None


def on_files(files: Files, config: Any) -> Files:
    """Adds every file that some page links to, and what those link to in turn."""

    def add(path: str) -> None:
        if files.get_file_from_path(path) is not None:
            return
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
        if path.endswith(".md"):
            for link in ANY_LINK.findall((ROOT / path).read_text()):
                beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
                if (ROOT / beside).is_file():
                    add(beside)

    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            if (path := target(page.src_uri, link)) is not None:
                add(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points those links at the copies."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        path = target(here, link[0])
        return link[0] if path is None else posixpath.relpath(path, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)

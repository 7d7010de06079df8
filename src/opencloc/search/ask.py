"""`opencloc search`: a question as the command line puts it, and the answer as a table, JSON or a sheet of photos."""

from __future__ import annotations

import base64
import importlib.resources
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opencloc import files
from opencloc.config import Count, Share, Strict
from opencloc.search.query import Found, Library, PerPhoto, Row


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Strict):
    """A question to a library: texts, an image or a region of it, and what they add up to."""

    index: str
    """The library that `opencloc index` made."""
    text: tuple[str, ...] = ()
    """What to look for; several texts are added up."""
    image: str | None = None
    """A photo to look for; with a text both are added up."""
    box: tuple[float, float, float, float] | None = None
    """X0 Y0 X1 Y1 in pixels: the region of the photo to look for."""
    minus: tuple[str, ...] = ()
    """What it should not be like."""
    folder: str | None = None
    """Only photos under this folder."""
    after: str | None = None
    """Only photos taken on this day or later, as 2026-01-31."""
    before: str | None = None
    """Only photos taken before this day."""
    min_area: Share = 0.0
    """Smallest region, as a share of the photo."""
    max_area: Share = 1.0
    """Largest region, as a share of the photo."""
    per_photo: PerPhoto = "best"
    """The best region of each photo, or all regions."""
    top: Count = 10
    """How many regions."""
    exact: bool = False
    """Look at all regions even where there is an approximate index."""
    json: bool = False
    """Print JSON instead of a table."""
    html: str | None = None
    """Write a sheet of the photos with the regions outlined, too."""
    model: str | None = None
    """The library's model, where it lies elsewhere now."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER or auto."""


def run_search(config: SearchConfig) -> Found:
    """What a question finds.  Raises as `Library.open`, `Library.search` and `opencloc.images.open_image`."""
    after, before = _day("after", config.after), _day("before", config.before)
    return Library.open(config.index, model=config.model, device=config.device).search(
        config.text,
        image=config.image,
        box_px=config.box,
        minus=config.minus,
        folder=config.folder,
        after=after,
        before=before,
        min_area=config.min_area,
        max_area=config.max_area,
        per_photo=config.per_photo,
        top=config.top,
        exact=config.exact,
    )


def _day(name: str, text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, not a day as 2026-01-31") from None


def headline(found: Found) -> str:
    """What was found, in one line."""
    photos = f"{found.searched:,} photo{'' if found.searched == 1 else 's'}"
    if not found.rows:
        return f"Nothing found for {found.query}: no region of the {photos} passes the filters."
    best = found.rows[0].score
    if found.nothing:
        return (
            f"Nothing found for {found.query} in {photos}: the best score is {best:.2f}, "
            f"which is there with a probability of {found.presence:.0%}. The nearest are:"
        )
    sure = "" if found.presence is None else f"; it is there with a probability of {found.presence:.0%}"
    return f"{found.query} in {photos}: the best score is {best:.2f}{sure}."


def print_table(found: Found, console: Console | None = None) -> None:
    """Prints what was found, one region to a row."""
    console = console or Console()
    console.print(Text(headline(found)))
    if not found.rows:
        return
    table = Table(box=box.SIMPLE)
    for name, justify in (("score", "right"), ("box in pixels", "left"), ("taken", "left"), ("photo", "left")):
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name != "photo")  # pyright: ignore
    for row in found.rows:
        gone = "" if row.is_there else "  (gone since)"
        place = Text(row.photo + "".join(f"\n{path}" for path in row.also) + gone)
        table.add_row(f"{row.score:.3f}", " ".join(map(str, row.box_px)), day(row), place)
    console.print(table)


def day(row: Row) -> str:
    """The day a photo was taken on; empty where nobody knows."""
    return "" if row.date is None else f"{row.date:%Y-%m-%d}"


def to_json(found: Found) -> str:
    """What was found as JSON."""
    return json.dumps(
        {
            "query": found.query,
            "nothing_found": found.nothing,
            "presence": found.presence,
            "searched": found.searched,
            "rows": [
                {
                    "photo": row.photo,
                    "box_px": row.box_px,
                    "box": [round(edge, 6) for edge in row.box],
                    "score": round(row.score, 6),
                    "presence": row.presence,
                    "also": row.also,
                    "date": row.date and row.date.isoformat(),
                    "width_px": row.width_px,
                    "height_px": row.height_px,
                    "is_there": row.is_there,
                }
                for row in found.rows
            ],
        },
        ensure_ascii=False,
        indent=2,
    )


def write_html(found: Found, out: str) -> None:
    """Writes a sheet of the photos with the regions outlined: one file that needs and loads nothing else."""
    text = importlib.resources.files("opencloc.search").joinpath("sheet.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(text).render(headline=headline(found), cards=[_card(row) for row in found.rows])
    with files.new_file(Path(out)) as partial:
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")


def _card(row: Row) -> dict[str, Any]:
    x0, y0, x1, y1 = (round(100 * edge, 3) for edge in row.box)
    return {
        "image": "data:image/jpeg;base64," + base64.b64encode(row.thumbnail).decode("ascii"),
        "left": x0,
        "top": y0,
        "width": round(x1 - x0, 3),
        "height": round(y1 - y0, 3),
        "score": f"{row.score:.3f}",
        "photo": row.photo,
        "box_px": ", ".join(map(str, row.box_px)),
        "date": day(row),
        "is_there": row.is_there,
        "also": row.also,
    }

"""Answers for people and programs: a table in the terminal, JSON, and an HTML sheet of the photos with their regions."""

from __future__ import annotations

import base64
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opencloc import files
from opencloc.search.query import Found, Row


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
        table.add_row(f"{row.score:.3f}", " ".join(map(str, row.box_px)), f"{row.date:%Y-%m-%d}", place)
    console.print(table)


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
                    "date": row.date.isoformat(),
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
        "date": f"{row.date:%Y-%m-%d}",
        "is_there": row.is_there,
        "also": row.also,
    }

"""`opencloc app`: a web page on this machine alone, to try regions, find phrases and search a library.

This file is the page; what it does is in `page.py`.  Nothing is loaded from or sent to other machines.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from opencloc.config import Strict
from opencloc.errors import redacted
from opencloc.search.ask import day, headline
from opencloc.search.index import load_predictor
from opencloc.search.page import MAX_UPLOAD_MB, NAMES, Desk, Session, back, numbers, outlined
from opencloc.search.query import Library

HOST = "127.0.0.1"
KEEP_S = 3600  # pictures of the page are deleted after that
CSS = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main.contain, .gradio-container main { width: 100%; min-width: 0; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important; height: auto; }
#gallery img { object-fit: contain !important; }
#gallery .grid-wrap { max-height: none; overflow: visible; }
#gallery .caption-label { white-space: normal; overflow-wrap: anywhere; }
table td, table th { font-family: inherit !important; overflow-wrap: anywhere; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container { padding: 10px !important; } }
"""
FONT = ["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"]


@dataclass(frozen=True, kw_only=True)
class AppConfig(Strict):
    """A page on http://127.0.0.1:PORT, for this machine alone."""

    index: str | None = None
    """A library that `opencloc index` made, for the tab Library."""
    model: str | None = None
    """Folder or hub id of a model; none: the library's own, without a library the packaged `tiny`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port; 0: any that is free."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER or auto."""


def run_app(config: AppConfig) -> None:
    """Serves the page until Ctrl-C, and prints its address.  Raises as `Library.open` and `opencloc.load`."""
    address, close, wait = start_app(config)
    print(address, flush=True)
    print("The page is for this machine alone. Ctrl-C ends it.", flush=True)
    try:
        wait()
    finally:
        close()


def start_app(config: AppConfig) -> tuple[str, Callable[[], None], Callable[[], None]]:
    """(address of the page, what closes it, what waits for Ctrl-C), once it answers.

    Raises as `run_app`, and OSError where the port is taken.
    """
    gradio = _gradio()
    library = None if config.index is None else Library.open(config.index, model=config.model, device=config.device)
    model = library.predictor if library is not None else load_predictor(config.model or "tiny", config.device)
    page = build(gradio, Desk(model, library), _title(config))
    theme = gradio.themes.Default(font=FONT, font_mono=FONT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Gradio itself uses
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=config.port or _free_port(),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            max_file_size=f"{MAX_UPLOAD_MB}mb",
            theme=theme,
            css=CSS,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            strict_cors=True,
        )
    return address, page.close, page.block_thread


def _gradio() -> Any:
    """Gradio, told to keep to itself.  Raises ValueError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import gradio
    except ImportError as error:
        raise ValueError("the page needs the extra `app`: pip install 'opencloc[app]'") from error
    return gradio


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


def _title(config: AppConfig) -> str:
    return "opencloc" if config.index is None else f"opencloc: {Path(redacted(config.index)).name}"


def build(gradio: Any, desk: Desk, title: str) -> Any:
    """The page, not yet served."""
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP_S, KEEP_S)) as page:
        session = gradio.State(Session(), time_to_live=KEEP_S)
        gradio.Markdown(f"# {title}\nA photo is encoded once; any number of regions and phrases reuse that.")
        file = gradio.File(label="Photo", file_types=["image"], height=120)
        with gradio.Tab("Regions", id="regions"):
            regions = _regions_tab(gradio)
        with gradio.Tab("Find", id="find"):
            find = _find_tab(gradio)
        with gradio.Tab("Library", id="library"):
            library = _library_tab(gradio, desk)
        _wire_photo(gradio, desk, session, file, regions, find)
        _wire_find(gradio, desk, session, find)
        if desk.library is not None:
            _wire_library(gradio, desk, session, library)
    return page


def _regions_tab(gradio: Any) -> dict[str, Any]:
    with gradio.Row():
        with gradio.Column(scale=3, min_width=300):
            picture = gradio.Image(
                label="Click two corners of a box", interactive=False, buttons=[], alt_text="No photo", elem_id="marked"
            )
        with gradio.Column(scale=2, min_width=300):
            shape = gradio.Radio(["box", "point"], value="box", label="A click makes")
            names = gradio.Textbox(
                NAMES, label="Names to choose from", lines=2, info="with commas between; Enter names"
            )
            table = gradio.Dataframe(
                headers=["no.", "name", "prob.", "next best"],
                datatype="str",
                interactive=False,
                wrap=True,
                label="Names of the regions",
                column_widths=["14%", "30%", "18%", "38%"],
            )
            with gradio.Row():
                undo, clear = gradio.Button("Undo", size="sm"), gradio.Button("Clear", size="sm")
            typed = gradio.Textbox(
                label="Or type a region", placeholder="x0 y0 x1 y1, or x y", info="in pixels; Enter adds"
            )
    parts = {"picture": picture, "shape": shape, "names": names, "table": table}
    return parts | {"undo": undo, "clear": clear, "typed": typed}


def _find_tab(gradio: Any) -> dict[str, Any]:
    with gradio.Row(equal_height=True):
        phrase = gradio.Textbox(label="What to find", placeholder="a red hammer", scale=4, min_width=220)
        button = gradio.Button("Find", variant="primary", scale=1, min_width=100)
    words = gradio.Markdown(elem_id="found")
    with gradio.Row():
        picture = gradio.Image(label="Box", interactive=False, buttons=[], alt_text="No photo", elem_id="grounded")
        heat = gradio.Image(label="Similarity", interactive=False, buttons=[], alt_text="No photo", elem_id="heat")
    return {"phrase": phrase, "button": button, "words": words, "picture": picture, "heat": heat}


def _library_tab(gradio: Any, desk: Desk) -> dict[str, Any]:
    if desk.library is None:
        gradio.Markdown(
            "No library is open. `opencloc index PHOTOS --out INDEX --model M` makes one, "
            "`opencloc app INDEX` opens it."
        )
        return {}
    with gradio.Row(equal_height=True):
        text = gradio.Textbox(label="What to look for", placeholder="a red car", scale=3, min_width=200)
        minus = gradio.Textbox(label="and not", placeholder="a street", scale=2, min_width=140)
        button = gradio.Button("Search", variant="primary", scale=1, min_width=100)
    with gradio.Row():
        region = gradio.Button("Search for the region marked on the photo", size="sm")
        earlier = gradio.Button("Back", size="sm")
    words = gradio.Markdown(
        f"{len(desk.library):,} photos. Choose a result to search on with its region.", elem_id="answer"
    )
    gallery = gradio.Gallery(
        label="Photos",
        columns=4,
        allow_preview=False,
        object_fit="contain",
        height="auto",
        elem_id="gallery",
        buttons=[],
    )
    table = gradio.Dataframe(
        headers=["score", "photo", "box (px)", "taken"],
        datatype="str",
        interactive=False,
        wrap=True,
        label="Details",
        column_widths=["19%", "37%", "24%", "20%"],
    )
    parts = {"text": text, "minus": minus, "button": button, "region": region, "earlier": earlier}
    return parts | {"words": words, "gallery": gallery, "table": table}


def _told(gradio: Any, work: Callable[[], Session], session: Session) -> Session:
    """What `work` gives; where it says that something is wrong, the visitor is told and the session stays."""
    try:
        return work()
    except (ValueError, OSError) as error:
        gradio.Warning(_sentence(error), title="That did not work")
        return session


def _sentence(error: Exception) -> str:
    text = redacted(str(error)) or type(error).__name__
    return text[0].upper() + text[1:]


def _wire_photo(gradio: Any, desk: Desk, session: Any, file: Any, tab: dict[str, Any], find: dict[str, Any]) -> None:
    def show(state: Session, typed: str) -> tuple[Any, Any, list[list[str]]]:
        """The session with what is shown of it: the marked photo, the photo of the tab Find, the table."""
        try:
            rows = desk.names(state, typed)
        except ValueError as error:
            gradio.Warning(_sentence(error), title="That did not work")
            rows = []
        named = "; ".join(f"{row[0]} {row[1]} {row[2]}" for row in rows)
        half = ", one corner of a box" if state.corner else ""
        alt = "No photo" if state.photo is None else f"Photo, {len(state.regions)} regions{half}. {named}".strip()
        marked = gradio.Image(value=desk.marked(state, [row[1] for row in rows]), alt_text=alt)
        return state, marked, rows or [["", "", "", ""]]

    shown = [session, tab["picture"], tab["table"]]

    def opened(path: str | None, state: Session, typed: str) -> tuple[Any, ...]:
        state = _told(gradio, lambda: desk.open_photo(state, path), replace(state, photo=None, regions=(), corner=None))
        plain = None if state.photo is None else state.photo.image
        alt = "No photo" if plain is None else "Photo"
        return (
            *show(state, typed),
            gradio.Image(value=plain, alt_text=alt),
            gradio.Image(value=None, alt_text="No heat map yet"),
            "",
        )

    outputs = [*shown, find["picture"], find["heat"], find["words"]]
    file.change(opened, [file, session, tab["names"]], outputs, api_visibility="private")

    def clicked(event: Any, state: Session, shape: str, typed: str) -> tuple[Any, ...]:
        x, y = event.index
        return show(
            _told(gradio, lambda: desk.click(state, float(x), float(y), shape), replace(state, corner=None)), typed
        )

    clicked.__annotations__["event"] = gradio.SelectData
    tab["picture"].select(clicked, [session, tab["shape"], tab["names"]], shown, api_visibility="private")
    tab["names"].submit(show, [session, tab["names"]], shown, api_visibility="private")

    def typed_region(text: str, state: Session, typed: str) -> tuple[Any, ...]:
        after = _told(gradio, lambda: desk.add(state, numbers(text)), state)
        return (*show(after, typed), "" if after is not state else text)

    inputs = [tab["typed"], session, tab["names"]]
    tab["typed"].submit(typed_region, inputs, [*shown, tab["typed"]], api_visibility="private")

    def undone(state: Session, typed: str) -> tuple[Any, ...]:
        regions = state.regions if state.corner else state.regions[:-1]
        return show(replace(state, regions=regions, corner=None), typed)

    def cleared(state: Session, typed: str) -> tuple[Any, ...]:
        return show(replace(state, regions=(), corner=None), typed)

    tab["undo"].click(undone, [session, tab["names"]], shown, api_visibility="private")
    tab["clear"].click(cleared, [session, tab["names"]], shown, api_visibility="private")


def _wire_find(gradio: Any, desk: Desk, session: Any, tab: dict[str, Any]) -> None:
    def found(phrase: str, state: Session) -> tuple[Any, ...]:
        try:
            picture, heat, words = desk.find(state, phrase)
        except (ValueError, OSError) as error:
            gradio.Warning(_sentence(error), title="That did not work")
            return gradio.skip(), gradio.skip(), gradio.skip()
        where = f"Similarity of the photo with {phrase}"
        return gradio.Image(value=picture, alt_text=words), gradio.Image(value=heat, alt_text=where), words

    outputs = [tab["picture"], tab["heat"], tab["words"]]
    tab["button"].click(found, [tab["phrase"], session], outputs, api_visibility="private")
    tab["phrase"].submit(found, [tab["phrase"], session], outputs, api_visibility="private")


def _wire_library(gradio: Any, desk: Desk, session: Any, tab: dict[str, Any]) -> None:
    def show(state: Session) -> tuple[Any, ...]:
        found = state.found
        if found is None:
            return state, [], "", [["", "", "", ""]]
        pictures = [(outlined(row), f"{row.score:.2f}") for row in found.rows]
        table = [
            [
                f"{row.score:.2f}",
                row.photo + ("" if row.is_there else " (gone since)"),
                " ".join(map(str, row.box_px)),
                day(row),
            ]
            for row in found.rows
        ]
        return state, pictures, headline(found), table or [["", "", "", ""]]

    shown = [session, tab["gallery"], tab["words"], tab["table"]]

    def asked(text: str, minus: str, state: Session) -> tuple[Any, ...]:
        return show(_told(gradio, lambda: desk.ask(state, text, minus), state))

    def chosen(event: Any, minus: str, state: Session) -> tuple[Any, ...]:
        return show(_told(gradio, lambda: desk.ask(state, minus=minus, like=event.index), state))

    chosen.__annotations__["event"] = gradio.SelectData
    query = [tab["text"], tab["minus"], session]
    for event in (tab["button"].click, tab["text"].submit, tab["minus"].submit):
        event(asked, query, shown, api_visibility="private")
    tab["gallery"].select(chosen, [tab["minus"], session], shown, api_visibility="private")
    tab["region"].click(
        lambda state: show(_told(gradio, lambda: desk.ask_region(state), state)),
        [session],
        shown,
        api_visibility="private",
    )
    tab["earlier"].click(lambda state: show(back(state)), [session], shown, api_visibility="private")

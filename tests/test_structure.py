"""The house is as it is drawn: imports follow the arrows of docs/how-it-works.md, no circles, no long files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MOST_LINES = 420
Graph = dict[str, set[str]]  # who imports -> what is imported


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    names = {}
    for path in sorted((SOURCE / "opencloc").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports, in functions too; not those for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    class Imports(ast.NodeVisitor):
        def __init__(self) -> None:
            self.found: list[str] = []

        def visit_If(self, node: ast.If) -> None:
            if not ast.unparse(node.test).endswith("TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            self.found += [alias.name for alias in node.names]

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                self.found.append(submodule if submodule in known else base)

    visitor = Imports()
    visitor.visit(ast.parse(path.read_text()))
    yield from (found for found in visitor.found if found in known and found != name)


def import_graph() -> Graph:
    known = modules()
    return {name: set(imported(name, path, known)) for name, path in known.items()}


def drawing() -> tuple[dict[str, str], Graph]:
    """(module or package below opencloc -> its room, room -> rooms that its arrows point at) of the page's diagram."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    (diagram,) = [text for text in re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL) if "front" in text]
    rooms, arrows = {}, {}
    for room, label in re.findall(r'^\s*(\w+)\["([^"]*)"\]', diagram, re.MULTILINE):
        arrows[room] = set()
        rooms |= dict.fromkeys(re.findall(r"\w+", label.split("<br/>")[-1]), room)
    for start, ends in re.findall(r"^\s*(\w+) --> (.+)$", diagram, re.MULTILINE):
        arrows[start] |= set(re.split(r"\s*&\s*", ends.strip()))
    return rooms, arrows


def reachable(arrows: Graph, start: str) -> set[str]:
    found, todo = set(), [start]
    while todo:
        for end in arrows[todo.pop()] - found:
            found.add(end)
            todo.append(end)
    return found


def room_of(module: str, rooms: dict[str, str]) -> str:
    return rooms[[*module.split("."), "__init__"][1]]


def test_every_file_and_package_has_one_room() -> None:
    tops = {[*name.split("."), "__init__"][1] for name in modules()}
    assert set(drawing()[0]) == tops


def test_imports_follow_the_arrows() -> None:
    rooms, arrows = drawing()
    list(TopologicalSorter(arrows).static_order())  # no way round in the drawing
    wrong = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if (here := room_of(name, rooms)) != (there := room_of(other, rooms)) and there not in reachable(arrows, here)
    ]
    assert wrong == []


def test_every_arrow_is_an_import() -> None:
    rooms, arrows = drawing()
    real = {(room_of(n, rooms), room_of(o, rooms)) for n, others in import_graph().items() for o in others}
    assert [(a, b) for a, ends in arrows.items() for b in ends if (a, b) not in real] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count: they would hide a circle, not open it.

    The front door hands out everything, lazily; nothing but the command may come in by it.
    """
    graph = import_graph()
    command = {name for name in graph if name == "opencloc.__main__" or name.startswith("opencloc.cli")}
    assert [n for n, others in graph.items() if n not in command | {"opencloc"} and others & command] == []
    graph = {name: others - {"opencloc"} for name, others in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_files_are_short_enough_to_be_read(folder: str) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in sorted((ROOT / folder).rglob("*.py"))}
    long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MOST_LINES}
    assert long == {}

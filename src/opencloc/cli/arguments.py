"""From the words of a command line to configurations.  tyro is imported only to parse, so that help comes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Annotated, Any, TypeVar

Config = TypeVar("Config")
HELP = ("-h", "--help")


def parse(kind: Callable[..., Config], arguments: list[str], verb: str, default: Any = None) -> Config:
    import tyro

    return tyro.cli(
        kind,
        args=arguments,
        prog=f"opencloc {verb}",
        default=tyro.MISSING_NONPROP if default is None else default,
    )


def group(name: str, **parts: type) -> Any:
    """A class of several configurations, whose fields the command line takes without the parts' names."""
    import tyro

    fields = [(part, Annotated[kind, tyro.conf.arg(name="")]) for part, kind in parts.items()]
    return make_dataclass(name, fields, kw_only=True)


def together(arguments: list[str], *options: str) -> list[str]:
    """The arguments with all values of an option that comes several times behind it; tyro would take the last only."""
    values: dict[str, list[str]] = {option: [] for option in options}
    others: list[str] = []
    into = others
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in values:
            into = values[name]
            into += [value] if equals else []
        else:
            into = others if argument.startswith("--") else into
            into.append(argument)
    return [*others, *(part for option, found in values.items() if found for part in (option, *found))]


def named(arguments: list[str], first: str, *options: str) -> list[str]:
    """The arguments with what stands before any option named by the option `first`."""
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return together([*([first, *arguments[:count]] if count else []), *arguments[count:]], first, *options)


def value(arguments: list[str], option: str) -> str | None:
    """The value of an option of the command line, given as `--option value` or `--option=value`."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else following
    return None

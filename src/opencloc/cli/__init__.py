"""The `opencloc` command: verbs, their arguments, and how errors are shown.  No work is done here.

Arguments are made by tyro from the configuration dataclasses; their docstrings are the help.  Verbs import what they
need when they run, so that help comes at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from opencloc.cli import data, library, mllm, training
from opencloc.cli.arguments import HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_group = any(name.split()[:-1] == arguments[:1] for name in VERBS)  # `data` of `data stats`
    if not arguments or arguments[0] in HELP or (is_group and arguments[1:] in ([], *([flag] for flag in HELP))):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from opencloc import __version__

        print(__version__)
        return 0
    verb = next((name for name in VERBS if arguments[: len(name.split())] == name.split()), None)
    if verb is None:
        print(f"opencloc: there is no verb {' '.join(arguments[:2])!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"opencloc {verb}: {message}", file=sys.stderr)
            return VERBS[verb](arguments[len(verb.split()) :]) or 0
    except KeyboardInterrupt:
        print("opencloc: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ not in ("RuntimeError", "OutOfMemoryError"):
            raise  # torch's other subclasses are bugs, not messages
        from opencloc.errors import redacted

        print(f"opencloc {verb}: {redacted(str(error))}", file=sys.stderr)
        return 1


def usage() -> str:
    """The help of the command itself."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: opencloc VERB ...",
            "",
            "Contrastive localized language-image pre-training: a CLIP whose regions can be prompted.",
            "",
            *lines,
            "",
            "opencloc VERB --help says more of each.",
        ]
    )


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "train": training.train_model,
    "eval": training.evaluate,
    "label": training.label,
    "export": training.export,
    "index": library.index,
    "search": library.search,
    "embed": library.embed,
    "app": library.app,
    "mllm build": mllm.build_model,
    "mllm train": mllm.train_model,
    "mllm chat": mllm.chat,
    "mllm eval": mllm.evaluate,
    "mllm export": mllm.export,
    "card": training.card,
    "push": training.push_folder,
    "data scenes": data.scenes,
    "data stats": data.stats,
    "data view": data.view,
    "data check": data.check,
    "data pack": data.pack_shards,
    "data features": data.features,
    "data cache": data.cache,
}

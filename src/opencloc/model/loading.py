"""Loading what others saved: one rule for every model, configuration, tokenizer and processor that is opened.

Only safetensors are read, no foreign code runs, weights must be complete and finite, and a tokenizer must fit its text
tower.  What does not is a ValueError that names the folder, the file and the reason.  A folder is transformers' own, or
OpenCLIP's (`open_clip.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from opencloc.model import open_clip, towers

# What older versions of transformers saved although it is computed: no sign of a wrong checkpoint.
_COMPUTED = re.compile(r"(^|\.)embeddings\.position_ids$")
_STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)  # what is no fault of a file
PRETRAINED = Path(__file__).parents[1] / "pretrained"  # models that come with the package (recipes/package_tiny.sh)
PACKAGED = ("tiny",)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def model_path(path: str | Path) -> str:
    """`path` as transformers takes it: a folder that is there, or a hub id `ORGANISATION/NAME`.

    `tiny` is the model in the package; where something of that name lies in the working directory, that is meant.
    Raises FileNotFoundError for anything else, without asking the hub: `runs/model` is taken for a folder where `runs`
    is one.
    """
    if Path(path).is_dir():
        return str(path)
    if str(path) in PACKAGED and not Path(path).exists():
        return str(PRETRAINED / str(path))
    is_id = isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None
    if is_id and not Path(str(path).split("/")[0]).exists():
        return str(path)
    raise FileNotFoundError(f"{path}: no such folder")


def load_config(path: str | Path) -> Any:
    """The configuration of a checkpoint.

    Raises ValueError for an architecture that is not transformers' own and comes with code instead.
    """
    name = model_path(path)
    with naming(path):
        if open_clip.is_open_clip(path):
            return open_clip.read_config(path)
        raw, _ = PreTrainedConfig.get_config_dict(name)
        if "auto_map" in raw and (kind := raw.get("model_type")) not in CONFIG_MAPPING:
            raise ValueError(
                f"{path}: transformers has no model type {kind!r}; it brings its own code (auto_map), which is "
                "not run. If its weights are those of a CLIP, SigLIP or SigLIP 2, save them as that class"
            )
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_model(kind: Any, path: str | Path, **options: Any) -> Any:
    """The model of class `kind` (transformers' or ours).  Raises as `load_weights` does."""
    if kind is AutoModel and open_clip.is_open_clip(path):
        return load_weights(open_clip.load, path, **options)[0]
    return load_weights(kind.from_pretrained, path, **options)[0]


def load_weights(load: Callable[..., Any], path: str | Path, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, what transformers reports of its loading), by `load`, some class's `from_pretrained`.

    Raises ValueError naming missing, unexpected, misshapen and non-finite weights, and for weights in pickles.
    """
    name = model_path(path)
    if (folder := Path(name)).is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        also = f"; {pickles[0]} is a pickle, which may run code, and is not opened" if pickles else ""
        raise ValueError(f"{path}: there is no model.safetensors{also}")
    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    with naming(path), _without_report():
        model, info = load(name, *args, **options)
    for what, key in (("misshapen", "mismatched_keys"), ("missing", "missing_keys"), ("unexpected", "unexpected_keys")):
        names = sorted(n if isinstance(n, str) else n[0] for n in info.get(key) or ())
        if names := [name for name in names if not _COMPUTED.search(name)]:
            raise ValueError(f"{path}: {len(names)} {what} weights: {_some(names)}")
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{path}: weights that are not finite: {_some(bad)}")
    return model, info


def load_of_kind(load: Callable[..., Any], path: str | Path, kind: str, wanted: str, *args: Any, **options: Any) -> Any:
    """What a class of ours gives for `from_pretrained`, whose base class's is `load`: arguments are transformers'.

    Raises ValueError for a model whose type is not `kind`, saying what is `wanted`, and as `load_weights`;
    FileNotFoundError where there is no such folder.
    """
    if options.get("config") is None:
        options["config"] = load_config(path)
    if options["config"].model_type != kind:
        raise ValueError(f"{path} holds a {options['config'].model_type!r} model, {wanted}")
    with_info = options.pop("output_loading_info", False)
    model, info = load_weights(load, path, *args, **options)
    return (model, info) if with_info else model


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint.  Raises ValueError for one that knows no text, and where its files are missing.

    Whether it fits a text tower is for `check_tokenizer`.
    """
    name, options = model_path(path), {}
    if open_clip.is_open_clip(path):
        options = {"config": load_config(path)}  # by which transformers knows whose tokenizer it is
        if not has_tokenizer_files(path) and (elsewhere := open_clip.tokenizer_name(path)):
            path = name = model_path(elsewhere)
    check_tokenizer_files(path)
    with naming(path):
        declared = get_tokenizer_config(name).get("tokenizer_class")
        # AutoTokenizer would read these files by the class of the model's type: SigLIP 2's splits texts in its own way
        kind = (
            PreTrainedTokenizerFast if declared in ("PreTrainedTokenizerFast", "TokenizersBackend") else AutoTokenizer
        )
        tokenizer = kind.from_pretrained(name, trust_remote_code=False, **options)
    _check_reads(tokenizer, path)
    return tokenizer


def check_tokenizer_files(path: str | Path) -> None:
    """Raises ValueError for a folder without a tokenizer: transformers would make one that knows no text."""
    if Path(path).is_dir() and not has_tokenizer_files(path):
        raise ValueError(f"{path}: the tokenizer's files are missing ({', or '.join(_TOKENIZER_FILES)})")


def has_tokenizer_files(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def load_processor(path: str | Path, kind: Any = AutoProcessor) -> Any:
    """The processor of a checkpoint.  Raises ValueError as `load_tokenizer` does."""
    name = model_path(path)
    with naming(path):
        processor = kind.from_pretrained(name, trust_remote_code=False)
    if (tokenizer := getattr(processor, "tokenizer", None)) is not None:
        _check_reads(tokenizer, path)
    return processor


def check_tokenizer(tokenizer: Any, config: Any, where: str | Path) -> None:
    """Raises ValueError naming `where` unless the tokenizer fits the text tower of a CLIP, SigLIP or SigLIP 2.

    Its size must be that of the vocabulary, but for entries that only round it up.  Where the tower reads the
    embedding off the end token (CLIP), every text must end with one, cut texts too, and the tower must look for it
    there.
    """
    _check_reads(tokenizer, where)
    vocab_size, length = config.text_config.vocab_size, towers.max_text_length(config)
    special = set(tokenizer.all_special_tokens)  # which transformers may add, and no text comes to
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= vocab_size and token not in special]
    if beyond or vocab_size - len(tokenizer) > max(64, vocab_size // 10):
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} entries, the text tower a vocabulary of {vocab_size}: "
            "it is another model's"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        raise ValueError(f"{where}: the tokenizer has no padding token that the text tower knows")
    if towers.pads_to_max_length(config):
        return
    for probe in ("a", "a red dog", "dog " * length):
        with naming(where):
            ids = tokenizer(probe, truncation=True, max_length=length)["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            raise ValueError(f"{where}: the tokenizer puts no end token behind a text, where CLIP reads the embedding")
        if towers.pooled_position(config, ids) != len(ids) - 1:
            raise ValueError(
                f"{where}: the end token has the id {ids[-1]}, but the text tower reads the embedding "
                + (
                    "off the highest id of a text: transformers' CLIP takes eos_token_id 2 to say so. Another "
                    "tokenizer is needed"
                    if config.text_config.eos_token_id == 2
                    else f"off the first token of id {config.text_config.eos_token_id} (text_config.eos_token_id)"
                )
            )


def _check_reads(tokenizer: Any, where: str | Path) -> None:
    """Raises ValueError for a tokenizer that takes all texts for the same: transformers makes one where files miss."""
    with naming(where):
        seen = {tuple(tokenizer(probe)["input_ids"]) for probe in (*string.ascii_lowercase, "dog", "person", "red")}
    if len(seen) < 2:
        raise ValueError(f"{where}: the tokenizer gives every text the same tokens: files of it are missing")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turns whatever a library raises while it opens a folder into a ValueError that names the folder and the file."""
    try:
        yield
    except (ImportError, *_STOPS):  # of a library that is not installed the message says which
        raise
    except BaseException as error:  # each library has its own; panics of tokenizers are no Exceptions
        reason = _broken_file(Path(path)) or " ".join(str(error).split())[:300] or type(error).__name__
        kind = OSError if isinstance(error, OSError) and not Path(path).is_dir() else ValueError  # of the hub
        raise kind(reason if reason.startswith(str(path)) else f"{path}: {reason}") from error


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers from printing a table of the weights that do not fit, which our error names."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _broken_file(folder: Path) -> str | None:
    """The first file of a checkpoint that is not what its name says, and why."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif not isinstance(json.loads(file.read_bytes()), dict):
                return f"{file.name} is not a JSON object"
            elif file.name == "tokenizer.json":
                Tokenizer.from_file(str(file))
        except RecursionError:
            return f"{file.name} is nested too deep"
        except _STOPS:
            raise
        except BaseException as error:  # safetensors and tokenizers have their own, panics too
            return f"{file.name} is broken: {error}"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

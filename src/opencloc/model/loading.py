"""Loading what others saved: one rule for every model, configuration, tokenizer and processor that is opened.

Safetensors only, no foreign code, complete and finite weights, and a folder that is not there is named at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer


def model_path(path: str | Path) -> str:
    """`path` as transformers takes it: a folder that is there, or a hub id `ORGANISATION/NAME`.

    Raises FileNotFoundError for anything else, without asking the hub: `runs/model` is taken for a folder where `runs`
    is one.
    """
    if Path(path).is_dir():
        return str(path)
    is_id = isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None
    if is_id and not Path(str(path).split("/")[0]).exists():
        return str(path)
    raise FileNotFoundError(f"{path}: no such folder")


def load_config(path: str | Path) -> Any:
    """The configuration of a checkpoint."""
    return AutoConfig.from_pretrained(model_path(path), trust_remote_code=False)


def load_model(kind: Any, path: str | Path, **options: Any) -> Any:
    """The model of class `kind` (transformers' or ours).

    Raises ValueError naming missing, unexpected, misshapen and non-finite weights.
    """
    model, info = kind.from_pretrained(
        model_path(path), use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise ValueError(
                f"{path}: {what.replace('_keys', '')} weights: {', '.join(map(str, sorted(info[what])[:5]))}"
            )
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(f"{path}: weights that are not finite: {', '.join(bad[:5])}")
    return model


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(model_path(path), trust_remote_code=False)


def load_processor(path: str | Path, kind: Any = AutoProcessor) -> Any:
    """The processor of a checkpoint."""
    return kind.from_pretrained(model_path(path), trust_remote_code=False)

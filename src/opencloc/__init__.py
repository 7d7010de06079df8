"""opencloc: contrastive localized language-image pre-training (CLOC, arXiv 2410.02746).

    predictor = opencloc.load("tiny")

Importing this is cheap: names are imported when they are first used, torch with them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opencloc.config import TrainConfig
    from opencloc.data.sample import Sample
    from opencloc.data.sources.spec import open_source
    from opencloc.eval.run import run_eval as evaluate
    from opencloc.model.cloc import ClocConfig, ClocModel
    from opencloc.model.predictor import Predictor, load
    from opencloc.model.processor import ClocProcessor
    from opencloc.model.prompts import Box, Mask, Point, Text
    from opencloc.train.loop import train
    from opencloc.vesl.run import run_label as label

__version__ = "0.1.0"
__all__ = [
    "Box",
    "ClocConfig",
    "ClocModel",
    "ClocProcessor",
    "Mask",
    "Point",
    "Predictor",
    "Sample",
    "Text",
    "TrainConfig",
    "__version__",
    "evaluate",
    "label",
    "load",
    "open_source",
    "train",
]

_HOMES = {
    "Box": "opencloc.model.prompts",
    "ClocConfig": "opencloc.model.cloc",
    "ClocModel": "opencloc.model.cloc",
    "ClocProcessor": "opencloc.model.processor",
    "Mask": "opencloc.model.prompts",
    "Point": "opencloc.model.prompts",
    "Predictor": "opencloc.model.predictor",
    "Sample": "opencloc.data.sample",
    "Text": "opencloc.model.prompts",
    "TrainConfig": "opencloc.config",
    "evaluate": "opencloc.eval.run:run_eval",
    "label": "opencloc.vesl.run:run_label",
    "load": "opencloc.model.predictor",
    "open_source": "opencloc.data.sources.spec",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the package of that name, which can be called: see there
        return importlib.import_module("opencloc.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'opencloc' has no attribute {name!r}")
    home, _, renamed = _HOMES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(home), renamed or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AutoClasses(importlib.abc.MetaPathFinder):
    """Imports our model, which registers itself, right after transformers' Auto classes.

    So `AutoModel.from_pretrained` opens CLOC checkpoints after `import opencloc`, which itself needs neither
    transformers nor torch: together they take seconds to import.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "transformers.models.auto":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                importlib.import_module("opencloc.model")

            spec.loader.exec_module = execute_and_register
        return spec


if "transformers.models.auto" in sys.modules:
    importlib.import_module("opencloc.model")
else:
    sys.meta_path.insert(0, _AutoClasses())

"""Training: the loop, the optimizer, checkpoints.  `opencloc.train(config)` calls `loop.train`."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, which the front door also offers as the function that trains: one name, both uses."""

    def __call__(self, config: Any) -> Any:
        from opencloc.train.loop import train

        return train(config)


sys.modules[__name__].__class__ = _Callable

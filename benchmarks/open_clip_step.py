"""Training steps of open_clip's ViT-B-16 on demand: the worker of `benchmarks/step.py`, in open_clip's own venv.

    python -m venv VENV && VENV/bin/pip install torch numpy open_clip_torch && VENV/bin/pip uninstall -y timm

Every line on standard input asks for one step (forward, loss, backward, clipping and AdamW) on the batch in the file
named on the command line.  The answer is one line, {"busy_s": ..., "wall_s": ...}.

open_clip imports torchvision for image transforms that are not used here.  Where torchvision does not fit the build of
torch, empty classes stand in for it.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from typing import Any

import torch

from benchmarks.common import timed


class _BlankClass(type):
    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _BlankModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _BlankClass(name, (), {})


class BlankTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `torchvision` and everything in it, all empty."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _BlankModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    batch_file, threads, bf16 = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "bf16"
    torch.set_num_threads(threads)
    try:
        import torchvision  # noqa: F401  # pyright: ignore
    except Exception:  # not there, or made for another torch
        sys.meta_path.insert(0, BlankTorchvision())
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
        import open_clip  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    batch = torch.load(batch_file, weights_only=True)
    device = torch.device(batch["device"])
    pixels, texts = batch["pixel_values"].to(device), batch["texts"].to(device)
    model = open_clip.create_model("ViT-B-16").to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}], lr=1e-6, fused=True
    )
    loss = open_clip.ClipLoss()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            image, text, scale = model(pixels, texts)[:3]
            value = loss(image, text, scale)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    print(json.dumps({"open_clip": open_clip.__version__, "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(step, device)), flush=True)


if __name__ == "__main__":
    main()

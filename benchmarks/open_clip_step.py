"""Training steps of open_clip's ViT-B-16 on demand: the worker of `benchmarks/step.py`, in open_clip's own venv.

    python -m venv VENV && VENV/bin/pip install torch numpy open_clip_torch && VENV/bin/pip uninstall -y timm

Reads commands from standard input, one a line, and answers each with one line: `step` runs forward, loss, backward,
clipping and AdamW on the batch in the file named on the command line, and answers {"busy_s": ..., "wall_s": ...}.

open_clip imports torchvision for its image transforms, which are not used here, and torchvision cannot be imported
beside every build of torch: where it cannot, empty classes stand in for it.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import sys
import time
import types
from typing import Any

import torch


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


def timed(step: Any, device: torch.device) -> dict[str, float]:
    """Seconds of one step: `busy_s` of the GPU by its events, or of this process's threads on a CPU; `wall_s`."""
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return {"busy_s": begin.elapsed_time(end) / 1e3, "wall_s": time.perf_counter() - started}
    busy = time.process_time()
    step()
    return {"busy_s": time.process_time() - busy, "wall_s": time.perf_counter() - started}


if __name__ == "__main__":
    main()

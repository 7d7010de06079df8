"""Which device computes, and in which precision: one meaning of `--device` and `--precision` for every verb."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one, else the CPU.

    Raises ValueError for a name that torch does not know and for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {name!r} is not there: torch sees {count} CUDA devices")
    return device


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether the forward pass runs under bf16 autocast; `auto` means where the hardware multiplies bf16."""
    return precision == "bf16" or (precision == "auto" and has_native_bf16(device))


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; emulated bf16 is a hundred times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

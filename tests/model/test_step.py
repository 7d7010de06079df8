"""What a training step must not do, and what options must not change: waits for the device, results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from transformers import CLIPConfig

from opencloc.config import LossConfig, TrainConfig
from opencloc.loss import ClocLoss, cloc_loss
from opencloc.model.cloc import ClocConfig, ClocModel, ClocOutput
from opencloc.model.packing import PackedTexts, pack
from opencloc.model.prompter import PROMPTERS
from opencloc.train.build import apply_options

BOXES = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4]], [[0.0, 0.0, 0.3, 0.3], [0.2, 0.2, 0.9, 0.5]]])
INDEX = torch.tensor([[0, 1], [2, 1]])
VALID = torch.tensor([[True, True], [True, False]])


def inputs() -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "input_ids": pack([[2, 7, 9, 10, 1], [2, 8, 1]], max_length=16, pad_id=0),
        "boxes": BOXES,
        "text_ids": pack([[2, 5, 1], [2, 6, 7, 1], [2, 20, 1]], max_length=16, pad_id=0),
        "text_index": INDEX,
    }


def make(tower_config: Callable[[str], Any], **options: Any) -> ClocModel:
    torch.manual_seed(0)
    return ClocModel(ClocConfig(clip_config=tower_config("clip"), **options)).train()


def loss_of(output: ClocOutput, boxes: torch.Tensor, valid: torch.Tensor, text_hash: torch.Tensor) -> ClocLoss:
    return cloc_loss(output, boxes, valid, text_hash, LossConfig())


# -- waiting for the device ----------------------------------------------------------------------------------------


class NoTransfers(TorchFunctionMode):
    """Refuses to copy between the host and the device: a copy from pageable memory waits for all that is queued."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor), (
            "made on the host"
        )
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_flatten((args, out))[0] if isinstance(x, torch.Tensor)}
        assert len(devices) < 2, f"{func} between host and device"
        return out


def empty_like(value: Any, device: str) -> Any:
    """A tensor (or parameter, or packed texts) of the same shape and type on `device`; anything else as it is."""
    if isinstance(value, PackedTexts):
        return PackedTexts(**{name: empty_like(field, device) for name, field in vars(value).items()})
    if not isinstance(value, torch.Tensor):
        return value
    empty = torch.empty(value.shape, dtype=value.dtype, device=device)
    return nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty


def run_empty(model: ClocModel, device: str, ask: Callable[[ClocOutput], torch.Tensor] | None = None) -> ClocOutput:
    """The model's output for tensors without content; `ask` adds to the image embeddings."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: empty_like(value, device) for name, value in table.items()})
    batch = {name: empty_like(value, device) for name, value in inputs().items()}
    with NoTransfers():
        output = model(**batch)
        return output if ask is None else replace(output, image=output.image + ask(output))


@pytest.mark.parametrize("prompter", PROMPTERS)
def test_a_step_asks_for_no_value(tower_config: Callable[[str], Any], prompter: str) -> None:
    model = make(tower_config, prompter=prompter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = run_empty(model, "cpu")
        boxes, valid, text_hash = (empty_like(x, "cpu") for x in (BOXES, VALID, INDEX))
        loss_of(output, boxes, valid, text_hash).total.backward()


@pytest.mark.parametrize("prompter", PROMPTERS)
def test_the_model_copies_nothing_between_host_and_device(tower_config: Callable[[str], Any], prompter: str) -> None:
    output = run_empty(make(tower_config, prompter=prompter), "meta")
    torch.stack([value.sum() for value in vars(output).values() if value is not None]).sum().backward()


def test_asking_for_a_value_and_copying_are_noticed(tower_config: Callable[[str], Any]) -> None:
    def image(output: ClocOutput) -> torch.Tensor:
        assert output.image is not None
        return output.image

    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        run_empty(make(tower_config), "cpu", lambda output: image(output) * image(output).sum().item())
    with pytest.raises(AssertionError, match="made on the host"):
        run_empty(make(tower_config), "meta", lambda output: image(output).new_tensor([1.0]))
    with pytest.raises(AssertionError, match="between host and device"):
        run_empty(make(tower_config), "meta", lambda output: BOXES.to(image(output).device)[0, 0, 0])


# -- options -------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: ClocModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = loss_of(model(**inputs()), BOXES, VALID, INDEX).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_plain(model: ClocModel, plain: ClocModel) -> None:
    assert list(model.state_dict()) == list(plain.state_dict())
    (expected, expected_gradients), (loss, gradients) = (loss_and_gradients(m) for m in (plain, model))
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_activation_checkpointing_changes_no_result_and_computes_layers_again(
    tower_config: Callable[[str], Any],
) -> None:
    model, plain = make(tower_config), make(tower_config)
    apply_options(model, TrainConfig(activation_checkpointing=True))
    calls = []
    model.clip.vision_model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_equal_to_plain(model, plain)
    assert len(calls) == 2


def test_compilation_changes_no_result_and_breaks_no_graph() -> None:
    # in a process of its own: the type checks of conftest would be compiled too
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["equal"]


def check_compilation() -> None:
    """Compiled layers under activation checkpointing against plain ones, from the smallest towers.

    Without code generation, which takes minutes and a C++ compiler: tracing, and the gradient of what was traced.
    """
    torch.set_num_threads(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1}
    vision = sizes | {"patch_size": 8, "image_size": 32}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # pyright: ignore
    model, plain = make(lambda _: clip), make(lambda _: clip)
    apply_options(model, TrainConfig(compile=True, activation_checkpointing=True))
    assert_equal_to_plain(model, plain)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 3, "a vision layer, a text layer and the Prompter"
    assert not counters["graph_break"], counters["graph_break"]
    print("equal")


if __name__ == "__main__":
    check_compilation()

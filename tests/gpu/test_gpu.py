"""What a GPU computes is what the CPU computes; and what only a GPU can show: NCCL, bf16, compiled kernels, waits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from opencloc import collectives
from opencloc.config import LossConfig, OptimConfig, TrainConfig
from opencloc.contrastive import info_nce
from opencloc.data.batch import Batch
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.eval.encoders import ENCODERS, load_encoder
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.predictor import Predictor
from opencloc.model.processor import ClocProcessor
from opencloc.model.prompter import PROMPTERS
from opencloc.train import loop
from opencloc.train.build import apply_options, build_model
from opencloc.train.checkpoint import save_model
from opencloc.train.distributed import clip_gradients
from opencloc.train.loop import backward, train
from opencloc.train.muon import orthogonalize
from opencloc.train.optim import make_optimizer
from tests.train.runs import MakeConfig, cut_off, log, steps_kept

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FAMILIES = ("clip", "siglip", "siglip2")


def close(got: Any, expected: Any, tolerance: float, what: str | None = None) -> None:
    """Equal to within `tolerance` of the size of the expected tensor as a whole."""
    got, expected = torch.as_tensor(got).detach().double().cpu(), torch.as_tensor(expected).detach().double().cpu()
    assert got.shape == expected.shape
    difference = (got - expected).norm() / expected.norm().clamp_min(1e-12)
    assert difference <= tolerance, f"{what}: off by {difference:.2e}"


def random_model(tower_config: Callable[[str], Any], family: str = "clip", **options: Any) -> ClocModel:
    torch.manual_seed(0)
    return ClocModel(ClocConfig(clip_config=tower_config(family), **options))


def on(model: ClocModel, device: torch.device) -> ClocModel:
    """A copy of the model there."""
    copy = ClocModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(device).train(model.training)  # pyright: ignore[reportArgumentType]


def one_batch(run: TrainConfig, processor: Any, size: int, device: torch.device) -> Batch:
    source = open_source("scenes:rich?min_objects=1&missing_region=0.4", image_px=32)
    examples = TrainingExamples([source], (), num_regions=3, image_size=32, seed=0)
    (batch,) = training_batches(examples, processor, batch_size=size, start=0, stop=1, num_workers=0, device=device)
    return batch


def test_every_way_to_embed_regions_sees_the_same_image(
    gpu: torch.device, tower_config: Callable[[str], Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = random_model(tower_config).eval()
    model.save_pretrained(tmp_path)
    ClocProcessor.for_towers(model.config.clip_config, tokenizer).save_pretrained(tmp_path)
    images = [Image.effect_noise((40, 30), 90).convert("RGB")]
    with torch.no_grad():
        expected = load_encoder(tmp_path, "prompter").encode_images(images).embedding
        for way in ENCODERS:
            got = load_encoder(tmp_path, way, device=gpu).encode_images(images).embedding
            close(got, expected, 1e-4, way)


# -- the model and the losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompter", PROMPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_images_regions_and_texts_are_the_cpus(
    gpu: torch.device, tower_config: Callable[[str], Any], family: str, prompter: str
) -> None:
    model = random_model(tower_config, family, prompter=prompter).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    corners = torch.rand(3, 5, 2, 2, generator=generator).sort(2).values * 0.9
    boxes = torch.cat([corners[:, :, 0], corners[:, :, 1] + 0.1], -1)
    ids = torch.randint(3, 200, (4, 16), generator=generator)
    ids[:, -1] = 1
    found = []
    for device in (CPU, gpu):
        there = on(model, device)
        with torch.no_grad():
            features = there.encode_image(pixels.to(device))
            texts = there.encode_text(ids.to(device))
            parts = [features.embedding, features.tokens, there.encode_regions(features, boxes.to(device)), texts]
            if there.has_text_prompts:
                parts.append(there.ground(features, texts[:3].unsqueeze(1)))
        found.append(parts)
    for number, (expected, got) in enumerate(zip(*found, strict=True)):
        close(got, expected, 1e-4, f"part {number}")


@pytest.mark.parametrize("region_weight", [0.0, 1.0])
def test_losses_and_gradients_are_the_cpus(
    gpu: torch.device, config: MakeConfig, tmp_path: Path, region_weight: float
) -> None:
    run = config(tmp_path)
    model, processor = build_model(run)
    found = []
    for device in (CPU, gpu):
        there = on(model, device)
        loss, _ = backward(there, one_batch(run, processor, 6, device), LossConfig(region_weight=region_weight), None)
        found.append((loss, {n: p.grad for n, p in there.named_parameters() if p.grad is not None}))
    (expected, gradients), (got, found_gradients) = found
    for name, value in vars(expected).items():
        if value is not None:
            close(getattr(got, name), value, 1e-4, name)
    assert found_gradients.keys() == gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    close(torch.cat([found_gradients[name].flatten() for name in gradients]), whole, 1e-3, "gradient")


def test_the_tiled_loss_is_the_whole_matrixs_in_float64(gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (nn.functional.normalize(torch.randn(3000, 64, generator=generator) + 0.5, dim=-1) for _ in range(2))
    expected: list[Tensor] = []
    got: list[Tensor] = []
    for device, dtype, into in ((CPU, torch.float64, expected), (gpu, torch.float32, got)):
        q, k = (x.to(device, dtype).requires_grad_() for x in (query, key))
        scale = torch.tensor(20.0, dtype=dtype, device=device)
        if into is expected:
            scores = scale * q @ k.T
            target = torch.arange(len(scores))
            value = (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2
        else:
            value, _ = info_nce(q, k, scale, tile=1024)
        value.backward()
        assert q.grad is not None
        assert k.grad is not None
        into += [value, q.grad, k.grad]
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-4)


def test_bf16_autocast_is_near_float32(gpu: torch.device, config: MakeConfig, tmp_path: Path) -> None:
    run = config(tmp_path)
    model, processor = build_model(run)
    model.to(gpu)  # pyright: ignore[reportArgumentType]
    batch = one_batch(run, processor, 16, gpu)
    found = []
    for bf16 in (False, True):
        model.zero_grad()
        loss, _ = backward(model, batch, run.loss, None, bf16=bf16)
        found.append((loss.total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (expected, gradient), (got, near) = found
    close(got, expected, 0.02, "loss")
    assert nn.functional.cosine_similarity(near, gradient, dim=0) > 0.98


def test_a_step_never_waits_for_the_gpu(gpu: torch.device, config: MakeConfig, tmp_path: Path) -> None:
    """Losses, gradients, clipping and optimizer are queued without a synchronisation."""
    run = config(tmp_path)
    model, processor = build_model(run)
    model.to(gpu).train()  # pyright: ignore[reportArgumentType]
    batch = one_batch(run, processor, 8, gpu)
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(model, OptimConfig(name=name))
        for mode in ("default", "error"):  # the first step makes kernels and state
            torch.cuda.set_sync_debug_mode(mode)
            try:
                backward(model, batch, run.loss, None, bf16=True)
                clip_gradients(model, 1.0)
                optimizer.step()
                model.bound_scales()
                optimizer.zero_grad(set_to_none=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_predictor_answers_alike(gpu: torch.device, config: MakeConfig, tmp_path: Path) -> None:
    save_model(tmp_path / "model", *build_model(config(tmp_path)))
    scene = open_source("scenes:rich?seed=1", image_px=64)[0]
    found = []
    for device in ("cpu", "cuda"):
        predictor = Predictor.from_pretrained(tmp_path / "model", device)
        image = predictor.encode(scene.image)
        _, probabilities = predictor.classify(image, boxes_px=scene.boxes * 64, names=[*scene.texts, "a dog"])
        boxes, scores = predictor.ground(image, [*scene.texts])
        found.append([torch.as_tensor(x) for x in (probabilities, boxes, scores)])
    for expected, got in zip(*found, strict=True):
        close(got, expected, 1e-3)


# -- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24)])
def test_a_matrix_is_made_orthogonal_as_on_the_cpu(gpu: torch.device, shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    close(orthogonalize(matrices.to(gpu)), orthogonalize(matrices), 1e-3)
    values = torch.linalg.svdvals(orthogonalize(matrices.to(gpu).bfloat16()).float())
    assert values.max() < 1.4
    assert values.median() > 0.6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_goes_as_on_the_cpu(gpu: torch.device, config: MakeConfig, tmp_path: Path, name: Any) -> None:
    """Losses, gradient norm and scales of every step.  Muon multiplies in bf16 on a GPU."""
    tolerance = 0.03 if name == "muon" else 5e-3
    optim = OptimConfig(name=name, lr=1e-3, warmup_steps=2, eps=1e-3)
    records = []
    for device in ("cpu", "cuda"):
        train(config(tmp_path / device, optim=optim, device=device))
        records.append(log(tmp_path / device))
    for expected, got in zip(*records, strict=True):
        for key in expected.keys() - {"images_per_s", "data_wait", "skipped"}:
            assert got[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance), key


# -- runs ------------------------------------------------------------------------------------------------------------


def assert_same_weights(run: Path, expected: Path, tolerance: float) -> None:
    weights, wanted = (load_file(r / "model" / "model.safetensors") for r in (run, expected))
    assert weights.keys() == wanted.keys()
    close(
        torch.cat([weights[n].flatten() for n in wanted]), torch.cat([w.flatten() for w in wanted.values()]), tolerance
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    gpu: torch.device, config: MakeConfig, tmp_path: Path, name: Any
) -> None:
    run = config(
        tmp_path / "run", device="cuda", optim=OptimConfig(name=name, lr=1e-3, warmup_steps=2), keep_checkpoints=3
    )
    whole = replace(run, out=str(tmp_path / "whole"))
    train(whole)
    train(run)
    cut_off(tmp_path / "run", after=2)
    train(run)
    assert_same_weights(tmp_path / "run", tmp_path / "whole", 1e-4)


def test_a_run_that_becomes_nan_stops_and_keeps_the_checkpoint_before(
    gpu: torch.device, config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two good steps with a checkpoint, then a step far too long, in bf16."""
    monkeypatch.setattr(loop, "learning_rate", lambda step, *_: 1e-3 if step < 2 else 1e30)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(config(tmp_path, steps=20, checkpoint_every=1, device="cuda", precision="bf16"))
    assert 2 in steps_kept(tmp_path)
    for step in steps_kept(tmp_path):
        saved = load_file(tmp_path / f"checkpoints/step_{step:07d}/model.safetensors")
        assert all(torch.isfinite(value).all() for value in saved.values())


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group(gpu: torch.device, tmp_path: Path) -> Iterator[dist.ProcessGroup | None]:
    """This process alone as a group: NCCL for the GPU, Gloo for the CPU."""
    torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_collectives_of_one_rank_are_the_identity(gpu: torch.device, group: dist.ProcessGroup) -> None:
    x = torch.randn(4, 3, device=gpu)
    for operation in (
        collectives.gather_rows,
        collectives.scatter_sum,
        collectives.sum_ranks,
        collectives.sum_log_ranks,
    ):
        torch.testing.assert_close(operation(x, group), x)


def test_the_loss_over_a_group_of_one_is_the_loss(gpu: torch.device, group: dist.ProcessGroup) -> None:
    query, key = (nn.functional.normalize(torch.randn(50, 16, device=gpu), dim=-1) for _ in range(2))
    scale = torch.tensor(10.0, device=gpu)
    texts = torch.arange(50, device=gpu) // 2
    alone, together = (
        info_nce(query, key, scale, text_hash=texts, similar_above=0.9, group=ranks)[0] for ranks in (None, group)
    )
    close(together, alone, 1e-6)


@pytest.mark.parametrize(
    ("sharding", "optimizer", "micro_batch_size"),
    [
        ("ddp", "adamw", None),
        ("fsdp", "adamw", None),
        ("fsdp", "adamw", 4),
        ("ddp", "muon", None),
        ("fsdp", "muon", None),
    ],
)
def test_one_rank_trains_what_a_single_process_trains(
    gpu: torch.device, config: MakeConfig, tmp_path: Path, sharding: Any, optimizer: Any, micro_batch_size: int | None
) -> None:
    optim = OptimConfig(name=optimizer, lr=1e-3, warmup_steps=2, eps=1e-3)
    plain = config(tmp_path / "plain", device="cuda", optim=optim, micro_batch_size=micro_batch_size)
    train(plain)
    torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        train(replace(plain, out=str(tmp_path / sharding), sharding=sharding))
    finally:
        dist.destroy_process_group()
    assert_same_weights(tmp_path / sharding, tmp_path / "plain", 1e-3 if optimizer == "muon" else 1e-4)


# -- compilation -----------------------------------------------------------------------------------------------------


def test_compiled_layers_give_what_plain_ones_give(gpu: torch.device) -> None:
    # in a process of its own: the type checks of conftest would be compiled too
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["equal"]


def check_compilation(device: torch.device) -> None:
    """Losses and gradients of compiled layers, with code generation, against those of plain ones."""
    from transformers import CLIPConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1}
    clip = CLIPConfig(text_config=text, vision_config=sizes | {"patch_size": 8, "image_size": 32}, projection_dim=24)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (8, 9), generator=generator)
    ids[:, -1] = 1
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.9]).expand(8, 2, 4)
    batch = Batch(
        pixel_values=torch.randn(8, 3, 32, 32, generator=generator).to(device),
        input_ids=ids.to(device),
        boxes=boxes.to(device),
        valid=torch.ones(8, 2, dtype=torch.bool, device=device),
        text_ids=ids[:4].to(device),
        text_index=(torch.arange(16) % 4).reshape(8, 2).to(device),
        text_hash=(torch.arange(16) % 4).reshape(8, 2).to(device),
    )
    found = []
    for compile_layers in (False, True):
        torch.manual_seed(0)
        model = ClocModel(ClocConfig(clip_config=clip)).to(device).train()  # pyright: ignore[reportArgumentType]
        apply_options(model, TrainConfig(compile=compile_layers))
        loss, _ = backward(model, batch, LossConfig(), None)
        found.append((loss.total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (expected, gradient), (got, compiled) = found
    close(got, expected, 1e-4, "loss")
    close(compiled, gradient, 1e-3, "gradient")
    print("equal")


if __name__ == "__main__":
    check_compilation(torch.device("cuda"))

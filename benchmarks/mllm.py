"""Tokens per second of the multimodal model, training and generating, against transformers' LLaVA of the same size.

    python -m benchmarks.mllm --out results/mllm_speed

Random weights (speed does not depend on their values), photos of noise.  "plain" is LlavaForConditionalGeneration;
"no regions" is RegionLlava asked the same; "roi", "points" and "prompter" are RegionLlava with --regions regions in
each question, by a token each, and that many fewer words, so that all rows have equally many tokens.  Training is a
forward and a backward pass of the projector, the sampler and the language model, the tower frozen; generation is
--new-tokens greedy tokens.  Methods take turns; ratios are medians over rounds of the ratio within a round.  Seconds
are those of the GPU, or of this process on a CPU.

Prints Markdown and writes it to OUT/README.md, with the figures in OUT/figures.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.common import facts, save, table, take_turns, timed
from opencloc.devices import has_native_bf16
from opencloc.mllm.chat_format import chat_format
from opencloc.mllm.conversation import Conversation, Turn
from opencloc.mllm.export import llava_weights
from opencloc.mllm.model import RegionLlava, RegionLlavaConfig
from opencloc.mllm.processor import IMAGE, REGION, RegionLlavaProcessor, make_processor
from opencloc.model.processor import train_tokenizer
from opencloc.model.prompts import Box

SAMPLERS = ("roi", "points", "prompter")
AIM = 1.05  # most that RegionLlava may take, without regions, for what plain LLaVA does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--regions", type=int, default=4, help="in each question")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--width", type=int, default=576, help="of the language model")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--tower-layers", type=int, default=12)
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bf16 = has_native_bf16(device)

    models, batches = make(args, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        seconds = measure(models, batches, args, device)
    length = int(batches["plain"][0]["attention_mask"].sum())
    figures = facts(device) | {
        "precision": "bf16" if bf16 else "fp32",
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "parameters": sum(p.numel() for p in models["plain"].parameters()),
        "tokens_per_row": length // args.batch,
        "seconds": seconds,
        "rates": rates(seconds, {"train": length, "generate": args.batch * args.new_tokens}),
    }
    save(args.out, figures, report(figures))


def make(
    args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """(models, and for each method a batch to train on and one to answer), by method."""
    tokenizer: Any = train_tokenizer(
        ["What are these things, this one and this one? a dog 0123456789 USER: ASSISTANT:"], 400, 4096
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, REGION]})
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=args.tower_layers,
        num_attention_heads=6,
        image_size=args.image_px,
        patch_size=16,
    )
    heads = max(1, args.width // 64)
    text = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": (args.image_px // 16) ** 2,
        "tie_word_embeddings": True,
    }
    cross = {"kind": "cross", "embed_dim": 384, "options": prompter_options()}
    torch.manual_seed(0)
    models: dict[str, Any] = {}
    for name in SAMPLERS:
        config = RegionLlavaConfig(
            **common,
            region_token_index=tokenizer.convert_tokens_to_ids(REGION),
            sampler=name,
            prompter=cross if name == "prompter" else None,
        )
        models[name] = RegionLlava(config)
    models["no regions"] = models["roi"]
    models["plain"] = LlavaForConditionalGeneration(LlavaConfig(**common))
    plain = llava_weights(models["plain"].state_dict(), tied=True)
    ours = llava_weights(models["no regions"].state_dict(), tied=True)
    assert {n: v.shape for n, v in plain.items()} == {n: v.shape for n, v in ours.items()}, "not of the same size"
    processor = make_processor(tokenizer, chat_format(tokenizer), models["roi"].config, refer="token")
    batches = {}
    for name, model in models.items():
        model.to(device)
        model.model.vision_tower.requires_grad_(False)
        model.generation_config.eos_token_id = None  # all answers are of the same length
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        regions = args.regions if name in SAMPLERS else 0
        batches[name] = tuple(
            {key: value.to(device) for key, value in batch(processor, args, regions, training).items()}
            for training in (True, False)
        )
    return models, batches


def prompter_options() -> dict[str, Any]:
    """The options of the `cross` Prompter as a CLOC model has them by default."""
    from opencloc.model.cloc import ClocConfig
    from opencloc.model.prompter import PROMPTERS

    config = ClocConfig()
    return {name: getattr(config, name) for name in PROMPTERS["cross"].options}


def batch(processor: RegionLlavaProcessor, args: argparse.Namespace, regions: int, training: bool) -> dict[str, Any]:
    """Questions with so many regions, and words for the others."""
    random = np.random.default_rng(0)
    things = [f"{{region:{i}}}" for i in range(regions)] + ["?"] * (args.regions - regions)  # a token each
    conversations = []
    for _ in range(args.batch):
        corner, size = random.uniform(0, 0.5, (regions, 2)), random.uniform(0.1, 0.5, (regions, 2))
        boxes = np.concatenate([corner, corner + size], 1).tolist()
        turns = (Turn("user", f"What are these things: {''.join(things)}"), Turn("assistant", "a dog and a dog " * 8))
        conversations.append(
            Conversation(
                image=Image.fromarray(random.integers(0, 255, (args.image_px, args.image_px, 3), dtype=np.uint8)),
                turns=turns if training else turns[:1],
                prompts=tuple(Box(*box) for box in boxes),
            )
        )
    return dict(processor(conversations, for_training=training))


def measure(
    models: dict[str, Any],
    batches: dict[str, tuple[dict[str, Any], dict[str, Any]]],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds by round of one training pass and of one generation, as `train: METHOD` and `generate: METHOD`."""

    def train(name: str) -> None:
        models[name].train().zero_grad(set_to_none=True)
        models[name](**batches[name][0]).loss.backward()

    def generate(name: str) -> None:
        count = args.new_tokens
        made = models[name].eval().generate(**batches[name][1], max_new_tokens=count, do_sample=False)
        assert made.shape[1] == batches[name][1]["input_ids"].shape[1] + count

    clocks: dict[str, Callable[[int], float]] = {}
    for name in models:
        for what, run in (("train", train), ("generate", generate)):
            clocks[f"{what}: {name}"] = lambda _, run=run, name=name: timed(lambda: run(name), device)["busy_s"]
    return take_turns(clocks, args.rounds)


def rates(seconds: dict[str, list[float]], tokens: dict[str, int]) -> dict[str, dict[str, float]]:
    """Tokens per second of each method, and the time it takes as a multiple of plain LLaVA's."""
    found: dict[str, dict[str, float]] = {}
    for key, values in seconds.items():
        what, _, name = key.partition(": ")
        ratios = [ours / plain for ours, plain in zip(values, seconds[f"{what}: plain"], strict=True)]
        found.setdefault(name, {})[f"{what}, tokens/s"] = tokens[what] / statistics.median(values)
        found[name][f"{what}, time against plain"] = statistics.median(ratios)
    return found


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = {name: figures["rates"][name] for name in ("plain", "no regions", *SAMPLERS)}
    columns = list(rows["plain"])
    lines = [
        [name, *(f"{row[c]:.3f}" if "against" in c else f"{row[c]:.0f}" for c in columns)] for name, row in rows.items()
    ]
    args = figures["arguments"]
    return (
        f"# Speed of the multimodal model\n\n`{figures['command']}`: {figures['hardware']}, {figures['precision']}, "
        f"{figures['parameters'] / 1e6:.1f} M parameters, {args['batch']} rows of {figures['tokens_per_row']} tokens, "
        f"{args['regions']} regions in each, {args['new_tokens']} new tokens, medians of {args['rounds']} rounds.\n\n"
        f"{table(['', *columns], lines)}\n"
        f"Aim: without regions at most {AIM:.2f} times plain LLaVA's time.\n"
    )


if __name__ == "__main__":
    main()

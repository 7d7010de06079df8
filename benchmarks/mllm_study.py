"""The study of multimodal models: what the encoder and the region sampler contribute, at equal data, steps and seeds.

    python -m benchmarks.mllm_study --out runs/mllm_study                    # everything; again to go on
    python -m benchmarks.mllm_study --out runs/mllm_study --only cloc_prompter clip --seeds 0 --at-once 8 --device cuda

Encoders come first: CLOC and CLIP of the preset `tiny`, and a CLIP trained as long as it takes for its retrieval to
equal CLOC's.  Then each arm joins a frozen encoder to a small Llama from scratch and trains it on questions about
scenes, in two stages: half of the steps on naming regions alone, the rest on everything.  A run leaves
`OUT/NAME-SEED/result.json`, written last; runs with a result are skipped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import Run, has_result, run_all, this_program
from opencloc import files

NUM_THINGS = 120
WORLD = f"scenes:rich?num_things={NUM_THINGS}"
STEPS, BATCH_SIZE = 1500, 32
MICRO_BATCH_SIZE = 16  # rows of like length, with little padding: a quarter less time
SEEDS = (0, 1, 2)
NUM_IMAGES = 512  # scored, of scenes that no run trains on
RATE = 4e-3
COORDINATE_STEPS = 64  # one to a pixel
WIDTH, LAYERS, HEADS = 128, 3, 4  # of the Llama
EMBEDDING_STD, OUTPUT_STD = 0.7, 0.005  # at the start: what a layer adds must not drown what a token is
HEAD_STD = 0.02
FIRST_QUESTIONS = ("refer",)  # of the first stage: names are learned from nothing else so soon
QUESTIONS = ("refer", "ground", "ground", "verify", "exists", "caption")  # one that comes twice is asked twice as often
LONGER = (2, 4, 8)  # times the preset's steps, until the long CLIP retrieves as CLOC does
AT_ONCE = 64  # conversations answered together


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A run: an encoder to be trained, or (with `encoder`) a multimodal model upon one."""

    name: str
    title: str
    encoder: str | None = None
    sampler: str = "roi"
    refer: str = "coords"
    layer: int = -1
    blind: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms that have to have a result (same seed) first."""
        if self.encoder is not None:
            return (self.encoder,)
        return ("encoder_cloc",) if self.name == "encoder_clip_long" else ()


def arms() -> list[Arm]:
    """All runs, encoders first, in the order of the table."""
    cloc, clip, long = "encoder_cloc", "encoder_clip", "encoder_clip_long"
    return [
        Arm(name=cloc, title="CLOC"),
        Arm(name=clip, title="CLIP"),
        Arm(name=long, title="CLIP trained until it retrieves as CLOC"),
        Arm(name="no_image", title="no image", encoder=clip, blind=True),
        Arm(name="clip", title="CLIP, last layer", encoder=clip),
        Arm(name="clip_2", title="CLIP, last layer but one", encoder=clip, layer=-2),
        Arm(name="clip_long_2", title="CLIP trained longer, last layer but one", encoder=long, layer=-2),
        Arm(name="clip_roi_2", title="CLIP, last layer but one + RoIAlign", encoder=clip, refer="both", layer=-2),
        Arm(name="cloc", title="CLOC, last layer", encoder=cloc),
        Arm(name="cloc_2", title="CLOC, last layer but one", encoder=cloc, layer=-2),
        Arm(name="cloc_points", title="CLOC + points", encoder=cloc, sampler="points", refer="both"),
        Arm(name="cloc_roi", title="CLOC + RoIAlign", encoder=cloc, sampler="roi", refer="both"),
        Arm(name="cloc_prompter", title="CLOC + Prompter", encoder=cloc, sampler="prompter", refer="both"),
    ]


# -- one run -----------------------------------------------------------------------------------------------------------


def run(arm: Arm, seed: int, out: Path, steps: int, num_images: int, device: str) -> None:
    """Trains and scores one arm with one seed, leaving result.json in its folder."""
    folder = out / f"{arm.name}-{seed}"
    if arm.encoder is None:
        result = train_encoder(arm, seed, out, steps, num_images, device)
    else:
        result = train_model(arm, seed, out, steps, num_images, device)
    files.write_json(folder / "result.json", {"arm": arm.name, "seed": seed} | result)


def train_encoder(arm: Arm, seed: int, out: Path, steps: int, num_images: int, device: str) -> dict[str, Any]:
    """Trains an encoder of the preset `tiny`; its steps shrink with those of the arms."""
    from opencloc.presets import PRESETS
    from opencloc.train.loop import train

    preset = PRESETS["tiny"]()
    base = max(1, preset.steps * steps // STEPS)
    wanted = None
    if arm.name == "encoder_clip_long":
        wanted = json.loads((out / f"encoder_cloc-{seed}" / "result.json").read_text())["retrieval"]
    weight = preset.loss.region_weight if arm.name == "encoder_cloc" else 0.0
    result: dict[str, Any] = {}
    for times in (1,) if wanted is None else LONGER:
        folder = out / f"{arm.name}-{seed}" / f"times_{times}"
        changes: dict[str, Any] = {"out": str(folder), "seed": seed, "steps": base * times, "device": device}
        train(replace(preset, loss=replace(preset.loss, region_weight=weight), **changes))
        score = retrieval(folder / "model", num_images, device)
        result = {"steps": base * times, "retrieval": score, "model": str((folder / "model").relative_to(out))}
        if wanted is not None and score >= wanted:
            break
    return result | ({} if wanted is None else {"wanted_retrieval": wanted})


def retrieval(folder: Path, num_images: int, device: str) -> float:
    """Image-to-text recall at 1 among the captions of so many scenes."""
    from opencloc.data.sources.spec import open_source
    from opencloc.eval.encoders import load_encoder
    from opencloc.eval.report import flat_metrics
    from opencloc.eval.run import evaluate
    from opencloc.eval.sets.source import source_set

    encoder = load_encoder(folder, "crop", device=device)
    data = source_set(open_source(f"{WORLD}&seed=1&image_px=64"), "scenes")
    found = flat_metrics(evaluate(encoder, data, ("image-retrieval",), num_images=num_images))[encoder.name]
    return next(value for name, value in found.items() if "i2t" in name and name.endswith("1"))


def train_model(arm: Arm, seed: int, out: Path, steps: int, num_images: int, device: str) -> dict[str, Any]:
    """Builds, trains and scores a multimodal model: at a third of the steps, within the first stage, and at the end."""
    from opencloc.mllm.build import BuildConfig, build
    from opencloc.mllm.config import MllmDataConfig, MllmOptimConfig, MllmTrainConfig, Rates
    from opencloc.mllm.train import train

    folder = out / f"{arm.name}-{seed}"
    encoder = out / json.loads((out / f"{arm.encoder}-{seed}" / "result.json").read_text())["model"]
    start = folder / "start"
    if not start.exists():
        config = BuildConfig(
            encoder=str(encoder),
            llm=str(language_model(folder / "llm", seed)),
            out=str(start),
            sampler=arm.sampler,  # pyright: ignore[reportArgumentType]
            refer=arm.refer,  # pyright: ignore[reportArgumentType]
            layer=arm.layer,
            coordinate_steps=COORDINATE_STEPS,
            shared_positions=True,
            seed=seed,
        )
        build(config)
        if arm.blind:
            make_blind(start)
    third, half, model = max(1, steps // 3), max(1, steps // 2), start
    stages = (("names", FIRST_QUESTIONS, half), ("all", QUESTIONS, max(1, steps - half)))
    for number, (stage, questions, count) in enumerate(stages):
        config = MllmTrainConfig(
            model=str(model),
            out=str(folder / stage),
            data=MllmDataConfig(train=(WORLD,), questions=questions, num_workers=1 if device == "cuda" else 0),
            rates=Rates(projector=RATE, sampler=RATE, language_model=RATE),
            optim=MllmOptimConfig(name="muon", weight_decay=0.1, warmup_steps=min(50, count)),
            steps=count,
            batch_size=BATCH_SIZE,
            micro_batch_size=MICRO_BATCH_SIZE,
            attention="eager" if device == "cpu" else "sdpa",
            device=device,
            seed=len(stages) * seed + number,
            checkpoint_every=third,
            keep_checkpoints=2,  # the one at a third and the last
        )
        model = train(config)
    early = folder / "names" / "checkpoints" / f"step_{third:07d}"
    return {
        "steps": steps,
        "third": score(early, num_images, device),
        "final": score(model, num_images, device),
    }


def language_model(folder: Path, seed: int) -> Path:
    """A Llama from scratch and its tokenizer of whole words, which also has the numbers of boxes."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from opencloc.mllm.boxes_text import coordinate_numbers

    special = ["<pad>", "<end>", "<start>", "<unk>"]
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_punctuation(), "isolated")]
    )
    seen = dict.fromkeys(word for text in training_texts() for word, _ in pieces.pre_tokenize_str(text))
    words = [*special, *map(str, coordinate_numbers(COORDINATE_STEPS)), *sorted(seen)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pieces
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=AddedToken("<pad>", special=True),
        eos_token=AddedToken("<end>", special=True),
        bos_token=AddedToken("<start>", special=True),
        unk_token=AddedToken("<unk>", special=True),
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        initializer_range=WIDTH**-0.5,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=OUTPUT_STD)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=HEAD_STD)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def training_texts() -> Iterator[str]:
    """Texts with every word that the questions and answers of the study have."""
    from opencloc.data.sources.spec import open_source
    from opencloc.mllm import templates

    source: Any = open_source(WORLD)
    yield "USER: ASSISTANT: , . ; : ? [ ] 0 999"
    for name in source.config.class_names():
        yield f"{name} {templates.ground(name)} {templates.verify(name)} {templates.YES} {templates.NO}"
    yield f"{templates.refer()} {templates.CAPTION} some a an".replace("{region:0}", "")
    for i in range(1000):
        yield from source[i].captions


def _punctuation() -> Any:
    from tokenizers import Regex

    return Regex(r"[\[\],.;:?]")


def make_blind(folder: Path) -> None:
    """Zeroes the weights that read pixels, so that all images look the same."""
    from opencloc.mllm.build import save
    from opencloc.mllm.model import RegionLlava
    from opencloc.mllm.processor import RegionLlavaProcessor

    model = RegionLlava.from_pretrained(folder)
    with torch.no_grad():
        model.model.vision_tower.embeddings.patch_embedding.weight.zero_()
    save(model, RegionLlavaProcessor.from_pretrained(folder), folder)


# -- scores ------------------------------------------------------------------------------------------------------------


def score(folder: Path, num_images: int, device: str) -> dict[str, float]:
    """Shares of right answers on scenes that nobody trained on; every question is a conversation of its own."""
    from opencloc.boxes import Letterbox, iou
    from opencloc.data.sources.spec import open_source
    from opencloc.devices import choose_device
    from opencloc.mllm import templates
    from opencloc.mllm.boxes_text import find_boxes
    from opencloc.mllm.model import RegionLlava
    from opencloc.mllm.processor import RegionLlavaProcessor
    from opencloc.model.prompts import Box

    model = RegionLlava.from_pretrained(folder).to(choose_device(device)).eval()
    processor = RegionLlavaProcessor.from_pretrained(folder)
    source: Any = open_source(f"{WORLD}&seed=1", image_px=processor.image_size)
    ask = templates.Questions(templates.names_of(source))
    asked: list[tuple[str, Any, Any]] = []  # kind, conversation, what is right
    for number in range(num_images):
        sample, rng = source[number], random.Random(number)
        only = templates.occurring_once(sample.texts)
        if only:
            k = only[rng.randrange(len(only))]
            box, text = Box(*map(float, sample.boxes[k])), sample.texts[k]
            asked.append(("refer", question(sample, templates.refer(), box), text))
            asked.append(("ground", question(sample, templates.ground(text)), (sample, k)))
            asked.append(("exists", question(sample, templates.exists(text)), templates.YES))
            for absent in ask.absent(sample, rng, 1):
                asked.append(("exists", question(sample, templates.exists(absent)), templates.NO))
        asked.append(("caption", question(sample, templates.CAPTION), sample))
    right: dict[str, list[float]] = {}
    for kind, answer, truth in answered(model, processor, asked):
        if kind == "refer":
            right.setdefault("refer", []).append(squeezed(answer) == squeezed(truth))
        elif kind == "exists":
            right.setdefault("exists", []).append(answer == truth)
            right.setdefault("said yes", []).append(answer == templates.YES)
        elif kind == "ground":
            sample, k = truth
            letterbox = Letterbox(width_px=sample.image.width, height_px=sample.image.height)
            box = torch.from_numpy(letterbox.to_square(sample.boxes[k]))
            found = find_boxes(answer).boxes
            overlap = float(iou(torch.tensor(found[0]), box)) if found else 0.0
            right.setdefault("boxes read", []).append(bool(found))
            right.setdefault("ground", []).append(overlap >= 0.5)
            right.setdefault("mean IoU", []).append(overlap)
        else:
            said = {name for name in ask.names if f" {squeezed(name)} " in f" {squeezed(answer)} "}
            there = set(truth.texts)
            right.setdefault("caption recall", []).append(len(said & there) / len(there))
            right.setdefault("caption precision", []).append(len(said & there) / max(1, len(said)))
    return {name: sum(map(float, values)) / len(values) for name, values in right.items()}


def question(sample: Any, text: str, *prompts: Any) -> Any:
    """A conversation of one question."""
    from opencloc.mllm.conversation import Conversation, Turn

    return Conversation(image=sample.image, turns=(Turn("user", text),), prompts=prompts)


@torch.no_grad()
def answered(model: Any, processor: Any, asked: Sequence[tuple[str, Any, Any]]) -> Iterator[tuple[str, str, Any]]:
    """(kind, answer, truth) of every question, in batches of one kind, the most likely token at a time."""
    lengths = {"refer": 8, "ground": 16, "exists": 3, "caption": 60}
    for kind, length in lengths.items():
        own = [one for one in asked if one[0] == kind]
        for first in range(0, len(own), AT_ONCE):
            part = own[first : first + AT_ONCE]
            batch = processor([conversation for _, conversation, _ in part]).to(model.device)
            ids = model.generate(**batch, max_new_tokens=length, do_sample=False)
            answers = processor.decode_answers(ids, batch["input_ids"].shape[1])
            for (_, _, truth), answer in zip(part, answers, strict=True):
                yield kind, answer, truth


def squeezed(text: str) -> str:
    """Words alone, one space between them."""
    return " ".join(text.replace(",", " ").replace(".", " ").split())


# -- all runs ----------------------------------------------------------------------------------------------------------


def do_all(chosen: list[Arm], arguments: argparse.Namespace) -> int:
    """Does every arm and seed that has no result yet; returns how many failed."""
    out, known = arguments.out, {arm.name: arm for arm in chosen}
    todo = [(arm.name, seed) for seed in arguments.seeds for arm in chosen if not has_result(out, (arm.name, seed))]
    print(f"{len(todo)} runs to do, {arguments.at_once} at a time", flush=True)
    command = this_program("benchmarks.mllm_study", "--out", str(out), "--steps", str(arguments.steps))
    command += ["--num-images", str(arguments.num_images), "--device", arguments.device]

    def needs(run: Run) -> list[Run]:
        return [(name, run[1]) for name in known[run[0]].needs]

    return run_all(todo, out, arguments.at_once, program=command, needs=needs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mllm_study"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of arms; the encoders they need are added; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--num-images", type=int, default=NUM_IMAGES, help="scenes to score on")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one CPU thread each")
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="do this one run, in this process")
    arguments = parser.parse_args()
    known = {arm.name: arm for arm in arms()}
    for name in [*(arguments.only or []), *(arguments.run or [])[:1]]:
        if name not in known:
            parser.error(f"unknown arm {name!r}; there are: {', '.join(known)}")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        arm, seed = known[arguments.run[0]], int(arguments.run[1])
        run(arm, seed, arguments.out, arguments.steps, arguments.num_images, arguments.device)
        return
    wanted = set(arguments.only or known)
    for _ in range(2):
        wanted |= {name for arm in known.values() if arm.name in wanted for name in arm.needs}
    sys.exit(1 if do_all([arm for arm in known.values() if arm.name in wanted], arguments) else 0)


if __name__ == "__main__":
    main()

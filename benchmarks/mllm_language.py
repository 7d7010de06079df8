"""The language model of the multimodal study: a small Llama from scratch, taught to read before it is shown an image.

Real language models can look a word up in what they have read; a model from scratch does not learn that from questions
about images.  So it first learns from scenes written down: a table of words that has a cell for each patch, with the
name of the thing in that cell or a full stop, each at its place in the position basis.  At first statements follow,
`apple 12 30 44 60` or `12 30 44 60 apple`, where name and numbers are neighbours; later the study's questions.  No
encoder has a part in it, and all arms of a seed begin with the same language model.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.mllm_scores import score
from opencloc import files
from opencloc.boxes import Letterbox
from opencloc.config import OptimConfig
from opencloc.data.sources.spec import open_source
from opencloc.devices import computes_in_bf16
from opencloc.errors import BadSample
from opencloc.mllm import templates
from opencloc.mllm.boxes_text import box_text, coordinate_numbers
from opencloc.mllm.build import start_numbers_from_basis
from opencloc.mllm.chat_format import chat_format
from opencloc.mllm.config import MllmOptimConfig, Rates
from opencloc.mllm.model import IGNORED, position_basis
from opencloc.mllm.parts import make_optimizer
from opencloc.mllm.processor import IMAGE, RegionLlavaProcessor, Row
from opencloc.model.prompts import patch_centres
from opencloc.progress import Meter
from opencloc.train.optim import learning_rate

NUM_THINGS = 120
WORLD = f"scenes:rich?num_things={NUM_THINGS}"
IMAGE_PX, GRID = 64, (8, 8)  # of the preset `tiny`
COORDINATE_STEPS = 64  # one to a pixel
QUESTIONS = ("refer", "ground", "ground", "verify", "exists", "caption")  # one that comes twice is asked twice as often
WIDTH, LAYERS, HEADS = 128, 3, 4
EMBEDDING_STD, OUTPUT_STD = 0.7, 0.005  # at the start: what a layer adds must not drown what a token is
HEAD_STD = 0.02
STATEMENT_SHARE = 0.4  # of the steps
BATCH_SIZE, RATE, WEIGHT_DECAY, WARMUP_STEPS = 32, 4e-3, 0.1, 50


def language_model(folder: Path, seed: int, steps: int, num_scenes: int, device: str) -> dict[str, float]:
    """Trains the model, writes it and its tokenizer to `folder` and returns how well it reads scenes that are new."""
    tokenizer = words_tokenizer()
    model = new_llama(len(tokenizer), seed)
    reader = Reader(model, tokenizer, device)
    reader.train(steps, seed)
    shares = reader.score(num_scenes)
    with files.new_folder(folder) as partial:
        model.cpu().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return shares


def new_scenes() -> Any:
    """Scenes that nothing is trained on, for scores."""
    return open_source(f"{WORLD}&seed=1", image_px=IMAGE_PX)


def words_tokenizer() -> Any:
    """A tokenizer of whole words, which also has the numbers of boxes."""
    special = ["<pad>", "<end>", "<start>", "<unk>"]
    punctuation = pre_tokenizers.Split(Regex(r"[\[\],.;:?]"), "isolated")
    pieces = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), punctuation])
    seen = dict.fromkeys(word for text in training_texts() for word, _ in pieces.pre_tokenize_str(text))
    words = [*special, *map(str, coordinate_numbers(COORDINATE_STEPS)), *sorted(seen)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pieces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=AddedToken("<pad>", special=True),
        eos_token=AddedToken("<end>", special=True),
        bos_token=AddedToken("<start>", special=True),
        unk_token=AddedToken("<unk>", special=True),
    )


def training_texts() -> Iterator[str]:
    """Texts with every word that the questions and answers of the study have."""
    source: Any = open_source(WORLD)
    yield "USER: ASSISTANT: , . ; : ? [ ] 0 999"
    for name in source.config.class_names():
        yield f"{name} {templates.ground(name)} {templates.verify(name)} {templates.YES} {templates.NO}"
    yield f"{templates.refer()} {templates.CAPTION} some a an".replace("{region:0}", "")
    for i in range(1000):
        yield from source[i].captions


def new_llama(num_words: int, seed: int) -> Any:
    """A Llama whose embeddings stay audible and whose attention starts as a search for tokens alike
    (Trockman & Kolter 2023, arXiv 2305.09828)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_words,
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
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.q_proj.weight)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=HEAD_STD)
    return model


class Reader:
    """Teaches a language model, in place, to read scenes that are written as tables of words."""

    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        table = model.get_input_embeddings().weight
        table.requires_grad_(False)  # `build` starts the numbers from the basis again: they must be what they are here
        std = float(table.std())
        start_numbers_from_basis(table, tokenizer, COORDINATE_STEPS, GRID, std)
        self.model, self.device = model.to(device), torch.device(device)
        self.bf16 = computes_in_bf16("auto", self.device)
        model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
        self.centres = patch_centres(GRID)
        self.places = position_basis(self.centres, WIDTH, GRID, std).to(device)
        self.tokenizer = tokenizer
        with_image = copy.deepcopy(tokenizer)
        with_image.add_special_tokens({"additional_special_tokens": [IMAGE]})
        self.processor = RegionLlavaProcessor(
            with_image,
            image_size=IMAGE_PX,
            num_image_tokens=GRID[0] * GRID[1],
            refer="coords",
            coordinate_steps=COORDINATE_STEPS,
            chat=asdict(chat_format(tokenizer)),
        )
        self.scenes: Any = open_source(WORLD, image_px=IMAGE_PX)
        self.questions = templates.Questions(templates.names_of(self.scenes), QUESTIONS)
        names = [".", *self.questions.names]
        self.number_of = {name: number for number, name in enumerate(names)}
        means = torch.stack([table[self.ids(name)].mean(0) for name in names])
        self.cells = F.rms_norm(means.detach(), (WIDTH,)) * std  # as image tokens are before their places are added

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def train(self, steps: int, seed: int) -> None:
        """Statements, then questions."""
        statements = max(1, round(STATEMENT_SHARE * steps))
        self._stage("statements", self.statement, statements, 2 * seed)
        self._stage("questions", self.question, max(1, steps - statements), 2 * seed + 1)

    def _stage(self, name: str, make: Any, steps: int, seed: int) -> None:
        optim = MllmOptimConfig(name="muon", weight_decay=WEIGHT_DECAY, warmup_steps=min(WARMUP_STEPS, steps))
        optimizer = make_optimizer(self.model, Rates(language_model=RATE), optim)
        schedule = OptimConfig(lr=1.0, warmup_steps=optim.warmup_steps)
        rng, number = random.Random(seed), seed << 32
        self.model.train()
        with Meter(name, steps, unit="steps") as meter:
            for step in range(steps):
                made: list[Any] = []
                while len(made) < BATCH_SIZE:
                    number += 1
                    try:
                        sample = self.scenes[number]
                        made.append((make(sample, rng), sample))
                    except BadSample:
                        continue  # nothing to ask about
                made.sort(key=lambda one: len(one[0].input_ids))
                total = sum(row.num_supervised for row, _ in made)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, schedule) * group["rate"]
                mean = 0.0
                for part in (made[: BATCH_SIZE // 2], made[BATCH_SIZE // 2 :]):
                    loss = self._loss(*zip(*part, strict=True)) / total
                    loss.backward()
                    mean += loss.item()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                meter.note = f"loss {mean:.3f}"
                meter.advance()

    def _loss(self, rows: Sequence[Any], samples: Sequence[Any]) -> Tensor:
        """The sum over the learned tokens."""
        batch = self._batch(rows, samples, for_training=True)
        targets = batch.pop("labels")[:, 1:]
        learned = targets != IGNORED
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.model(**batch).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1][learned])
        return F.cross_entropy(logits.float(), targets[learned], reduction="sum")

    def _batch(self, rows: Sequence[Any], samples: Sequence[Any], *, for_training: bool) -> dict[str, Tensor]:
        batch = self.processor.pad(rows, for_training=for_training).to(self.device)
        ids = batch["input_ids"]
        is_cell = ids == self.processor.image_token_id
        embeddings = self.model.get_input_embeddings()(ids.masked_fill(is_cell, 0))
        cells = torch.stack([self.table(sample) for sample in samples]).flatten(0, 1)
        batch = {name: batch[name] for name in ("attention_mask", "labels") if name in batch}
        return batch | {"inputs_embeds": embeddings.masked_scatter(is_cell[..., None], cells)}

    def table(self, sample: Any) -> Tensor:
        """The scene as a table of words (N, W): for each cell the name of what covers its centre, or a full stop.

        The cell nearest to a thing's centre is the thing's, however small it is; later things cover earlier ones.
        """
        letterbox = Letterbox(width_px=sample.image.width, height_px=sample.image.height)
        found = torch.zeros(len(self.centres), dtype=torch.long)
        for box, name in zip(torch.as_tensor(letterbox.to_square(sample.boxes)), sample.texts, strict=True):
            low, high = box[:2].float(), box[2:].float()
            inside = ((self.centres >= low) & (self.centres <= high)).all(1)
            inside[(self.centres - (low + high) / 2).norm(dim=1).argmin()] = True
            found[inside] = self.number_of[name]
        return self.cells[found.to(self.device)] + self.places

    def statement(self, sample: Any, rng: random.Random) -> Any:
        """Where each thing is, or what is there: `apple 12 30 44 60. 3 4 9 11 dog.`; the second half is learned."""
        letterbox = Letterbox(width_px=sample.image.width, height_px=sample.image.height)
        ids = [self.processor.image_token_id] * (GRID[0] * GRID[1])
        labels, stop = [IGNORED] * len(ids), self.ids(".")
        only = templates.occurring_once(sample.texts)
        if not only:
            raise BadSample("nothing to ask about", sample.key, "no thing occurs once")
        rng.shuffle(only)
        for k in only:
            name = self.ids(sample.texts[k])
            box = box_text(letterbox.to_square(sample.boxes[k]).tolist(), COORDINATE_STEPS)
            numbers = self.ids(" ".join(re.findall(r"\d+", box)))
            given, learned = (name, numbers) if rng.random() < 0.5 else (numbers, name)
            ids += [*given, *learned, *stop]
            labels += [*[IGNORED] * len(given), *learned, *[IGNORED] * len(stop)]
        return Row(input_ids=ids, labels=labels, square=None, boxes=np.zeros((0, 4)), kinds=[], masks=[])

    def question(self, sample: Any, rng: random.Random) -> Any:
        return self.processor.encode(self.questions(sample, rng), for_training=True)

    @torch.no_grad()
    def score(self, num_scenes: int) -> dict[str, float]:
        """Shares of right answers about scenes that it has not read."""
        self.model.eval()

        def answer(samples: Sequence[Any], conversations: Sequence[Any], length: int) -> list[str]:
            rows = [self.processor.encode(one, for_training=False) for one in conversations]
            ids = self.model.generate(
                **self._batch(rows, samples, for_training=False), max_new_tokens=length, do_sample=False
            )
            return self.processor.decode_answers(ids)

        return score(answer, new_scenes(), num_scenes)

"""What a run will take, from formulas, before a GPU is rented: parameters, arithmetic, memory and step time.

    python -m benchmarks.estimate                  # the tables of docs/guides/scale.md
    python -m benchmarks.estimate --gpus 16 --memory-gb 40 --tflops 150

Tests compare the formulas with small models: parameters exactly, arithmetic with torch's counter, activations with what
autograd keeps.  The formulas hold for CLIP towers with the default Prompter and box head.  The speed of a GPU is an
input, not a finding: `--tflops` is what it reaches in the towers, some 40 % of an H100's 989 in bf16.

Left out, all small: the Prompter's arithmetic (under 1 % of a tower's), norms, AdamW, and communication that overlaps
with computation.  What Muon adds has a table of its own.  Data loading must keep up by itself.

Symbols: B images of the batch over all GPUs, M regions per image, R = B * M, W GPUs, N patches, D and E widths of the
vision tower and of the joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from opencloc.config import ModelConfig, TrainConfig
from opencloc.contrastive import DEVICE_TILE
from opencloc.presets import vit_b16, vit_h14_336, vit_l14_336

CAPTION_TOKENS = 47  # published captions have 36 to 45 (table 7 there), start and end come on top
REGION_TEXT_TOKENS = 4  # published region texts have 2.1, likewise
# bytes that a transformer layer keeps for its backward pass, per token and unit of width, fused attention; by precision
KEPT = {"fp32": 64, "bf16": 40}
STATE_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments in float32
TILES_AT_ONCE = 4  # of the loss, in float32


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory is that of one GPU, in bytes."""

    parameters: int
    flops: float  # of a step on all GPUs, multiplications and additions
    loss_flops: float  # of which the two contrastive losses
    state_memory: float  # weights, gradients, moments
    image_memory: float  # activations of one image and its texts
    loss_memory: float
    micro_batch: int  # images that fit at once, a power of two or the GPU's whole share; 0: not even one
    seconds: float  # of a step

    @property
    def memory(self) -> float:
        """The whole of it at this micro-batch."""
        return self.state_memory + self.loss_memory + self.micro_batch * self.image_memory


def estimate(
    config: TrainConfig, *, gpus: int, memory_gb: float = 80.0, tflops: float = 400.0, precision: str = "bf16"
) -> Estimate:
    """What a step of the run takes on `gpus` GPUs of this memory that reach `tflops`.

    The largest micro-batch that leaves a tenth of the memory free is taken; below the GPU's share of the batch every
    embedding is computed twice (gradient caching).
    """
    model, share = config.model, config.batch_size // gpus
    parameters = num_parameters(model)
    state = STATE_BYTES * parameters / (gpus if config.sharding == "fsdp" else 1)
    if config.sharding == "fsdp":  # the layer at work and the next are whole on every GPU, weights and gradients
        state += 2 * 8 * layer_parameters(max(model.vision_width, model.text_width))
    per_image = image_memory(config, precision)
    loss = loss_memory(config, gpus)
    room = int((0.9 * memory_gb * 1e9 - state - loss) // per_image)
    micro_batch = share if room >= share else 2 ** (room.bit_length() - 1) if room > 0 else 0
    passes = 3 if micro_batch == share else 4  # forward and backward; forward once more
    if config.activation_checkpointing:
        passes += 1
    towers = config.batch_size * forward_flops(config)
    in_loss = loss_flops(config)
    flops = passes * towers + in_loss
    return Estimate(
        parameters=parameters,
        flops=flops,
        loss_flops=in_loss,
        state_memory=state,
        image_memory=per_image,
        loss_memory=loss,
        micro_batch=micro_batch,
        seconds=flops / gpus / (tflops * 1e12),
    )


def layer_parameters(width: int) -> int:
    """Of a transformer layer: attention 4 (D^2 + D), MLP 8 D^2 + 5 D, two norms 4 D."""
    return 12 * width**2 + 13 * width


def num_parameters(model: ModelConfig) -> int:
    """Of the whole model."""
    d, w, e = model.vision_width, model.text_width, model.embed_dim
    patches = (model.side_px // model.patch_size) ** 2
    vision = model.vision_layers * layer_parameters(d) + d * (3 * model.patch_size**2 + 1 + patches + 1 + 4 + e)
    text = model.text_layers * layer_parameters(w) + w * (model.vocab_size + model.text_length + 2 + e)
    prompts = 3 * d
    slopes = model.prompter_heads if model.prior_slope is not None else 0
    prompter = 4 * (d * d + d) + 8 * d * d + 5 * d + 4 * 2 * d + slopes + d * e
    box_head = d * d + d + 4 * d + 4
    return vision + text + prompts + prompter + box_head + 3  # three logit scales


def forward_flops(config: TrainConfig) -> float:
    """Of the towers, for one image, its caption and its region texts."""
    model = config.model
    patches = (model.side_px // model.patch_size) ** 2
    d, w = model.vision_width, model.text_width
    embed = 2 * patches * 3 * model.patch_size**2 * d
    layers = model.vision_layers * layer_flops(config.data.kept_patches(patches) + 1, d)
    vision = embed + layers + 2 * d * model.embed_dim
    texts = [CAPTION_TOKENS] + [REGION_TEXT_TOKENS] * _num_regions(config)
    text = sum(model.text_layers * layer_flops(tokens, w) + 2 * w * model.embed_dim for tokens in texts)
    return vision + text


def layer_flops(tokens: int, width: int) -> float:
    """Of a layer's forward pass over one sequence: 24 n D^2 in the linear maps, 4 n^2 D in the attention."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def loss_flops(config: TrainConfig) -> float:
    """Of both contrastive losses, all ranks together, forward and backward.

    Every product of rows by rows costs 2 n^2 E.  Images and captions: s, s again, and two gradients.  Regions and
    texts: the same, and each time s is computed the cosines of the texts for the conflict filter as well.
    """
    e, images = config.model.embed_dim, config.batch_size
    regions = images * _num_regions(config)
    return 2 * e * (4 * images**2 + 6 * regions**2 + regions * e)


def image_memory(config: TrainConfig, precision: str) -> float:
    """Bytes of activations that one image and its texts leave for the backward pass."""
    model = config.model
    patches = (model.side_px // model.patch_size) ** 2
    image_tokens = config.data.kept_patches(patches) + 1
    text_tokens = CAPTION_TOKENS + REGION_TEXT_TOKENS * _num_regions(config)
    total = 0.0
    towers = (model.vision_width, model.vision_layers, image_tokens), (model.text_width, model.text_layers, text_tokens)
    for width, layers, tokens in towers:
        kept = KEPT[precision]
        per_layer = 4 * layers + kept if config.activation_checkpointing else kept * layers
        total += per_layer * width * tokens
    return total


def loss_memory(config: TrainConfig, gpus: int) -> float:
    """Bytes of the larger of the two losses in its backward pass on one GPU: embeddings, their gradients, tiles.

    The keys of all ranks and their gradients; own queries, scaled queries, their gradients and the own keys' share.
    """
    rows = config.batch_size * max(1, _num_regions(config))
    own = rows / gpus
    tile = min(own, DEVICE_TILE) * min(rows, DEVICE_TILE)
    return 4 * (config.model.embed_dim * (2 * rows + 4 * own) + TILES_AT_ONCE * tile)


def muon_flops(model: ModelConfig, ranks: int = 1) -> float:
    """Of the orthogonalization of the layers' matrices, once per step whatever the batch, on the busiest of `ranks`.

    An iteration takes 4 m^2 n + 2 m^3 for an m x n matrix, m <= n, and there are five.  A layer has four matrices D x D
    (30 D^3 each), one 4 D x D and one D x 4 D (90 D^3).  Ranks share those of a shape, matrix by matrix.
    """
    towers = (model.vision_layers, model.vision_width), (model.text_layers, model.text_width)
    return sum((30 * ceil(4 * layers / ranks) + 180 * ceil(layers / ranks)) * width**3 for layers, width in towers)


def _num_regions(config: TrainConfig) -> int:
    return config.data.num_regions if config.loss.region_weight else 0


def table(gpus: list[int], memory_gb: float, tflops: float) -> str:
    """The published models at the published batch, as Markdown."""
    lines = [
        "| model | parameters | GPUs | sharding | weights, moments | activations / image | losses | images at once "
        "| GPU memory | s / step | days |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, preset in (("B/16 224", vit_b16()), ("L/14 336", vit_l14_336()), ("H/14 336", vit_h14_336())):
        for count in gpus:
            config = replace(preset, sharding="ddp" if preset.model.vision_layers == 12 else "fsdp")
            found = estimate(config, gpus=count, memory_gb=memory_gb, tflops=tflops)
            share = config.batch_size // count
            cells = [
                name,
                f"{found.parameters / 1e6:,.1f} M",
                f"{count:,}",
                config.sharding,
                f"{found.state_memory / 1e9:.1f} GB",
                f"{found.image_memory / 1e6:,.0f} MB",
                f"{found.loss_memory / 1e9:.1f} GB",
                f"{found.micro_batch:,} of {share:,}",
                f"{found.memory / 1e9:.0f} GB",
                f"{found.seconds:.2f}",
                f"{found.seconds * config.steps / 86_400:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def muon_table(gpus: list[int], tflops: float) -> str:
    """What Muon adds to a step where every GPU does all of it and where each does its share, as Markdown."""
    lines = ["| model | Muon | GPUs | of the step, ddp | of the step, fsdp |", "|---|---:|---:|---:|---:|"]
    for name, preset in (("B/16 224", vit_b16()), ("L/14 336", vit_l14_336()), ("H/14 336", vit_h14_336())):
        for count in gpus:
            step = estimate(replace(preset, sharding="fsdp"), gpus=count, tflops=tflops).seconds * tflops * 1e12
            shares = (f"{100 * muon_flops(preset.model, ranks) / step:.2f} %" for ranks in (1, count))
            lines.append(f"| {name} | {muon_flops(preset.model) / 1e12:.1f} TFLOP | {count:,} | {' | '.join(shares)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--memory-gb", type=float, default=80.0)
    parser.add_argument("--tflops", type=float, default=400.0)
    args = parser.parse_args()
    print(table(args.gpus, args.memory_gb, args.tflops))
    print(f"\n{muon_table(args.gpus, args.tflops)}")

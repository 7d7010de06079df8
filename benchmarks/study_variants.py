"""The rows of the study (`benchmarks/study.py`): what is trained, in which world, against what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_PX, NUM_THINGS = 64, 30
WORLDS = {
    "things": f"num_things={NUM_THINGS}&attributes=colour&image_px={IMAGE_PX}",  # each thing in 9 colours
    "pairs": f"context=next_to&num_things=16&image_px={IMAGE_PX}",  # large things, told by what they stand next to
}
NOISE = {
    "exact": "",
    "noisy": "&box_jitter=0.1&wrong_text=0.1&missing_region=0.25",
    "very noisy": "&box_jitter=0.2&wrong_text=0.3&missing_region=0.5",
}
STEPS = 500
FINE_TUNING_STEPS = 200
TUNED = ("cross", "roi", "clip_crops")
LEARNING_RATES = (7.5e-4, 1.5e-3, 3e-3)
TUNING_SEED = 100
GCE_Q = 0.5  # of the rows with a loss for noisy labels


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the study's table."""

    name: str
    title: str
    group: str
    world: str = "things"
    noise: str = "noisy"
    fields: Mapping[str, Any] = field(default_factory=dict)  # dotted fields of TrainConfig that differ from the base's
    tuned_as: str = "cross"  # one of `TUNED`
    crops: bool = False  # also trains on the crops of the regions, as many as whole images
    labels: str | None = None  # labels made by `opencloc label` instead of the scenes' own
    start: str | None = None  # variant whose trained model (same seed) it starts from
    like: str | None = None  # variant that it is but for the number of steps: as many as the CPU time of `cross` allows

    def needs(self, seed: int) -> list[tuple[str, int]]:
        """Runs that have to have a result first."""
        first = (
            [] if "optim.lr" in self.fields else [(f"{self.tuned_as}_lr{lr:g}", TUNING_SEED) for lr in LEARNING_RATES]
        )
        return first + ([(self.start, seed)] if self.start else [])


def variants() -> list[Variant]:
    """All rows, in the order of the table."""
    clip_only = {"loss.region_weight": 0.0}
    clip = Variant(name="clip", title="CLIP", group="method", fields=clip_only, tuned_as="clip_crops")
    clip_crops = dataclasses.replace(
        clip,
        name="clip_crops",
        title="CLIP + region crops as images",
        fields=clip_only | {"batch_size": 64},
        crops=True,
    )
    roi = Variant(name="roi", title="CLOC, RoIAlign", group="method", fields={"model.prompter": "roi"}, tuned_as="roi")
    encoder = Variant(
        name="encoder", title="CLOC, published Prompter", group="method", fields={"model.prompter": "encoder"}
    )
    pool = Variant(name="pool", title="CLOC, pool Prompter", group="method", fields={"model.prompter": "pool"})
    cross = Variant(name="cross", title="CLOC, cross Prompter (default)", group="method")
    same_time = [
        dataclasses.replace(v, name=f"{v.name}_same_time", group="equal CPU time", like=v.name)
        for v in (clip_crops, encoder)
    ]
    rows = [clip, clip_crops, roi, encoder, pool, cross, *same_time]
    crops_same_time = same_time[0]
    robust = [
        dataclasses.replace(
            v,
            name=f"{v.name}_robust",
            title=f"{v.title}, q = {GCE_Q}",
            group="loss for noisy labels",
            fields={**v.fields, "loss.gce_q": GCE_Q},
        )
        for v in (roi, cross)
    ]
    rows += robust
    for noise, chosen in (
        ("exact", (clip_crops, crops_same_time, roi, cross, *robust)),
        ("very noisy", (roi, cross, *robust)),
    ):
        rows += [
            dataclasses.replace(v, name=f"{v.name}_{noise.replace(' ', '_')}", group=f"{noise} labels", noise=noise)
            for v in chosen
        ]
    rows += [
        dataclasses.replace(v, name=f"{v.name}_pairs", group="pairs, told by context", world="pairs")
        for v in (clip_crops, crops_same_time, roi, cross)
    ]
    clip_long = dataclasses.replace(
        clip,
        name="clip_long",
        title="CLIP, four times the steps",
        group="start",
        fields=clip_only | {"steps": 4 * STEPS},
    )
    rows.append(clip_long)
    for start, title in ((clip, "CLIP"), (clip_long, "the CLIP of four times the steps")):
        rows += [
            Variant(
                name=f"from_{start.name}_{prompter}",
                title=f"{prompter} on {title}, {FINE_TUNING_STEPS} steps",
                group="start",
                fields={"model.prompter": prompter, "steps": FINE_TUNING_STEPS},
                start=start.name,
            )
            for prompter in ("cross", "pool", "pool_cross")
        ]
    ablations: list[tuple[str, str, dict[str, Any]]] = [
        ("adamw", "AdamW in place of Muon", {"optim.name": "adamw", "optim.lr": 1.5e-3}),
        ("no_filter", "no conflict filter", {"loss.conflict_filter": "none"}),
        ("identical_filter", "filter of identical texts only", {"loss.conflict_filter": "identical"}),
        ("no_grounding", "no grounding loss", {"loss.grounding_weight": 0.0}),
        ("published_grounding", "published box head and loss", {"model.box_head": "mlp", "loss.grounding": "squared"}),
        ("mlp_l1_giou", "published box head, L1 + GIoU", {"model.box_head": "mlp"}),
        ("m1", "M = 1", {"data.num_regions": 1}),
        ("m2", "M = 2", {"data.num_regions": 2}),
        ("m8", "M = 8", {"data.num_regions": 8}),
        ("no_prior", "no spatial prior", {"model.prior_slope": None}),
        ("no_shared_positions", "no shared position basis", {"model.shared_positions": False}),
    ]
    rows += [Variant(name=name, title=title, group="ablation", fields=fields) for name, title, fields in ablations]
    rows += [
        Variant(name="vesl", title="VESL: phrases of captions", group="labels", labels="nouns"),
        Variant(name="n_grams", title="n-grams of alt-texts", group="labels", labels="n-grams"),
    ]
    return rows


def tuning() -> list[Variant]:
    """The runs that choose the learning rates."""
    by_name = {variant.name: variant for variant in variants()}
    return [
        dataclasses.replace(
            by_name[name],
            name=f"{name}_lr{lr:g}",
            group="learning rate",
            fields={**by_name[name].fields, "optim.lr": lr},
        )
        for name in TUNED
        for lr in LEARNING_RATES
    ]

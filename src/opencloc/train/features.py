"""Whether a run may train on stored features: its vision tower must be frozen, and the one that made them."""

from __future__ import annotations

from collections.abc import Sequence

from opencloc.config import TrainConfig
from opencloc.data.sample import Source
from opencloc.data.sources.features import Features, how_made
from opencloc.model import towers
from opencloc.model.cloc import ClocModel
from opencloc.model.fingerprint import vision_tower_id
from opencloc.model.processor import ClocProcessor


def check_features(
    sources: Sequence[Source], config: TrainConfig, model: ClocModel, processor: ClocProcessor, *, is_start: bool
) -> None:
    """Raises ValueError naming what does not fit, if some of the sources hold features.

    `is_start`: the model has the weights that training starts from.  On resuming it gets them later; the tower is then
    the one that was checked at the start, and the fingerprint of the data says whether the features are the same.
    """
    stored = [source for source in sources if isinstance(source, Features)]
    if not stored:
        return
    first = stored[0]
    if len(stored) < len(sources):
        names = ", ".join(spec for spec, one in zip(config.data.train, sources, strict=True) if one not in stored)
        raise ValueError(f"{first.location} holds features, {names} images: a run trains on one or the other")
    if (factor := config.optim.lr_factors.vision_tower) != 0:
        raise ValueError(
            f"{first.location} holds features of a vision tower that stays as it is, and this run trains its own "
            f"(at {factor:g} times optim.lr): train on the images, or set optim.lr_factors.vision 0"
        )
    if config.data.patch_dropout:
        raise ValueError(
            f"{first.location} holds features of whole images: data.patch_dropout leaves patches out before the tower, "
            "set it to 0 or train on the images"
        )
    for source in stored[1:]:
        if how_made(source.info) != how_made(first.info):
            raise ValueError(f"{source.location} and {first.location} hold features that were not made in one way")
    info = first.info
    lacks_pool_input = "pool_input" not in info.shapes and not towers.pools_tokens(model.clip.config)
    if model.prompter.reads_pool_input and lacks_pool_input:
        prompter = model.config.prompter
        raise ValueError(
            f"{first.location} lacks what the {prompter} Prompter reads: make the features with --prompter {prompter}"
        )
    for name, here in (("image_mean", processor.image_mean), ("image_std", processor.image_std)):
        if (there := getattr(info, name)) != here:
            raise ValueError(f"{first.location} was made of images with {name} {there}, this model's is {here}")
    if is_start and (here := vision_tower_id(model.clip)) != info.vision_tower:
        start = config.model.init_from
        raise ValueError(
            f"{first.location} holds features of the vision tower of {info.model} ({info.vision_tower}), and this run "
            f"starts from {start}, which has another ({here}): make them with opencloc data features --model {start}"
        )

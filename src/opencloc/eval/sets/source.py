"""Any source of samples as an evaluation set: its images are made or read when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from opencloc.data.sample import Sample, Source
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.labelled import left_out
from opencloc.errors import counted
from opencloc.eval.sets.coco import with_units
from opencloc.eval.sets.item import FILES, EvalSet, Item, Skipped, merge_names
from opencloc.texts import canonical, is_text

NUM_IMAGES = 1000  # of a source, where no number is given


@runtime_checkable
class Annotated(Protocol):
    """What a source with categories (`coco:`) says besides its samples."""

    @property
    def class_names(self) -> tuple[str, ...]: ...
    def annotated_px(self, index: int) -> tuple[int, int]:
        """Width and height of an image as it was annotated."""
        ...


class _Items:
    """Items made from the samples of a source."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Item:
        annotated_px = self._source.annotated_px(index) if isinstance(self._source, Annotated) else None
        return item_of(self._source[index], annotated_px)


def source_set(source: Source, name: str, *, class_names: Sequence[str] | None = None) -> EvalSet:
    """The samples of a source, of which 1,000 are used if nothing is said.

    Class names are those given, else the categories of the source where it has any (`coco:`), else the distinct texts
    of the regions.  Raises ValueError for an empty list of names.
    """
    categories = source.class_names if class_names is None and isinstance(source, Annotated) else class_names or ()
    names, merged = merge_names(categories)
    if class_names is not None and not names:
        raise ValueError("no class names to choose from")
    return EvalSet(
        name=name,
        rules="; ".join(filter(None, [merged, counted(source.noticed) if isinstance(source, Coco) else ""])),
        items=_Items(source),
        num_items=source.size,
        num_images=NUM_IMAGES,
        skipped=_skipped(source),
        class_names=names,
        readers=1,  # sources promise nothing to threads; one reads ahead
    )


def _skipped(source: Source) -> Skipped:
    """What the source left out when it was opened."""
    reasons = left_out(source)
    return with_units(reasons) if isinstance(source, Coco) else Counter({(FILES, one): n for one, n in reasons.items()})


def item_of(sample: Sample, annotated_px: tuple[int, int] | None = None) -> Item:
    """A sample with everything that can be asked of it; a text that names one region of its image only is a query."""
    times = Counter(canonical(text) for text in sample.texts if is_text(text))
    rows = [row for row, text in enumerate(sample.texts) if is_text(text) and times[canonical(text)] == 1]
    return Item(
        image=sample.image,
        annotated_px=annotated_px,
        captions=tuple(caption for caption in sample.captions if caption.strip()),
        boxes=sample.boxes,
        texts=sample.texts,
        queries=tuple(sample.texts[row] for row in rows),
        truths=tuple(sample.boxes[row][None] for row in rows),
    )

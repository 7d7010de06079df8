"""From samples to sidecar rows: caption -> phrases -> detection -> filters, in batches (VESL, paper section 3.3).

An error is written into the row of the image that caused it and counted by reason; the rest go on.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow
from opencloc.errors import BadSample, redacted
from opencloc.texts import is_text
from opencloc.vesl.captioners import Captioner
from opencloc.vesl.detect import Detections, Detector
from opencloc.vesl.filters import FilterConfig, filter_detections

Item = TypeVar("Item")

MAX_FAILURES_IN_A_ROW = 64  # images; then it is not the images' fault
NUM_EXAMPLES = 3  # keys kept for every reason of failure
_MAX_ERROR_CHARS = 500


class ModelFailure(RuntimeError):
    """The detector fails on every image: a lost GPU, a broken checkpoint.  The shard is given up, not written."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Everything that turns a batch of samples into rows."""

    captioner: Captioner
    phrases: Callable[[str], Sequence[str]]
    detector: Detector
    filters: FilterConfig
    batch_size: int


@dataclass(kw_only=True)
class Skipped:
    """How many were left out for one reason, with the first few keys."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(key)


@dataclass(kw_only=True)
class Tally:
    """What happened to the images so far: counts by reason and seconds by step."""

    phrases: int = 0  # of the rows without an error
    images_without_phrases: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)  # by reason; those with a key have a row with an error
    dropped: Counter[str] = field(default_factory=Counter)  # detections, by filter
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by step; `wait`: for images
    failures_in_a_row: int = 0  # of the detector

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        """Adds the time spent inside to a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start

    def skip(self, reason: str, key: str) -> None:
        """One more is left out."""
        self.skipped.setdefault(reason, Skipped()).add(key)

    def add(self, row: SidecarRow, reason: str | None, num_phrases: int) -> None:
        """One more row; `reason` of its error, or None."""
        if reason is not None:
            self.skip(reason, row.key)
            return
        self.phrases += num_phrases
        self.images_without_phrases += not num_phrases


def label_samples(engine: Engine, samples: Iterable[Sample | BadSample], tally: Tally) -> Iterator[list[SidecarRow]]:
    """The rows of the samples in order, batch by batch; images are read ahead by a thread.

    A `BadSample` (whose `where` is the key) becomes a row with its error.  Raises `ModelFailure` when the detector
    failed on `MAX_FAILURES_IN_A_ROW` images in a row, `CaptionerError` when captions cannot be made at all, and
    whatever reading the samples raises.
    """
    for batch in _ahead(_batched(samples, engine.batch_size), tally):
        yield _label_batch(engine, batch, tally)


def _label_batch(engine: Engine, batch: Sequence[Sample | BadSample], tally: Tally) -> list[SidecarRow]:
    good = [item for item in batch if isinstance(item, Sample)]
    bad: dict[str, BadSample] = {item.where: item for item in batch if isinstance(item, BadSample)}
    with tally.clock("caption"):
        answers = engine.captioner.caption(good) if good else []
    captions: dict[str, str] = {}
    for sample, answer in zip(good, answers, strict=True):
        if isinstance(answer, BadSample):
            bad[sample.key] = answer
        elif is_text(answer):
            captions[sample.key] = answer
        else:
            bad[sample.key] = BadSample("not Unicode", sample.key, "half a surrogate pair in the caption")
    phrases: dict[str, tuple[str, ...]] = {}
    with tally.clock("phrases"):
        for key, caption in captions.items():
            try:
                phrases[key] = tuple(engine.phrases(caption))
            except BadSample as error:
                bad[key] = BadSample(error.reason, key, error.detail)
            except Exception as error:  # whatever a caption from the web can provoke
                bad[key] = BadSample("phrases failed", key, _describe(error))
    asked = [sample for sample in good if phrases.get(sample.key)]
    with tally.clock("detect"):
        found = dict(zip((s.key for s in asked), _detect(engine.detector, asked, phrases, tally), strict=True))
    rows = []
    with tally.clock("filter"):
        for item in batch:
            key = item.key if isinstance(item, Sample) else item.where
            own = phrases.get(key, ())
            row, reason = _row(engine.filters, key, captions.get(key), own, found.get(key), bad, tally)
            tally.add(row, reason, len(own))
            rows.append(row)
    return rows


def _detect(
    detector: Detector, samples: Sequence[Sample], phrases: dict[str, tuple[str, ...]], tally: Tally
) -> list[Detections | Exception]:
    """The detections of every sample, or what the detector raised for it.

    After an error the batch is repeated one image at a time, so that one image takes no other with it (and a batch too
    large for the memory still gets done).
    """
    if not samples:
        return []
    found = _call(detector, samples, phrases)
    if not isinstance(found, Exception):
        tally.failures_in_a_row = 0
        return list(found)
    if len(samples) > 1:
        return [result for sample in samples for result in _detect(detector, [sample], phrases, tally)]
    tally.failures_in_a_row += 1
    if tally.failures_in_a_row == MAX_FAILURES_IN_A_ROW:
        message = f"the detector failed on {MAX_FAILURES_IN_A_ROW} images in a row, last with {_describe(found)}"
        raise ModelFailure(message) from found
    return [found]


def _call(
    detector: Detector, samples: Sequence[Sample], phrases: dict[str, tuple[str, ...]]
) -> Sequence[Detections] | Exception:
    """One call of the detector, its answer checked, or the error of either."""
    try:
        found = detector([sample.image for sample in samples], [phrases[sample.key] for sample in samples])
        if len(found) != len(samples):
            raise ValueError(f"the detector returned {len(found)} results for {len(samples)} images")
        if wrong := [type(one).__name__ for one in found if not isinstance(one, Detections)]:
            raise TypeError(f"the detector returned {wrong[0]} instead of Detections")
    except Exception as error:
        return error.with_traceback(None)  # which would keep the tensors of the batch in memory
    return found


def _row(
    filters: FilterConfig,
    key: str,
    caption: str | None,
    phrases: tuple[str, ...],
    found: Detections | Exception | None,
    bad: dict[str, BadSample],
    tally: Tally,
) -> tuple[SidecarRow, str | None]:
    """(the row of one sample, the reason of its error or None)."""
    if key in bad:
        reason, detail = bad[key].reason, bad[key].detail
        return _error_row(key, caption, reason, detail), reason
    if found is None:  # nothing to ask for
        return SidecarRow(key=key, caption=caption), None
    if not isinstance(found, Exception):
        try:
            kept, dropped = filter_detections(found, phrases, filters)
        except ValueError as error:
            found = error
        else:
            tally.dropped += dropped
            texts = tuple(phrases[number] for number in kept.phrase) if kept.texts is None else tuple(kept.texts)
            return SidecarRow(key=key, caption=caption, boxes=kept.boxes, texts=texts, scores=kept.scores), None
    reason = f"detector failed ({type(found).__name__})"
    return _error_row(key, caption, reason, str(found)), reason


def _error_row(key: str, caption: str | None, reason: str, detail: str) -> SidecarRow:
    error = redacted(f"{reason}: {detail}")[:_MAX_ERROR_CHARS] if detail else reason
    return SidecarRow(key=key, caption=caption, error=error.encode(errors="replace").decode())


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """The items in tuples of `size`, the last one shorter (itertools.batched of Python 3.12)."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _ahead(batches: Iterator[tuple[Item, ...]], tally: Tally) -> Iterator[tuple[Item, ...]]:
    """The batches, the next one being read by a thread while the current one is worked on."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        following = reader.submit(next, batches, None)
        while True:
            with tally.clock("wait"):
                batch = following.result()
            if batch is None:
                return
            following = reader.submit(next, batches, None)
            yield batch

"""What a multimodal language model is asked, and what counts as right.  One function for each kind of question.

As in `opencloc.eval.tasks`, a task is a generator: it takes the batches of one pass over a set (lists of `Loaded`) and
returns its scores when there are no more.  Every question has one answer, and no answer is left out: one that can't be
read is wrong, and the share of those is a score of its own.

Symbols: Q questions, R boxes, K boxes of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch

from opencloc.boxes import Letterbox
from opencloc.eval import metrics
from opencloc.eval.metrics import Rows
from opencloc.eval.sets.item import BOXES, IMAGES, NO_REGIONS, TEXTS, Loaded
from opencloc.eval.tasks import NO_QUERIES, UNKNOWN_CLASS, Scores, phrase_columns
from opencloc.mllm import templates
from opencloc.mllm.boxes_text import find_boxes
from opencloc.mllm.conversation import Conversation, RegionPrompt, Turn
from opencloc.mllm.interview import Interview, absent
from opencloc.mllm.judge import Case, ferret_answer, pointed_question
from opencloc.mllm.verdicts import bare_name, named, says_yes
from opencloc.model.prompts import Box
from opencloc.texts import canonical

Batches = Generator[None, list[Loaded] | None, Scores]
NO_RIVAL = "without a name that is not in it"
NAME_TOKENS, BOX_TOKENS, WORD_TOKENS = 16, 32, 8  # most tokens of an answer


Task = Callable[[Interview], Batches]


# -- referring ---------------------------------------------------------------------------------------------------------


def choose_names(ask: Interview) -> Batches:
    """Which of two names is the region's, the other being of nothing in the image; asked in both orders.

    Right is an answer that names the true one and not the other (RefLVIS's script also counts one that names both), and
    by likelihood the more probable of the two answers.  The false name is drawn at random, the same in every run.
    """
    rows = Rows()
    while (batch := (yield)) is not None:
        asked: list[tuple[Loaded, str, tuple[RegionPrompt, ...]]] = []
        pairs: list[tuple[str, str]] = []  # true and false name
        regions: list[tuple[int, int]] = []
        for one in batch:
            rivals = absent(ask, one, len(one.item.boxes))
            if not rivals:
                ask.skipped[IMAGES, NO_RIVAL if len(one.item.boxes) else NO_REGIONS] += 1
                continue
            for row, (box, text) in enumerate(zip(one.item.boxes, one.item.texts, strict=True)):
                pair = canonical(text), rivals[row % len(rivals)]
                for options in (pair, pair[::-1]):
                    asked.append((one, templates.choose(options), (Box(*map(float, box)),)))
                    pairs.append(pair)
                    regions.append((one.number, row))
        if not asked:
            continue
        answers = ask.ask(asked, NAME_TOKENS)
        likely = ask.speaker.log_likelihood(
            [
                Conversation(
                    image=one.image,
                    turns=(Turn("user", text), Turn("assistant", name)),
                    prompts=prompts,
                )
                for (one, text, prompts), pair in zip(asked, pairs, strict=True)
                for name in pair
            ]
        )
        said = [named(answer, pair) for answer, pair in zip(answers, pairs, strict=True)]
        by_likelihood = [true > false for true, false in zip(likely[::2], likely[1::2], strict=True)]
        for (one, text, _), answer, names, right in zip(asked, answers, said, by_likelihood, strict=True):
            ask.note(one, text, answer, right=names == [0], right_by_likelihood=right)
        rows.add(
            images=[one.number for one, _, _ in asked],
            regions=np.array(regions),
            right=[names == [0] for names in said],
            likely=by_likelihood,
            both=[len(names) == 2 for names in said],
            unread=[not names for names in said],
        )
    if not len(rows):
        return {}
    scorer, images = ask.scorer(rows["images"]), rows["images"]
    of = f"{len(images):,} questions"
    for key, label, column in (("generated", "by its answer", "right"), ("likelihood", "by likelihood", "likely")):
        scorer.add(f"choice_{key}", f"right {label}", rows[column], images, of=of)
        first, second = rows[column][::2], rows[column][1::2]
        label = f"right {label} in both orders"
        scorer.add(f"choice_{key}_both", label, first & second, images[::2], of=f"{len(first):,} regions")
    scorer.add("named_both", "named both", rows["both"], images, of=of)
    scorer.add("unread", "named neither", rows["unread"], images, of=of)
    return scorer.scores


def name_regions(ask: Interview) -> Batches:
    """Name each region; right is the exact name, but for case, an article and a full stop.

    mAcc is the mean over the names that occur of each one's own share.
    """
    rows, truths = Rows(), []
    while (batch := (yield)) is not None:
        asked, names = [], []
        for one in batch:
            if not len(one.item.boxes):
                ask.skipped[IMAGES, NO_REGIONS] += 1
            for box, text in zip(one.item.boxes, one.item.texts, strict=True):
                if ask.data.class_names and canonical(text) not in ask.data.class_names:
                    ask.skipped[BOXES, UNKNOWN_CLASS] += 1
                    continue
                asked.append((one, templates.refer(), (Box(*map(float, box)),)))
                names.append(canonical(text))
        if not asked:
            continue
        answers = ask.ask(asked, NAME_TOKENS)
        right = [bare_name(answer) == bare_name(name) for answer, name in zip(answers, names, strict=True)]
        for (one, text, _), answer, name, ok in zip(asked, answers, names, right, strict=True):
            ask.note(one, text, answer, truth=name, right=ok)
        rows.add(images=[one.number for one, _, _ in asked], right=right)
        truths += names
    if not len(rows):
        return {}
    scorer, images = ask.scorer(rows["images"]), rows["images"]
    _, labels = np.unique(truths, return_inverse=True)
    classes = len(ask.data.class_names or ask.names) or len(set(truths))
    scorer.add_accuracy(rows["right"], images, labels, what="boxes", classes=classes)
    return scorer.scores


# -- grounding ---------------------------------------------------------------------------------------------------------


def find_texts(ask: Interview) -> Batches:
    """Find the box of each text; right at plain IoU >= 0.5 of the first box that the answer names.

    A text with several boxes is right by the any-box protocol if that box has IoU >= 0.5 with one of them, by the
    merged-box protocol if it has with the box around all of them.  Each text is asked on its own, once per image.
    """
    rows = Rows()
    while (batch := (yield)) is not None:
        asked, truths = [], []
        for one in batch:
            if not one.item.queries:
                ask.skipped[IMAGES, NO_QUERIES if one.item.texts else NO_REGIONS] += 1
            for text, boxes in zip(one.item.queries, one.item.truths, strict=True):
                asked.append((one, templates.ground(text), ()))
                truths.append(boxes)
        if not asked:
            continue
        once = {(one.number, text): (one, text, prompts) for one, text, prompts in asked}
        by_question = dict(zip(once, ask.ask(list(once.values()), BOX_TOKENS), strict=True))
        answers = [by_question[one.number, text] for one, text, _ in asked]
        any_box, merged, unread = [], [], []
        for (one, text, _), answer, boxes in zip(asked, answers, truths, strict=True):
            found = find_boxes(answer)
            overlap = [0.0, 0.0]
            if found.boxes:
                letterbox = Letterbox(width_px=one.image.width, height_px=one.image.height)
                box = letterbox.to_image(torch.tensor(found.boxes[0], dtype=torch.float64))
                hull = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])
                overlap = [float(metrics.overlaps(box, truth).max()) for truth in (boxes, hull[None])]
            any_box.append(overlap[0])
            merged.append(overlap[1])
            unread.append(not found.boxes)
            why = {"unread": dict(found.problems) or {"no box": 1}} if not found.boxes else {}
            ask.note(one, text, answer, iou=round(overlap[0], 4), **why)
        rows.add(
            images=[one.number for one, _, _ in asked],
            any_box=any_box,
            merged=merged,
            unread=unread,
            several=[len(boxes) > 1 for boxes in truths],
        )
    if not len(rows):
        return {}
    scorer, images = ask.scorer(rows["images"]), rows["images"]
    of = f"{len(images):,} texts"
    for key, (label, overlap) in phrase_columns(rows).items():
        scorer.add(f"acc50{key}", label, overlap >= 0.5 - metrics.TIE, images, of=of)
        scorer.add(f"miou{key}", label.replace("IoU ≥ 0.5", "mean IoU"), overlap, images, of=of)
    scorer.add("unread", "without a readable box", rows["unread"], images, of=of)
    return scorer.scores


# -- presence ----------------------------------------------------------------------------------------------------------


def answer_yes_no(ask: Interview) -> Batches:
    """Questions of yes or no, as POPE's; an answer that says neither, or both, is wrong.

    "Yes" is what F1, precision and recall are of; an unread answer is an error of both.
    """
    return (yield from _yes_no(ask, lambda one: list(zip(one.item.questions, one.item.answers, strict=True))))


def tell_presence(ask: Interview) -> Batches:
    """Is a thing in the image?  All names of an image's regions are asked for, and as many that are not there.

    Those are drawn at random, the same in every run.      An answer that says neither yes nor no, or both, is wrong.
    """

    def questions(one: Loaded) -> list[tuple[str, str]]:
        present = list(dict.fromkeys(canonical(text) for text in one.item.texts))
        rivals = absent(ask, one, len(present))
        if not rivals:
            ask.skipped[IMAGES, NO_RIVAL if present else NO_REGIONS] += 1
            return []
        asked = [(name, "yes") for name in present[: len(rivals)]] + [(name, "no") for name in rivals]
        return [(templates.exists(name), label) for name, label in asked]

    return (yield from _yes_no(ask, questions))


def _yes_no(ask: Interview, questions: Callable[[Loaded], list[tuple[str, str]]]) -> Batches:
    rows = Rows()
    while (batch := (yield)) is not None:
        asked = [(one, text, label) for one in batch for text, label in questions(one)]
        if not asked:
            continue
        answers = ask.ask([(one, text, ()) for one, text, _ in asked], WORD_TOKENS)
        said = [says_yes(answer) for answer in answers]
        for (one, text, label), answer, yes in zip(asked, answers, said, strict=True):
            ask.note(one, text, answer, truth=label, right=yes == (label == "yes"))
        rows.add(
            images=[one.number for one, _, _ in asked],
            truth=[label == "yes" for _, _, label in asked],
            yes=[yes is True for yes in said],
            unread=[yes is None for yes in said],
        )
    if not len(rows):
        return {}
    scorer, images, truth, yes, unread = (
        ask.scorer(rows["images"]),
        *(rows[c] for c in ("images", "truth", "yes", "unread")),
    )
    of, hits = f"{len(images):,} questions", truth & yes
    scorer.add("acc", "accuracy", (truth == yes) & ~unread, images, of=of)
    claimed = yes | (unread & ~truth)  # an unread answer where "no" is true is as wrong as a yes
    scorer.add_ratio("f1", "F1 of yes", 2.0 * hits, 1.0 * truth + claimed, images, of=of)
    scorer.add(
        "precision",
        "precision of yes",
        hits[claimed],
        images[claimed],
        of=f"{claimed.sum():,} yes, or unread where no is true",
    )
    scorer.add("recall", "recall of yes", hits[truth], images[truth], of=f"{truth.sum():,} where yes is true")
    scorer.add("yes", "share of yes", yes, images, of=of)
    scorer.add("unread", "neither yes nor no", unread, images, of=of)
    return scorer.scores


# -- captions ----------------------------------------------------------------------------------------------------------


def describe_images(ask: Interview) -> Batches:
    """Describe the image: which of the set's names does the caption hold, and which are of regions of the image?

    Object precision is over all names in captions, recall over all names in images, each name once per image.  Whole
    words and plain plurals count, synonyms don't.
    """
    told, there = Rows(), Rows()
    while (batch := (yield)) is not None:
        batch = [one for one in batch if _has_texts(ask, one)]
        captions = ask.ask([(one, templates.CAPTION, ()) for one in batch], ask.caption_tokens)
        for one, caption in zip(batch, captions, strict=True):
            present = {canonical(text) for text in one.item.texts}
            names = tuple(dict.fromkeys([*(ask.data.class_names or ask.names), *sorted(present)]))
            said = {names[i] for i in named(caption, names)}
            ask.note(one, templates.CAPTION, caption, named=sorted(said), missed=sorted(present - said))
            told.add(images=[one.number] * len(said), right=np.array([name in present for name in sorted(said)], bool))
            there.add(images=[one.number] * len(present), right=np.array([n in said for n in sorted(present)], bool))
    if not len(there):
        return {}
    scorer = ask.scorer(there["images"])
    for key, label, rows, what in (
        ("object_precision", "object precision", told, "names in captions"),
        ("object_recall", "object recall", there, "names in images"),
    ):
        scorer.add(key, label, rows["right"], rows["images"].astype(np.int64), of=f"{len(rows):,} {what}")
    return scorer.scores


def _has_texts(ask: Interview, one: Loaded) -> bool:
    if not one.item.texts:
        ask.skipped[IMAGES, NO_REGIONS] += 1
    return bool(one.item.texts)


# -- judged answers ----------------------------------------------------------------------------------------------------


def answer_ferret_bench(ask: Interview) -> Batches:
    """Ferret-Bench: open questions, the answers judged beside the reference answers by a language model.

    The ratio is the sum of the answers' points over that of the references' points.
    """
    numbers: list[int] = []
    while (batch := (yield)) is not None:
        asked, ids = [], []
        for one in batch:
            for i, question in enumerate(one.item.questions):
                text, boxes = pointed_question(question)
                asked.append((one, text, boxes))
                ids.append(i)
        for (one, text, _), i, answer in zip(asked, ids, ask.ask(asked, ask.caption_tokens), strict=True):
            item = one.item
            ask.note(one, text, answer, question_id=item.question_ids[i])
            numbers.append(one.number)
            ask.cases.append(
                Case(
                    question_id=item.question_ids[i],
                    category=ask.category,
                    image=getattr(item.image, "path", ""),
                    question=item.questions[i],
                    context=item.context,
                    reference=item.answers[i],
                    answer=ferret_answer(answer, Letterbox(width_px=one.image.width, height_px=one.image.height)),
                )
            )
    judged = ask.finish(ask.cases)
    if judged is None:
        ask.num_images = len(set(numbers))
        return {}
    for points in judged:
        if isinstance(points, ValueError):
            ask.skipped[TEXTS, getattr(points, "reason", str(points))] += 1
    kept = [i for i, points in enumerate(judged) if not isinstance(points, ValueError)]
    if not kept:
        raise ValueError(f"{ask.data.name}: the judge gave no points for any of {len(judged)} answers: {judged[0]}")
    points = np.array([judged[i] for i in kept])
    for i, (theirs, ours) in zip(kept, points.tolist(), strict=True):
        ask.answers[i] |= {"points": ours, "reference_points": theirs}
    images = np.array(numbers)[kept]
    scorer, of = ask.scorer(images), f"{len(kept):,} of {len(judged):,} answers judged"
    scorer.add_ratio("ratio", "points over the references' points", points[:, 1], points[:, 0], images, of=of)
    scorer.add("points", "points of 10", points[:, 1] / 10, images, of=of)
    scorer.add("reference_points", "the references' points of 10", points[:, 0] / 10, images, of=of)
    return scorer.scores

"""From a caption to the phrases that a detector is asked for (VESL step 2, paper appendix C).

Owns the published extraction by noun-phrase grammar and the n-gram baseline of OWL-ST.  Both are pure functions of the
caption.  It doesn't know images or detectors; filters on the resulting regions are in `filters.py`.

nltk supplies the tokenizer, the features and the greedy loop of its averaged perceptron tagger.  Two inner loops are
replaced by faster ones with equal output, which the tests check against nltk itself: the tagger's dot product (numpy
over a dense table) and the chunk grammar (one regular expression over one letter per tag).
"""

from __future__ import annotations

import importlib.util
import pickle
import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize import NLTKWordTokenizer

from opencloc.vesl.wordlists import GENERIC_WORDS, STOP_WORDS

MAX_PHRASES = 20  # paper appendix C
NGRAM_MAX_WORDS, NGRAM_MAX_PHRASES = 10, 300  # OWLv2 appendix A.2
GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+}"  # as published; `noun_phrase_spans` is this grammar

_CHUNK = re.compile("D?J*N+")
_TOKENIZER = NLTKWordTokenizer()
# The tokenizer splits off a full stop only at the very end, since it expects single sentences.  A stop inside is set
# apart here where it ends a word of two letters or more that is no common abbreviation; punkt's trained model would do
# it better but can't be assumed present.
_SENTENCE_END = re.compile(r"\b(?!(?:mr|mrs|ms|dr|st|mt|jr|sr|vs|etc)\.)(\w\w+[)\]}\"'”*]*)\.(?=\s)")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_PUNCTUATION = string.punctuation + "“”‘«»…–—"


def extract_phrases(caption: str, max_phrases: int = MAX_PHRASES) -> tuple[str, ...]:
    """The distinct noun phrases of a caption, lower-case, in order of appearance, at most `max_phrases`.

    Lower-case, tokenise, drop generic web words, tag, chunk by `GRAMMAR`, drop phrases of stop words only.  One choice
    beyond the published listing: a leading determiner is matched by the grammar but left out of the phrase.  "a dog",
    "the dog" and "dog" would otherwise be three queries, three texts that contrast with each other in training, and
    none of them the bare name that evaluation asks for.  (The published mean is 2.1 tokens a phrase.  COCO's captions
    give 2.0 words with determiners and 1.3 without, so the published phrases probably kept theirs.)

    Raises ValueError if `max_phrases` is below 1, RuntimeError if no tagger weights are installed.
    """
    _check_at_least_one(max_phrases=max_phrases)
    words = [word for word in tokenize(caption) if word not in GENERIC_WORDS]
    # What has no letter or digit (a bullet, an emoji) often gets a noun's tag; it ends a phrase instead.
    tags = [tag if _LETTER_OR_DIGIT.search(word) else ":" for word, tag in _tagger().tag(words)]
    phrases: dict[str, None] = {}  # an ordered set
    for start, end in noun_phrase_spans(tags):
        phrase = words[start + (tags[start] == "DT") : end]
        if not STOP_WORDS.issuperset(phrase):
            phrases[" ".join(phrase)] = None
            if len(phrases) == max_phrases:
                break
    return tuple(phrases)


def ngram_phrases(
    caption: str, max_words: int = NGRAM_MAX_WORDS, max_phrases: int = NGRAM_MAX_PHRASES
) -> tuple[str, ...]:
    """The distinct n-grams of a caption, shortest first, n up to `max_words`, at most `max_phrases` (the baseline).

    OWL-ST's rules (OWLv2 paper, appendix A.2): lower-case, split at white space, drop generic words, take every n-gram
    that is not made of stop words only.  Unlike there, punctuation around a word is cut off.

    Raises ValueError if a limit is below 1.
    """
    _check_at_least_one(max_words=max_words, max_phrases=max_phrases)
    words = [word.strip(_PUNCTUATION) for word in _plain(caption).split()]
    words = [word for word in words if _LETTER_OR_DIGIT.search(word) and word not in GENERIC_WORDS]
    phrases: dict[str, None] = {}
    for n in range(1, min(max_words, len(words)) + 1):
        for start in range(len(words) - n + 1):
            ngram = words[start : start + n]
            if not STOP_WORDS.issuperset(ngram):
                phrases[" ".join(ngram)] = None
                if len(phrases) == max_phrases:
                    return tuple(phrases)
    return tuple(phrases)


def tokenize(caption: str) -> list[str]:
    """The lower-case words and punctuation marks of a caption of one or several sentences, Penn Treebank style."""
    lines = " . ".join(_plain(caption).splitlines())  # a list item or heading is a sentence of its own
    return _TOKENIZER.tokenize(_SENTENCE_END.sub(r"\1 . ", lines))


def noun_phrase_spans(tags: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of every chunk of `GRAMMAR` in a sequence of Penn Treebank tags, left to right, as nltk finds it."""
    letters = "".join("D" if tag == "DT" else tag[0] if tag[:2] in ("JJ", "NN") else "." for tag in tags)
    return [match.span() for match in _CHUNK.finditer(letters)]


def tagger_weights() -> str:
    """Which tagger weights this installation uses, by name and version: part of what makes labels repeatable."""
    return _load_weights().source


def _plain(caption: str) -> str:
    """Lower case, with typographic apostrophes as the tokenizer knows them."""
    return caption.lower().replace("’", "'")


def _check_at_least_one(**limits: int) -> None:
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What a trained averaged perceptron tagger consists of."""

    source: str  # name and version
    by_feature: Mapping[str, Mapping[str, float]]  # feature -> class -> weight
    tagdict: Mapping[str, str]  # the words that have one tag only
    classes: Collection[str]


class _Tagger(PerceptronTagger):
    """nltk's tagger over given weights, with the dot product done on a dense table."""

    def __init__(self, weights: _Weights) -> None:
        super().__init__(load=False)
        self.tagdict = weights.tagdict
        self.model = _DensePerceptron(weights)


class _DensePerceptron:
    """The `predict` of nltk's `AveragedPerceptron` as a sum of table rows, one per feature; tags 4 times faster."""

    def __init__(self, weights: _Weights) -> None:
        # In reverse order, since argmax takes the first of equals and nltk the alphabetically last.
        self._classes = sorted(weights.classes, reverse=True)
        column = {label: i for i, label in enumerate(self._classes)}
        self._row = {feature: i for i, feature in enumerate(weights.by_feature)}
        self._table = np.zeros((len(self._row), len(column)))
        for row, by_class in zip(self._table, weights.by_feature.values(), strict=True):
            for label, weight in by_class.items():
                row[column[label]] = weight

    def predict(self, features: Iterable[str], return_conf: bool = False) -> tuple[str, None]:
        rows = [self._row[feature] for feature in features if feature in self._row]
        return self._classes[self._table[rows].sum(axis=0).argmax()], None


@cache
def _tagger() -> _Tagger:
    return _Tagger(_load_weights())


@cache
def _load_weights() -> _Weights:
    """The tagger's weights from nltk_data where that is installed, else from the package textblob-aptagger."""
    try:
        tagger = PerceptronTagger()
        name = "nltk averaged_perceptron_tagger_eng"
        return _Weights(
            source=name, by_feature=tagger.model.weights, tagdict=tagger.tagdict, classes=tagger.model.classes
        )
    except LookupError:
        pass
    spec = importlib.util.find_spec("textblob_aptagger")  # found, not imported: it would pull in all of textblob
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "no weights for the part-of-speech tagger: pip install textblob-aptagger, "
            "or python -m nltk.downloader averaged_perceptron_tagger_eng"
        )
    path = Path(spec.submodule_search_locations[0]) / "trontagger-0.1.0.pickle"
    with path.open("rb") as file:
        by_feature, tagdict, classes = _PlainUnpickler(file).load()
    name = f"textblob-aptagger {version('textblob-aptagger')}"
    return _Weights(source=name, by_feature=by_feature, tagdict=tagdict, classes=classes)


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of dict, list, tuple, set, str and numbers; anything that names other code is refused."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in (("__builtin__", "set"), ("builtins", "set")):
            return set
        raise pickle.UnpicklingError(f"refused {module}.{name}: only plain containers are read")

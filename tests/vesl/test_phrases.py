"""Phrase extraction: equal to nltk's own tagger and chunker, robust to any string, right on captions read by hand."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.tag.perceptron import PerceptronTagger

from opencloc.errors import BadSample
from opencloc.vesl import phrases
from opencloc.vesl.phrases import (
    GENERIC_WORDS,
    GRAMMAR,
    STOP_WORDS,
    extract_phrases,
    ngram_phrases,
    noun_phrase_spans,
    tokenize,
)

TAGS = ["DT", "PDT", "JJ", "JJR", "JJS", "NN", "NNS", "NNP", "NNPS", "IN", "VBG", "CD", "CC", ".", ",", "PRP$", "-LRB-"]
SENTENCE = "a the brown dog dogs running quickly on grassy field , and two Hello kitty's 1984 3rd red-haired - zzyzx"
WORDS = SENTENCE.split()
captions = st.lists(st.sampled_from([*WORDS, "photo", "Stock", ".", "\n", "not", "’s"]), max_size=25).map(" ".join)


@given(st.lists(st.sampled_from(TAGS), min_size=1, max_size=30))
def test_spans_equal_those_of_nltks_regexp_parser(tags: list[str]) -> None:
    tree = nltk.RegexpParser(GRAMMAR).parse([(i, tag) for i, tag in enumerate(tags)])
    chunks = [[i for i, _ in node] for node in tree if isinstance(node, nltk.Tree)]
    assert noun_phrase_spans(tags) == [(chunk[0], chunk[-1] + 1) for chunk in chunks]


@pytest.fixture(scope="module")
def nltk_tagger() -> PerceptronTagger:
    """nltk's tagger, untouched, with the same weights as ours."""
    weights = phrases._load_weights()
    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params((weights.by_feature, weights.tagdict, weights.classes))
    return tagger


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text("abgn-'AZ09é", min_size=1, max_size=8)), max_size=12))
def test_tags_equal_those_of_nltks_tagger(nltk_tagger: PerceptronTagger, words: list[str]) -> None:
    assert phrases._tagger().tag(words) == nltk_tagger.tag(words)


@given(st.one_of(st.text(), captions), st.integers(1, 5))
def test_any_string_gives_distinct_lower_case_phrases_or_is_not_english(caption: str, limit: int) -> None:
    try:
        found = extract_phrases(caption, max_phrases=limit)
    except BadSample:
        return
    assert len(found) <= limit
    assert len(set(found)) == len(found)
    assert found == extract_phrases(caption, max_phrases=20)[:limit]
    for phrase in found:
        assert phrase == phrase.strip()
        assert phrase == phrase.lower()
        assert not STOP_WORDS.issuperset(phrase.split())
        assert not GENERIC_WORDS.intersection(phrase.split())


@given(captions)
def test_letter_case_does_not_change_the_phrases(caption: str) -> None:
    assert extract_phrases(caption.upper()) == extract_phrases(caption)


@given(captions, st.integers(1, 4))
def test_ngrams_equal_a_plain_enumeration(caption: str, max_words: int) -> None:
    words = [w.strip(".,-'’") for w in caption.lower().replace("’", "'").split()]
    words = [w for w in words if w and w not in GENERIC_WORDS]
    ngrams = [tuple(words[i : i + n]) for n in range(1, max_words + 1) for i in range(len(words) - n + 1)]
    kept = [" ".join(ngram) for ngram in ngrams if not set(ngram) <= STOP_WORDS]
    assert list(ngram_phrases(caption, max_words=max_words)) == list(dict.fromkeys(kept))


# Captions of COCO val2017 with the phrases that a reader finds by the published rules.
GOLDEN = [
    ("A big burly grizzly bear is show with grass in the background.", ("big burly grizzly bear", "grass")),
    ("Closeup of a brown bear sitting in a grassy area.", ("closeup", "brown bear", "grassy area")),
    ("A group of people that are standing near a tennis net.", ("group", "people", "tennis net")),
    ("A girl is taking a picture of people fishing.", ("girl", "people")),
    ("A room with purple walls, carpet and bed comforter.", ("room", "purple walls", "carpet", "bed comforter")),
    ("A white bowl filled with green Granny Smith apples.", ("white bowl", "green granny smith apples")),
    ("A bathroom with no toilets and a red and green bucket.", ("bathroom", "toilets", "green bucket")),
    ("a close up of a knife and a cup on a surface", ("close", "knife", "cup", "surface")),
    ("A man balances a tennis ball as the man serves", ("man", "tennis ball")),
    (
        "A man riding on the back of an elephant through a city street.",
        ("man", "back", "elephant", "city street"),
    ),
]


@pytest.mark.parametrize(("caption", "expected"), GOLDEN)
def test_phrases_of_coco_captions(caption: str, expected: tuple[str, ...]) -> None:
    assert extract_phrases(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # several sentences: a full stop ends a phrase and is no part of a word
        ("The bear sits on grass. It has a black nose! A dog (small).", ("bear", "grass", "black nose", "dog")),
        ("A dog near St. Bernard church. A cat", ("dog", "st. bernard church", "cat")),
        # what captioners write: headings, bullets, emoji
        ("**Main subject:** A man.\n- A red car.\n* A lamp 🐶", ("main subject", "man", "red car", "lamp")),
        ("Mr. Smith’s hat", ("mr. smith", "hat")),
        # alt-text: generic words go before tagging, wherever they stand
        ("Stock Photo: Vintage Red Ford Mustang HD Wallpaper", ("vintage", "red ford mustang")),
        # the web's leftovers
        ("<b>A dog</b> &amp; a cat<br>on grass", ("dog", "cat", "grass")),
        ("&lt;p&gt;A red car&lt;/p&gt; at https://x.y/z.jpg //x.y/z.jpg www.x.org x.com/b", ("red car",)),
        ("image.jpg", ()),
        ("photo of a red img_2034.jpg dog by me@x.org DSC0012 red_car_12", ("dog",)),
        ("a man.a woman", ("man", "woman")),
        ("a dog 狗 running", ("dog",)),
        # nothing to ask for
        ("", ()),
        ("... - !", ()),
        ("photo of the other one", ()),
    ],
)
def test_phrases_of_other_captions(caption: str, expected: tuple[str, ...]) -> None:
    assert extract_phrases(caption) == expected


@pytest.mark.parametrize("extract", [extract_phrases, ngram_phrases])
@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("一只狗在草地上", "not English"),
        ("собака на траве", "not English"),
        ("un perro en la hierba", "not English"),
        ("Un chien sur le canapé avec une balle", "not English"),
        ("ein Hund auf der Wiese", "not English"),
        ("a dog \ud800", "not Unicode"),
    ],
)
def test_captions_that_are_not_english_are_counted_not_made_a_phrase(extract, caption: str, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        extract(caption)
    assert caught.value.reason == reason


@pytest.mark.parametrize("caption", ["View of Place de la Concorde", "los angeles skyline", "pizza", "Café del Mar"])
def test_foreign_names_are_english_captions(caption: str) -> None:
    assert extract_phrases(caption)


def test_all_coco_captions_give_short_phrases(photos: Path) -> None:
    """The statistics of the real captions: 3.2 phrases a caption of 1.3 words each."""
    annotations = json.loads((photos / "coco740" / "annotations" / "captions_test.json").read_text())["annotations"]
    found = [extract_phrases(a["caption"]) for a in annotations]
    total = sum(map(len, found))
    assert 3.0 < total / len(found) < 3.5
    assert 1.2 < sum(len(p.split()) for ps in found for p in ps) / total < 1.5


def test_tokenizer_keeps_abbreviations_and_splits_sentences() -> None:
    assert tokenize("A dog. The U.S. flag") == ["a", "dog", ".", "the", "u.s.", "flag"]


@pytest.mark.parametrize("limits", [{"max_phrases": 0}, {"max_words": 0}])
def test_limits_below_one_are_refused_by_name(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_\w+ must be at least 1, got 0"):
        ngram_phrases("a dog", **limits)


def test_unpickler_refuses_anything_but_plain_containers() -> None:
    plain = {"a": {"NN": 0.5}}, {"dog": "NN"}, {"NN", "DT"}
    assert phrases._PlainUnpickler(io.BytesIO(pickle.dumps(plain))).load() == plain
    with pytest.raises(pickle.UnpicklingError, match=r"refused posix\.system"):
        phrases._PlainUnpickler(io.BytesIO(pickle.dumps(os.system))).load()


def test_weights_in_nltk_data_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    for name, value in {
        "weights": {"bias": {"NN": 1.0, "VB": 1.0}},
        "tagdict": {"a": "DT"},
        "classes": ["NN", "VB"],
    }.items():
        (folder / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(value))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    weights = phrases._load_weights.__wrapped__()
    assert weights.source == "nltk averaged_perceptron_tagger_eng"
    assert phrases._Tagger(weights).tag(["a", "dog"]) == [
        ("a", "DT"),
        ("dog", "VB"),
    ]  # equal scores: the alphabetically last, as nltk

"""From a caption to the phrases that a detector is asked for (step 2, paper appendix C), and the words that are none.

Two ways: the published noun-phrase grammar, and the n-gram baseline of OWL-ST.  Both are for English captions.

nltk supplies the tokenizer, the features and the greedy loop of its averaged perceptron tagger.  Two inner loops are
replaced by faster ones of equal output: the tagger's dot product (numpy over a dense table) and the chunk grammar (one
regular expression over one letter per tag).
"""

from __future__ import annotations

import html
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

from opencloc.errors import BadSample

MAX_PHRASES = 20  # paper appendix C
NGRAM_MAX_WORDS, NGRAM_MAX_PHRASES = 10, 300  # OWLv2 appendix A.2
GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+}"  # as published; `noun_phrase_spans` is this grammar


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English stop words, and generic words of web alt-texts: the two lists that OWLv2's paper describes (Minderer et al.
# 2023, appendix A.2) and CLOC reuses (paper appendix C).  They are our own compilation.
# Function words, in the pieces that a Penn Treebank tokenizer makes ("don't" arrives as "do" and "n't").
STOP_WORDS = _words(
    """
    a an the this that these those each every either neither both all any some such no none another other others same
    own few many more most much less least several enough only just very too so quite rather almost also even still yet
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one ones someone something anyone anything everyone
    everything nobody nothing who whom whose which what where when why how whoever whatever whichever
    am is are was were be been being have has had having do does did doing done can could may might must shall should
    will would ought need let lets got get gets getting
    and or but nor if then else than as because while although though unless until since whether
    of at by for with without within about against between among into onto through during before after above below to
    from up down in out on off over under around along across behind beside beneath near toward towards upon via per
    again further once here there now not never always often ever
    's 're 've 'll 'd 'm 't n't ca wo ai s t d m o re ve ll y ma
    """
)

# Words about the picture as a file, about the shop or the web page around it, never about what it shows.  Words that
# also name a visible thing ("net", "post", "page", "video" in "video game") stay in.
GENERIC_WORDS = _words(
    """
    image images img imgs photo photos photograph photographs photography pic pics picture pictures
    illustration illustrations illustrated vector vectors clipart artwork render rendering stock royalty royalty-free
    wallpaper wallpapers background backgrounds thumbnail thumbnails screenshot screenshots
    hd uhd 4k 8k resolution high-resolution hi-res pixel pixels quality original
    gif jpg jpeg png svg webp bmp tiff pdf eps psd
    free premium available buy sale sales shop shopping store online order price prices cheap discount wholesale
    shipping delivery diy
    click download downloads upload uploaded watch subscribe description descriptions caption title untitled copyright
    website websites webpage homepage blog blogs url link links www http https com org html uk co ie
    alamy alibaba aliexpress amazon depositphotos dreamstime ebay etsy facebook flickr getty gettyimages google imgur
    instagram istock istockphoto pinterest reddit shutterstock tumblr twitter wikimedia wikipedia wordpress youtube
    porn sex xxx
    """
)

# Function words of Spanish, Portuguese, French, Italian, German and Dutch that are no English words.
FOREIGN_WORDS = _words(
    """
    el la los las un una unos unas de del en con y que por para su sus al es está están uma um os com na nas em da das
    dos seu sua ao são le les des du une et dans sur avec est au aux ses qui il lo gli nel nella sul sulla di della
    dei e che der das ein eine einen einem einer und mit auf im von ist zwei den dem het een van op met zijn
    """
)
_SHARED_WORDS = _words("a i s o y t d m no me he do so as on in an am was die")  # English ones that they use too


_CHUNK = re.compile("D?J*N+")
_TOKENIZER = NLTKWordTokenizer()
# The tokenizer splits off a full stop only at the very end, since it expects single sentences.  A stop inside is set
# apart here where it ends a word of two letters or more that is no common abbreviation, also when the next sentence is
# glued to it; punkt's trained model would do it better but cannot be assumed present.
_SENTENCE_END = re.compile(r"\b(?!(?:mr|mrs|ms|dr|st|mt|jr|sr|vs|etc|ph)\.)(\w\w+[)\]}\"'”*]*)\.(?=\s|[^\W\d_])")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_FOREIGN_LETTER = re.compile(r"[^\W\d_A-Za-zÀ-ɏḀ-ỿ]")  # not of the Latin alphabet
_PUNCTUATION = string.punctuation + "“”‘«»…–—"
_TAG = re.compile(r"</?([a-zA-Z]\w*)[^<>]*>|<!--[^<>]*>")
_BLOCKS = _words("br p div li ul ol td tr h1 h2 h3 h4 h5 h6 figcaption")  # HTML elements that end a line
_ENTITY = re.compile(r"&#?\w{1,32};")
_FILE_ENDINGS = "jpg jpeg png gif webp bmp tif tiff svg avif heic pdf psd eps raw mp4 mov avi html htm php aspx zip"
_DOMAINS = "com org net edu gov info biz io co uk de fr es it nl eu us ca au jp cn ru in br"
_NO_WORD = re.compile(
    r"[a-z][a-z0-9+.-]*://.*|//.*|www\..*|.*@.*\..*"  # URLs and addresses
    rf"|[\w-]+(?:\.[\w-]+)*\.(?:{'|'.join(_DOMAINS.split())})(?:[/:?#].*)?"  # amazon.com/dp
    rf"|.*\.(?:{'|'.join(_FILE_ENDINGS.split())})(?:\?.*)?"  # red.jpg
    r"|(?:img|image|dsc[nf]?|pxl|mvi|imgp|screenshot)[_-]?\d+"  # dsc0012
)
_LONGEST_WORD = 60  # letters; beyond it, it is data
_DIGIT = re.compile(r"\d")


def extract_phrases(caption: str, max_phrases: int = MAX_PHRASES) -> tuple[str, ...]:
    """The distinct noun phrases of a caption, lower-case, in order of appearance, at most `max_phrases`.

    Lower-case, tokenise, drop generic web words, tag, chunk by `GRAMMAR`, drop phrases of stop words only.  One choice
    beyond the published listing: a leading determiner is matched by the grammar but left out of the phrase.  "a dog",
    "the dog" and "dog" would otherwise be three queries, three texts that contrast with each other in training, and
    none of them the bare name that evaluation asks for.  (The published mean is 2.1 tokens a phrase.  COCO's captions
    give 2.0 words with determiners and 1.3 without, so the published phrases probably kept theirs.)

    HTML, URLs, file names and words in another alphabet are no phrase and no part of one.

    Raises `BadSample` ("not English", "not Unicode") for a caption that has no phrases of these rules, ValueError if
    `max_phrases` is below 1, RuntimeError if no tagger weights are installed.
    """
    _check_at_least_one(max_phrases=max_phrases)
    words = [word for word in tokenize(caption) if word not in GENERIC_WORDS]
    # What is no word (a bullet, an emoji, another alphabet) often gets a noun's tag; it ends a phrase instead.
    tags = [tag if _is_latin(word) else ":" for word, tag in _tagger().tag(words)]
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
    that is not made of stop words only.  Unlike there, punctuation around a word is cut off, and HTML, URLs and file
    names are left out.

    Raises `BadSample` ("not English", "not Unicode"), and ValueError if a limit is below 1.
    """
    _check_at_least_one(max_words=max_words, max_phrases=max_phrases)
    words = [word.strip(_PUNCTUATION) for word in _SENTENCE_END.sub(r"\1. ", _plain(caption)).split()]
    words = [word for word in words if _is_latin(word) and word not in GENERIC_WORDS]
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
    """The caption as lower-case English text: no HTML, URLs and file names, apostrophes as the tokenizer knows them."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise BadSample("not Unicode", "caption", str(error)) from None
    text = html.unescape(html.unescape(caption))  # the web often escapes twice
    text = _TAG.sub(lambda tag: "\n" if (tag[1] or "").lower() in _BLOCKS else " ", text)
    text = _ENTITY.sub(" ", text).lower().replace("’", "'")
    lines = [" ".join("," if _is_no_word(word) else word for word in line.split()) for line in text.splitlines()]
    text = "\n".join(lines)
    _check_english(text)
    return text


def _is_latin(word: str) -> bool:
    return _LETTER_OR_DIGIT.search(word) is not None and _FOREIGN_LETTER.search(word) is None


def _is_no_word(word: str) -> bool:
    """Whether it is a URL, an address, a file name (`img_2034`) or data."""
    if len(word) > _LONGEST_WORD or word.startswith("//") or ("_" in word and _DIGIT.search(word)):
        return True
    return _NO_WORD.fullmatch(word.strip(_PUNCTUATION)) is not None


def _check_english(text: str) -> None:
    """Raises `BadSample` where most letters are not Latin, or the function words are those of another language.

    Two foreign function words are needed, and more than twice as many as English ones: names stay English captions.
    """
    words = text.split()
    foreign = sum(word in FOREIGN_WORDS for word in words)
    english = sum(word in STOP_WORDS and word not in _SHARED_WORDS for word in words)
    letters, others = len(_LETTER.findall(text)), len(_FOREIGN_LETTER.findall(text))
    if 2 * others > letters or (foreign >= 2 and foreign > 2 * english):
        raise BadSample("not English", "caption", text[:80])


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

"""Questions to a library: words, photos, regions of photos and what they add up to; the answers are regions.

    library = Library.open("index")
    found = library.search("a red car", top=5)
    for row in found.rows:
        print(row.photo, row.box_px, row.score)

The score of a region is the cosine of its embedding with the query's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from opencloc.boxes import clipped_px
from opencloc.images import crop, open_image
from opencloc.model.predictor import EVERYDAY, Predictor
from opencloc.search.index import load_predictor, model_id_of
from opencloc.search.store import Settings, Store, open_store, quoted
from opencloc.texts import canonical

MOST_IDS = 1000  # photos of a filter that are named to the data base; of more, its answers are filtered
CANDIDATES = 2  # of the approximate index are compared exactly, for each region wanted
PROBES = 50  # parts of the approximate index that are looked at: some 400,000 regions
MOST_APPROXIMATE = 2000  # regions; whoever wants more at once gets them by comparing all
FOUND = (
    0.4  # a text with a lower probability is not found; below 1/2, as a wrong photo is seen and a wrong "nothing" not
)
LEVEL_PHOTOS = 64  # that the level of everyday names is measured on
LEVEL = 0.95
PerPhoto = Literal["best", "all"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One region of an answer."""

    photo: str  # path
    box: tuple[float, float, float, float]  # XYXY, normalised to the photo
    box_px: tuple[int, int, int, int]  # XYXY in pixels of the photo as viewers show it
    score: float  # cosine
    presence: float | None  # probability that the text is in this photo, looked at alone; None without a text
    also: tuple[str, ...]  # other paths of the very same photo
    date: datetime | None  # when it was taken; None where nobody knows
    width_px: int
    height_px: int
    thumbnail: bytes  # JPEG
    photo_id: int
    number: int  # of the region in its photo

    @property
    def is_there(self) -> bool:
        """Whether the photo can still be opened; always of what is no file of its own (in a tar, generated)."""
        return not os.path.isabs(self.photo) or os.path.exists(self.photo) or ".tar/" in self.photo


@dataclass(frozen=True, kw_only=True)
class Found:
    """An answer: the best regions, the best first."""

    rows: tuple[Row, ...]
    query: str  # in words
    presence: float | None  # probability that what was asked for is in the library; None where no text was asked for
    searched: int  # photos

    @property
    def nothing(self) -> bool:
        """Whether nothing was found: no region at all, or no region that fits the text."""
        return not self.rows or (self.presence is not None and self.presence < FOUND)


class Library:
    """An index with the model that made it."""

    def __init__(self, store: Store, model: str, device: str) -> None:
        self.store, self._model, self._device = store, model, device
        self._level: tuple[int, float] | None = None  # of a version of the regions

    @classmethod
    def open(cls, path: str, *, model: str | None = None, device: str = "auto") -> Library:
        """The library at a path or URL; `model` where its model lies elsewhere now.

        Raises FileNotFoundError where there is no index or no model, ValueError, naming both, for another model.
        """
        store = open_store(path)
        settings = store.settings
        name = settings.model if model is None else model
        if model is None and os.path.isabs(name) and not os.path.isdir(name):
            raise FileNotFoundError(f"{path} was made by the model {name}, which is not there: name it by --model")
        if (found := model_id_of(name, device)) != settings.model_id:
            raise ValueError(
                f"{path} was made by the model {settings.model} ({settings.model_id}), "
                f"not by {name} ({found}): their embeddings do not compare"
            )
        return cls(store, name, device)

    @property
    def settings(self) -> Settings:
        return self.store.settings

    @property
    def predictor(self) -> Predictor:
        """The model that made the library."""
        return load_predictor(self._model, self._device)

    def __len__(self) -> int:
        """Photos."""
        return self.store.photos.count_rows()

    def search(
        self,
        text: str | Sequence[str] = (),
        *,
        image: Any = None,
        box_px: Sequence[float] | None = None,
        like: Row | None = None,
        minus: str | Sequence[str] = (),
        folder: str | None = None,
        after: datetime | None = None,
        before: datetime | None = None,
        min_area: float = 0.0,
        max_area: float = 1.0,
        per_photo: PerPhoto = "best",
        top: int = 10,
        exact: bool = False,
    ) -> Found:
        """The best regions for texts, an image (or the region `box_px` of it), a row of an earlier answer, and any of
        them together: their embeddings are added; those of `minus` are taken away.

        `folder`: photos under it.  `after`, `before`: photos taken from the one moment on, until before the other.
        `min_area`, `max_area`: of the regions, as shares of the photo.  `per_photo`: its best region only, or all.
        `exact`: also where the library has an approximate index.

        Raises ValueError for a query of nothing, an empty text, a box outside the image and numbers out of range.
        """
        texts, without = _listed(text), _listed(minus)
        if top < 1:
            raise ValueError(f"top is {top}; at least 1")
        if not 0 <= min_area < max_area <= 1:
            raise ValueError(f"areas from {min_area} to {max_area}: need 0 <= min_area < max_area <= 1")
        query, words = self._query(texts, image, box_px, like, without)
        allowed = self._allowed(folder, after, before)
        searched = len(self) if allowed is None else len(allowed)
        hits = self._hits(query, allowed, (min_area, max_area), per_photo, top, exact)
        logits = self._logits(hits) if texts and image is None and like is None else None
        rows = self._rows(hits, logits)
        odds = None if logits is None else presence(list(logits.values()), searched) if logits else 0.0
        return Found(rows=rows, query=words, presence=odds, searched=searched)

    # -- the query -----------------------------------------------------------------------------------------------

    def _query(
        self, texts: list[str], image: Any, box_px: Any, like: Row | None, minus: list[str]
    ) -> tuple[Float[np.ndarray, " E"], str]:
        """(embedding of the query, the query in words)."""
        if box_px is not None and image is None:
            raise ValueError("a box needs an image")
        if not texts and image is None and like is None:
            raise ValueError("the query is empty: give a text, an image or a region")
        plus, words = [], [f"“{text}”" for text in texts]
        if texts:
            plus += list(self.predictor.embed_texts(texts).float().cpu().numpy())
        if image is not None:
            plus.append(self._embedding(image, box_px))
            words.append("the image" if box_px is None else "the region")
        if like is not None:
            plus.append(self._stored(like))
            words.append("the region")
        query = np.sum(plus, axis=0)
        if minus:
            query = query - self.predictor.embed_texts(minus).float().cpu().numpy().sum(axis=0)
        length = float(np.linalg.norm(query))
        if length < 1e-6:
            raise ValueError("the parts of the query cancel each other out")
        return (query / length).astype(np.float32), " + ".join(words) + "".join(f" − “{text}”" for text in minus)

    @torch.no_grad()
    def _embedding(self, image: Any, box_px: Any) -> Float[np.ndarray, " E"]:
        """Of an image or a region of it, in the way the library's own were made."""
        photo = open_image(image)
        width, height = photo.size
        box = np.array([[0, 0, width, height]] if box_px is None else [box_px], dtype=np.float64)
        if box.shape != (1, 4):
            raise ValueError(f"a box is 4 numbers, x0 y0 x1 y1, not {box_px!r}")
        box = clipped_px(box, width, height)
        if self.settings.regions == "whole":
            cut = crop(photo, (box / [width, height, width, height])[0])
            return self.predictor.encode(cut).features.embedding[0].float().cpu().numpy()
        encoded = self.predictor.encode(photo)
        return self.predictor.embed(encoded, boxes_px=box)[0].float().cpu().numpy()

    def _stored(self, row: Row) -> Float[np.ndarray, " E"]:
        where = f"photo = {row.photo_id} AND number = {row.number}"
        found = self.store.regions.search().where(where).select(["vector"]).limit(1).to_arrow()
        if not len(found):
            raise ValueError(f"{row.photo} has changed since: search again")
        return _vectors(found)[0]

    # -- the answer ----------------------------------------------------------------------------------------------

    def _allowed(self, folder: str | None, after: datetime | None, before: datetime | None) -> set[int] | None:
        """Contents of the photos that pass the filters; None: all."""
        conditions = _conditions(folder, after, before)
        if not conditions:
            return None
        found = self.store.photos.search().where(" AND ".join(conditions)).select(["id", "path"]).limit(None).to_arrow()
        inside = None if folder is None else os.path.abspath(folder).rstrip("/") + "/"
        rows = zip(found["id"].to_pylist(), found["path"].to_pylist(), strict=True)
        return {number for number, path in rows if inside is None or path.startswith(inside)}

    def _hits(
        self,
        query: Float[np.ndarray, " E"],
        allowed: set[int] | None,
        areas: tuple[float, float],
        per_photo: PerPhoto,
        top: int,
        exact: bool,
    ) -> list[dict[str, Any]]:
        """The best regions: photo, number, box, score."""
        conditions = []
        if areas[0] > 0:
            conditions.append(f"area >= {areas[0]!r}")
        if areas[1] < 1:
            conditions.append(f"area <= {areas[1]!r}")
        if allowed is not None and len(allowed) <= MOST_IDS:
            if not allowed:
                return []
            conditions.append(f"photo IN ({', '.join(map(str, sorted(allowed)))})")
            allowed = None
        limit = top if per_photo == "all" else 8 * top
        while True:
            search = self.store.regions.search(query, vector_column_name="vector").distance_type("cosine")
            search = search.select(["photo", "number", "box", "_distance"]).limit(limit)
            if conditions:
                search = search.where(" AND ".join(conditions))
            if exact or limit > MOST_APPROXIMATE:
                search = search.bypass_vector_index()
            else:
                search = search.nprobes(PROBES).refine_factor(CANDIDATES)
            rows = search.to_arrow().to_pylist()
            hits: list[dict[str, Any]] = []
            seen = set[int]()
            for row in rows:
                if (allowed is None or row["photo"] in allowed) and not (per_photo == "best" and row["photo"] in seen):
                    seen.add(row["photo"])
                    hits.append(row | {"score": 1 - row["_distance"]})
            if len(hits) >= top or len(rows) < limit:
                return hits[:top]
            limit *= 8

    def _logits(self, hits: list[dict[str, Any]]) -> dict[int, float]:
        """Photo -> logit that what a text says is in it, looked at alone, from its best hit.

        It is how far the fit is above the library's level, in units of the model's temperature.
        """
        if not hits:
            return {}
        version = self.store.regions.version
        if self._level is None or self._level[0] != version:
            self._level = version, self._everyday_level()
        scale = self.predictor.model.scale("image" if self.settings.regions == "whole" else "region").item()
        best: dict[int, float] = {}
        for hit in hits:
            best[hit["photo"]] = max(best.get(hit["photo"], -1.0), hit["score"])
        return {photo: scale * (score - self._level[1]) for photo, score in best.items()}

    def _everyday_level(self) -> float:
        """What one in twenty everyday names (`EVERYDAY`) reaches in a photo: of so many about that share is there."""
        first = self.store.regions.search().where("number = 0").select(["photo"]).limit(None).to_arrow()
        ids = np.unique(first["photo"].to_numpy())  # hashes: any choice of them is random
        where = f"photo IN ({', '.join(map(str, ids[:LEVEL_PHOTOS]))})"
        stored = self.store.regions.search().where(where).select(["photo", "vector"]).limit(None).to_arrow()
        names = self.predictor.embed_texts(EVERYDAY.split(", ")).float().cpu().numpy()
        owners, cosines = stored["photo"].to_numpy(), _vectors(stored) @ names.T
        best = np.stack([cosines[owners == number].max(axis=0) for number in ids[:LEVEL_PHOTOS]])
        return float(np.quantile(best, LEVEL))

    def _rows(self, hits: list[dict[str, Any]], logits: dict[int, float] | None) -> tuple[Row, ...]:
        ids = sorted({hit["photo"] for hit in hits})
        if not ids:
            return ()
        where = f"id IN ({', '.join(map(str, ids))})"
        columns = ["id", "path", "date", "width", "height", "thumbnail"]
        photos: dict[int, list[dict[str, Any]]] = {}
        found = self.store.photos.search().where(where).select(columns).limit(None).to_arrow().to_pylist()
        for photo in sorted(found, key=lambda photo: photo["path"]):
            photos.setdefault(photo["id"], []).append(photo)
        rows = []
        for hit in hits:
            if hit["photo"] not in photos:  # removed this very moment, or just being added
                continue
            first, *others = photos[hit["photo"]]
            box = np.clip(hit["box"], 0, 1)
            size = np.array([first["width"], first["height"]] * 2)
            rows.append(
                Row(
                    photo=first["path"],
                    box=tuple(box.tolist()),
                    box_px=tuple(np.rint(box * size).astype(int).tolist()),
                    score=float(hit["score"]),
                    presence=None if logits is None else _sigmoid(logits[hit["photo"]]),
                    also=tuple(photo["path"] for photo in others),
                    date=first["date"],
                    width_px=first["width"],
                    height_px=first["height"],
                    thumbnail=first["thumbnail"],
                    photo_id=hit["photo"],
                    number=hit["number"],
                )
            )
        return tuple(rows)


def presence(logits: Sequence[float], searched: int) -> float:
    """Probability that a text is in a library of so many photos, given the logits of those it fits best.

    `exp(logit)` is how much more likely the fit is if the text is in that photo.  Before looking, the text is in the
    library with probability 1/2, and then in any of the photos alike.  So the odds are the mean over all photos; those
    that fit worse add next to nothing.  One good fit among 10,000 photos says little: the best of many fits by chance.
    """
    total = float(np.logaddexp.reduce(logits)) - math.log(max(searched, 1))
    return _sigmoid(total)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(min(max(-logit, -500.0), 500.0)))


def _conditions(folder: str | None, after: datetime | None, before: datetime | None) -> list[str]:
    conditions = []
    if folder is not None:
        if not folder.strip():
            raise ValueError("folder is empty")
        inside = os.path.abspath(folder).rstrip("/") + "/"
        conditions.append(f"starts_with(path, {quoted(inside)})")
    for sign, moment in ((">=", after), ("<", before)):
        if moment is not None:
            conditions.append(f"date {sign} timestamp '{moment.replace(tzinfo=None):%Y-%m-%d %H:%M:%S}'")
    return conditions


def _listed(texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        if not text.strip():
            raise ValueError("the text is empty: say what to look for")
    return [canonical(text) for text in listed]


def _vectors(table: Any) -> Float[np.ndarray, "P E"]:
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1).astype(np.float32)

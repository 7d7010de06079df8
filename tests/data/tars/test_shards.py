"""WebDataset tars: reading undoes writing, reading by number equals streaming, damage costs what is damaged."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, sidecar_path, write_sidecar
from opencloc.data.tars.shards import Shards, ShardsConfig, ShardWriter, expand_urls, index_shard, iter_shard
from opencloc.errors import BadSample
from tests.helpers.tars import file_bytes, picture

PNG = file_bytes(picture())


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def region(box: list, text: str = "dog", **score: float) -> bytes:
    return json.dumps({"regions": [{"box": box, "text": text, **score}]}).encode()


def outcome(item: Sample | BadSample) -> tuple:
    """What can be compared of a sample or of its failure."""
    if isinstance(item, BadSample):
        return ("bad", item.reason)
    scores = None if item.scores is None else item.scores.tolist()
    rest = (item.captions, item.alt_text, item.boxes.tolist(), item.texts, scores)
    return (item.key, item.image.mode, item.image.size, item.image.tobytes(), *rest)


def read(source: Shards, index: int) -> Sample | BadSample:
    try:
        return source[index]
    except BadSample as bad:
        return bad


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
numbers = st.floats(0, 0.5, width=32)


@st.composite
def samples(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The fields of some samples with different keys."""
    made = []
    for number in range(draw(st.integers(1, 5))):
        labels = draw(st.lists(texts, max_size=3))
        corners = np.array([draw(st.tuples(numbers, numbers)) for _ in labels], dtype=np.float32).reshape(-1, 2)
        scores = np.array([draw(st.floats(0, 1, width=32)) for _ in labels], dtype=np.float32)
        made.append(
            {
                "key": draw(st.sampled_from(["", "some/folder/"])) + f"{number:03d}",
                "image": picture(number, draw(st.integers(1, 30)), draw(st.integers(1, 30))),
                "captions": tuple(draw(st.lists(texts, max_size=3))),
                "alt_text": draw(st.none() | texts),
                "boxes": np.concatenate([corners, corners + np.float32(0.5)], axis=1),
                "texts": tuple(labels),
                "scores": scores if labels and draw(st.booleans()) else None,
            }
        )
    return made


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples(), st.integers(1, 4))
def test_reading_gives_back_what_was_written(tmp_path_factory, fields: list[dict], samples_per_shard: int) -> None:
    written = [Sample(**one) for one in fields]
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(str(folder), samples_per_shard=samples_per_shard, image_format="png") as writer:
        assert [writer.write(sample) for sample in written] == [sample.key for sample in written]
    source = Shards(str(folder))
    assert len(source.urls) == -(-len(written) // samples_per_shard)
    assert [outcome(source[i]) for i in range(source.size)] == [outcome(sample) for sample in written]


def messy_members() -> list[tuple[str, bytes]]:
    """One tar with everything that happens in the wild, each sample once."""
    return [
        ("000.jpg", file_bytes(picture(1), "JPEG")),
        ("000.json", b'{"caption": "a dog", "alt_text": "IMG", "status": "success", "width": 12}'),
        ("000.txt", b"another caption"),
        ("001.PNG", PNG),
        ("001.txt", b" a cat \n"),
        ("002.webp", file_bytes(picture(2), "WEBP")),
        ("a/003.jpg", file_bytes(picture(3, 7, 40), "JPEG")),
        ("a/003.json", region([0, 0, 0.5, 1.0], score=0.25)),
        ("no_image.txt", b"only text"),
        ("broken.jpg", b"\xff\xd8\xff not a photo"),
        ("cut.jpg", file_bytes(picture(4, 64, 64), "JPEG")[:-200]),
        ("empty.jpg", b""),
        ("json.jpg", PNG),
        ("json.json", b'{"caption": '),
        ("list.jpg", PNG),
        ("list.json", b"[1, 2]"),
        ("surrogate.jpg", PNG),
        ("surrogate.json", rb'{"caption": "half a pair \ud83d"}'),
        ("utf8.jpg", PNG),
        ("utf8.txt", b"caf\xe9"),
        ("nan.jpg", PNG),
        ("nan.json", region([0, 0, float("nan"), 1])),
        ("outside.jpg", PNG),
        ("outside.json", region([0, 0, 1.2, 1])),
        ("digits.jpg", PNG),
        ("digits.json", region([0, 0, 1, 10**400])),
        ("three.jpg", PNG),
        ("three.json", region([0, 0, 1])),
        ("blank.jpg", PNG),
        ("blank.json", region([0, 0, 1, 1], text="  ")),
        ("score.jpg", PNG),
        ("score.json", region([0, 0, 1, 1], score=1.5)),
        ("captionless.jpg", PNG),
        ("captionless.json", b'{"caption": "  ", "alt_text": null, "regions": null}'),
        ("00000_stats.json", b"{}"),
        (".hidden.jpg", PNG),
        ("no_dot", PNG),
        ("000.png", PNG),
    ]


def test_a_messy_tar_gives_every_sample_or_the_reason_why_not(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "00000.tar", messy_members())
    items = list(iter_shard(url))
    good = {item.key: item for item in items if isinstance(item, Sample)}
    bad = {item.where: item.reason for item in items if isinstance(item, BadSample)}
    assert list(good) == ["000", "001", "002", "a/003", "captionless"]
    assert (good["000"].captions, good["000"].alt_text) == (("a dog",), "IMG")  # the json's caption goes first
    assert good["001"].captions == ("a cat",)
    assert good["002"].captions == good["captionless"].captions == ()
    assert good["a/003"].image.size == (7, 40)
    assert (good["a/003"].boxes.tolist(), good["a/003"].texts) == ([[0, 0, 0.5, 1]], ("dog",))
    assert good["a/003"].scores is not None
    assert good["a/003"].scores.tolist() == [0.25]
    assert bad == {
        "no_image": "no image",
        "broken": "broken image",
        "cut": "broken image",
        "empty": "broken image",
        "json": "bad json",
        "list": "bad json",
        "surrogate": "text is not valid Unicode",
        "utf8": "bad utf-8",
        "nan": "bad box",
        "outside": "bad box",
        "digits": "bad box",
        "three": "bad box",
        "blank": "empty region text",
        "score": "bad score",
        "00000_stats": "no image",
        url: "duplicate key",
    }


def test_reading_by_number_equals_streaming(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "00000.tar", messy_members())
    source = Shards(url)
    streamed = [outcome(item) for item in iter_shard(url)]
    without_number = [("bad", "no image"), ("bad", "duplicate key")]
    assert [outcome(read(source, i)) for i in range(source.size)] == [x for x in streamed if x not in without_number]
    assert source.problems == Counter({"no image": 2, "duplicate key": 1})


def test_keys_are_those_of_the_webdataset_library(tmp_path: Path) -> None:
    names = ["a.b/000.jpg", "x.y.z.jpg", "x2.tiff.png", "./dot.jpg", "deep/er/1.JPEG"]
    index = index_shard(write_tar(tmp_path / "0.tar", [(name, PNG) for name in names]))
    assert index.keys == ("a.b/000", "./dot", "deep/er/1")  # x.y.z.jpg has the extension y.z.jpg, which is no image
    assert index.problems == Counter({"no image": 2})


def whole_tar(path: Path) -> bytes:
    members = [member for i in range(4) for member in ((f"{i}.png", PNG), (f"{i}.txt", b"caption"))]
    return Path(write_tar(path, members)).read_bytes()


@settings(max_examples=60)
@given(st.data())
def test_a_tar_cut_anywhere_keeps_its_whole_samples(tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = whole_tar(folder / "whole.tar")
    ends = [int(end) for end in index_shard(str(folder / "whole.tar")).spans[:, 2].sum(axis=1)]  # of the captions
    length = data.draw(st.integers(0, len(whole)) | st.sampled_from(range(0, len(whole), 512)))
    (folder / "cut.tar").write_bytes(whole[:length])
    items = list(iter_shard(str(folder / "cut.tar")))
    index = index_shard(str(folder / "cut.tar"))
    keys = [item.key for item in items if isinstance(item, Sample)]
    assert list(index.keys) == keys == [str(i) for i in range(len(keys))]
    assert all(item.captions == ("caption",) for item in items if isinstance(item, Sample))
    # The sample at which it breaks off may be dropped, those whose successor is there may not.
    assert len(keys) >= sum(end < length for end in ends) - 1
    if length < max(ends):
        assert isinstance(items[-1], BadSample)
        assert items[-1].reason in ("truncated tar", "not a tar")
        assert index.problems.total() == 1
    if length == len(whole):
        assert len(keys) == len(items) == 4


@settings(max_examples=60)
@given(st.data())
def test_damaged_headers_are_reported_not_raised(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "0.tar"
    damaged = bytearray(whole_tar(path))
    start = data.draw(st.sampled_from([span[0] - 512 for span in index_shard(str(path)).spans[:, 0].tolist()]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([124, 125, 130, 156]) | st.integers(0, 511))  # size, kind, anything
        damaged[start + place] = data.draw(st.sampled_from([0, 128, 255, ord("x"), ord("L")]) | st.integers(0, 255))
    damaged[start + 148 : start + 156] = b" " * 8  # the checksum is made right again: only the content is wrong
    damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + 512])
    path.write_bytes(damaged)
    items = list(iter_shard(str(path)))
    assert items
    assert sum(isinstance(item, Sample) for item in items) <= len(index_shard(str(path)).keys) <= 4


def test_bytes_that_are_no_tar_are_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>404</html>" * 100)
    (item,) = iter_shard(str(tmp_path / "0.tar"))
    assert isinstance(item, BadSample)
    assert (item.reason, item.where) == ("not a tar", str(tmp_path / "0.tar"))
    with pytest.raises(ValueError, match=r"no sample with an image in 1 tars; skipped: not a tar \(1\)"):
        Shards(str(tmp_path))


def test_img2dataset_output_is_read_as_it_is(tmp_path: Path) -> None:
    record = {
        "caption": "a dog",
        "url": "http://x/y.jpg",
        "key": "000000000",
        "status": "success",
        "error_message": None,
    }
    members = [("000000000.jpg", PNG), ("000000000.json", json.dumps(record).encode()), ("000000000.txt", b"a dog")]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"not ours")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = Shards(str(tmp_path))
    assert (source.size, source[0].captions, source[0].texts) == (1, ("a dog",), ())
    with pytest.raises(FileNotFoundError, match=r"00000\.vesl\.parquet: no such sidecar \(1 of 1"):
        Shards(str(tmp_path), ShardsConfig(sidecar="vesl"))


def outcomes(source: Shards) -> list[tuple]:
    return [outcome(read(source, i)) for i in range(source.size)]


def test_another_process_reads_the_same_samples(tmp_path: Path) -> None:
    source = Shards(write_tar(tmp_path / "00000.tar", messy_members()))
    found: list[Sample | BadSample] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        for future in [pool.submit(source.__getitem__, i) for i in range(source.size)]:
            try:
                found.append(future.result())
            except BadSample as bad:
                found.append(bad)
    assert [outcome(item) for item in found] == outcomes(source)


def test_sidecar_regions_replace_those_of_the_tar(tmp_path: Path) -> None:
    members = []
    for key in ("a", "b", "c", "d"):
        members += [
            (f"{key}.png", PNG),
            (f"{key}.json", b'{"caption": "own", "regions": [{"box": [0, 0, 1, 1], "text": "x"}]}'),
        ]
    url = write_tar(tmp_path / "00000.tar", members)
    labels = {"boxes": np.array([[0, 0.5, 1, 1]], dtype=np.float32), "texts": ("dog",), "scores": np.array([0.5])}
    rows = [
        SidecarRow(key="a", caption="new", **labels),
        SidecarRow(key="b", caption="own"),
        SidecarRow(key="c", error="detector ran out of memory"),
    ]
    write_sidecar(sidecar_path(url, "vesl"), rows, {})
    source = pickle.loads(pickle.dumps(Shards(url, ShardsConfig(sidecar="vesl"))))
    assert (source[0].captions, source[0].alt_text) == (("new",), "own")
    assert (source[0].boxes.tolist(), source[0].texts) == ([[0, 0.5, 1, 1]], ("dog",))
    assert (source[1].captions, source[1].alt_text, source[1].texts) == (("own",), None, ())
    with pytest.raises(BadSample, match=r"00000\.tar/c: not labelled \(detector ran out of memory\)"):
        source[2]
    with pytest.raises(BadSample, match=r"00000\.tar/d: not in the sidecar"):
        source[3]


def test_numbers_run_through_all_tars_and_name_them(tmp_path: Path) -> None:
    for shard, keys in enumerate(("ab", "c", "de")):
        write_tar(tmp_path / f"{shard}.tar", [(f"{key}.png", PNG) for key in keys])
    source = Shards(str(tmp_path))
    assert [source.identity(i) for i in range(source.size)] == ["0.tar/a", "0.tar/b", "1.tar/c", "2.tar/d", "2.tar/e"]
    for index in (-1, 5):
        with pytest.raises(IndexError, match=r"not in 0 \.\.\. 4"):
            source[index]


@pytest.mark.parametrize("touched", [False, True])  # whether a sample of the tar was read before
def test_a_tar_that_changes_or_goes_away_makes_bad_samples(tmp_path: Path, touched: bool) -> None:
    def damaged(change: Callable[[Path], object]) -> tuple:
        path = Path(write_tar(tmp_path / "0.tar", [("a.png", PNG), ("b.png", PNG), ("c.png", PNG)]))
        source = Shards(str(path))
        if touched:
            source[0]
        change(path)
        return outcome(read(source, 2))

    whole = whole_tar(tmp_path / "whole.tar")
    assert damaged(Path.unlink) == ("bad", "missing shard")
    assert damaged(lambda path: path.write_bytes(PNG[:20])) == ("bad", "unreadable shard" if touched else "not a tar")
    cut = ("bad", "unreadable shard" if touched else "truncated tar")
    assert damaged(lambda path: path.write_bytes(whole[:1200])) == cut
    if not touched:
        shorter = ("bad", "shard is shorter than its index says")
        assert damaged(lambda path: write_tar(path, [("a.png", PNG)])) == shorter


def test_samples_that_no_count_knows_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", PNG), ("b.png", PNG)])
    (tmp_path / "0_stats.json").write_text('{"successes": 1}')
    source = Shards(str(tmp_path))
    assert source.size == 1
    with pytest.warns(UserWarning, match=r"0\.tar: 2 samples, of which 1 are known"):
        assert source[0].key == "a"


def test_remote_tars_read_like_local_ones(tmp_path: Path) -> None:
    local = write_tar(tmp_path / "0.tar", messy_members())
    url = "memory://test_shards/0.tar"
    fsspec.filesystem("memory").pipe_file("/test_shards/0.tar", Path(local).read_bytes())
    assert expand_urls("memory://test_shards") == [url]
    assert len(expand_urls("memory://test_shards/*.tar")) == 1
    assert outcomes(Shards("memory://test_shards/{0..0}.tar")) == outcomes(Shards(local))
    assert [outcome(item) for item in iter_shard(url)] == [outcome(item) for item in iter_shard(local)]


@pytest.mark.parametrize(
    ("names", "keys", "problems"),
    [
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], ["a"], {"duplicate key": 1}),
        (["a.jpg", "a.jpg", "a.jpg", "b.jpg"], ["a", "b"], {"duplicate key": 2}),
        (["a.jpg", "b.jpg", "a.txt"], ["a", "b"], {"members of a sample are not adjacent": 1}),
        (["a.txt", "b.jpg", "a.jpg"], ["b"], {"no image": 1, "members of a sample are not adjacent": 1}),
        (["a.jpg", "b.jpg", "a.jpg"], ["a", "b"], {"duplicate key": 1}),
    ],
)
def test_members_that_no_sample_gets_are_counted(tmp_path: Path, names: list, keys: list, problems: dict) -> None:
    url = write_tar(tmp_path / "0.tar", [(name, PNG if name.endswith("jpg") else b"text") for name in names])
    items = list(iter_shard(url))
    index = index_shard(url)
    assert [item.key for item in items if isinstance(item, Sample)] == list(index.keys) == keys
    assert Counter(item.reason for item in items if isinstance(item, BadSample)) == index.problems == problems


def test_images_whose_captions_come_later_in_the_tar_say_so(tmp_path: Path) -> None:
    members = [("a.jpg", PNG), ("b.jpg", PNG), ("a.json", b'{"caption": "a"}'), ("b.json", b'{"caption": "b"}')]
    source = Shards(write_tar(tmp_path / "0.tar", members))
    with pytest.raises(BadSample, match=r"0\.tar/a: members of a sample are not adjacent"):
        source[0]


def test_a_member_of_negative_size_ends_the_tar(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "0.tar", [("a.png", PNG), ("b.png", PNG), ("c.png", PNG)]))
    tar = bytearray(path.read_bytes())
    start = int(index_shard(str(path)).spans[1, 0, 0]) - 512
    tar[start + 124 : start + 136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")  # base 256, negative
    tar[start + 148 : start + 156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
    path.write_bytes(tar)
    keys = [item.reason if isinstance(item, BadSample) else item.key for item in iter_shard(str(path))]
    assert keys == ["a", "truncated tar"]

"""Broken inputs give a sound result or an error that names them: drawn from a seed, and those that once did not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

import opencloc
from opencloc.config import TrainConfig, from_json
from opencloc.data.sample import Sample, parse_record
from opencloc.data.sidecar import read_sidecar
from opencloc.data.sources.spec import open_source
from opencloc.data.tars.shards import Shards
from opencloc.eval.sets import captions, coco, grit, refcoco
from opencloc.images import decode_image
from opencloc.model.prompts import Text
from tests.eval import sets_on_disk as on_disk
from tests.fuzz import mutate
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import Refused, World, check_boxes, refusing

INPUTS = (
    Path(os.environ.get("OPENCLOC_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "cases" / "inputs"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_two_thousand_broken_inputs_are_sound_or_refused_and_the_table_counts_them_all(tmp_path: Path):
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "2000", "--seed", "0", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout + run.stderr
    kinds = json.loads((tmp_path / "figures.json").read_text())["kinds"]
    assert sum(one["tried"] for one in kinds.values()) == 2000
    for name, one in kinds.items():
        assert one["findings"] == []
        assert one["fine"] + one["refused"] == one["tried"]
        row = f"| {one['tried']:,} | {one['fine']:,} | {one['refused']:,} | 0 |"
        assert any(line.startswith(f"| {name} |") and line.endswith(row) for line in _lines(tmp_path / "README.md"))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_same_seed_gives_the_same_input():
    for breaks, sound in (
        (mutate.broken_bytes, b"some bytes"),
        (mutate.broken_json, {"a": [1, {"b": None}], "c": "d"}),
    ):
        once, again = ([breaks(sound, Random(f"0 x {n}")) for n in range(50)] for _ in range(2))  # pyright: ignore
        assert once == again
        assert len(set(once)) > 25


def test_a_finding_is_reported_with_the_input_that_made_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from tests.fuzz import __main__ as program
    from tests.fuzz import kinds, world

    def broken(_: World, rng: Random) -> None:
        """nothing"""
        if rng.random() < 0.5:
            raise Refused
        raise KeyError("raw")

    monkeypatch.setattr(kinds, "KINDS", {"odd": kinds.Kind(share=100, attempt=broken)})
    monkeypatch.setattr(world, "World", lambda folder: None)
    monkeypatch.setattr(program, "prepare_process", lambda folder: None)  # it is pytest's
    assert program.main(["--inputs", "20", "--out", str(tmp_path)]) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())["kinds"]["odd"]
    assert figures["refused"] + len(figures["findings"]) == 20
    assert "KeyError: 'raw' (test_fuzz.py" in figures["findings"][0]
    with pytest.raises(KeyError, match="raw"):
        program.main(["--only", figures["findings"][0].split(": ")[0]])


# -- what was found once -----------------------------------------------------------------------------------------------


def test_a_caption_entry_that_is_no_object_is_named(tmp_path: Path):
    on_disk.write_karpathy(tmp_path, "coco")
    path = tmp_path / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][0]["sentences"] = ["a dog"]
    on_disk.write_json(path, content)
    with pytest.raises(ValueError, match=r"dataset_coco\.json.*sentence must be an object with raw"):
        captions.coco_retrieval(str(tmp_path))


@pytest.mark.parametrize("file", ["Sentences/36979.txt", "test.txt"])
def test_a_listing_that_is_not_utf8_is_named(tmp_path: Path, file: str):
    from opencloc.eval.sets.flickr_entities import flickr30k_entities

    on_disk.write_entities(tmp_path)
    (tmp_path / file).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{file}: not .*UTF-8"):
        flickr30k_entities(str(tmp_path))


@pytest.mark.parametrize(
    "pickled", [b"X\xff\xff\xff\x7f", b"]." + b"a", b"(lp0\n(dp1\nVann_id\n(lp2\nsVsplit\nVval\nsa."]
)
def test_refs_that_are_damaged_or_of_odd_types_are_named(tmp_path: Path, pickled: bytes):
    on_disk.write_refer(tmp_path)
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickled)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p"):
        refcoco.refcoco(str(tmp_path))


def test_a_damaged_page_of_parquet_is_named(tmp_path: Path):
    on_disk.write_grit(tmp_path, parquet=True)
    path = tmp_path / "00000.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page; the footer is sound
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"00000\.parquet"):
        grit.grit_retrieval(str(tmp_path))


def test_a_parquet_whose_columns_have_no_names_in_utf8_is_named(tmp_path: Path):
    on_disk.write_grit(tmp_path, parquet=True)
    path = tmp_path / "00000.parquet"
    path.write_bytes(path.read_bytes().replace(b"caption", b"c\xffption"))
    with pytest.raises(ValueError, match=path.name):
        grit.grit_retrieval(str(tmp_path))
    with pytest.raises(ValueError, match=path.name):
        read_sidecar(str(path))


def test_a_tokenizer_at_which_the_library_panics_is_named(world: World):
    with world.fresh(world.checkpoints[0]) as folder:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["continuing_subword_prefix"] = "longer than any entry of the vocabulary"
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=str(folder)):
            opencloc.load(folder)


@pytest.mark.parametrize("value", [1e38, 0.0])
def test_weights_that_make_embeddings_of_no_meaning_give_an_error_instead_of_an_answer(world: World, value: float):
    predictor = opencloc.load(world.checkpoints[0])
    with torch.no_grad():
        predictor.model.clip.text_projection.weight.fill_(value)
    with pytest.raises(ValueError, match="text embeddings that are not finite or are zero"):
        predictor.embed_texts(["a dog"])


def test_a_text_embedding_that_is_not_finite_is_no_prompt(world: World):
    with pytest.raises(ValueError, match="not finite"):
        world.predictor.embed(world.photo, [Text(torch.full((24,), torch.nan))])


@pytest.mark.parametrize(
    "boxes", [torch.rand(4), torch.tensor(0.5), torch.rand(1, 2, 3), [torch.rand(4)], [torch.rand(2, 1)]]
)
def test_boxes_of_another_shape_are_refused_and_not_spread_over_four_edges(world: World, boxes):
    with pytest.raises((ValueError, TypeError)):
        world.predictor.model.encode_regions(world.photo.features, boxes)


@pytest.mark.parametrize("boxes", [[[]], [[1, 2, 3, 4], [1]], [[1, 2, 3, 4j]]])
def test_rows_that_are_not_four_numbers_are_refused_by_name(world: World, boxes):
    with pytest.raises((ValueError, TypeError), match="boxes_px"):
        world.predictor.embed(world.photo, boxes_px=boxes)


@pytest.mark.parametrize("scores", [0.5, "a", [1j], [None]])
def test_scores_that_are_no_numbers_are_refused_by_name(world: World, scores):
    with pytest.raises((ValueError, TypeError), match="scores"):
        world.predictor.draw(world.photo, [[1, 1, 20, 20]], ["a"], scores)


@pytest.mark.parametrize("name", ["a\0b.jpg", "a\ud800.jpg"])
def test_names_that_no_file_can_have_are_refused_by_name(world: World, name: str):
    with pytest.raises(ValueError, match="cannot be the name"):
        world.predictor.encode(name)
    with pytest.raises(ValueError, match="no file has"):
        open_source(f"folder:{name}")


# -- inputs kept from earlier ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INPUTS.is_dir(), reason=f"no folder of inputs at {INPUTS}")
def test_the_inputs_that_failed_once_are_sound_or_refused(world: World, tmp_path: Path):
    failed = []
    for path in sorted(INPUTS.iterdir()):
        try:
            _try_kept(world, path, tmp_path / path.name)
        except Refused:
            pass
        except Exception as error:
            failed.append(f"{path.name}: {error!r}"[:300])
    assert failed == []


def _try_kept(world: World, path: Path, folder: Path) -> None:
    """Reads an input as its name says."""
    folder.mkdir()
    name, data = path.name, path.read_bytes()
    target = folder / name
    if name.startswith("config_ckpt-train"):
        with refusing(name):
            from_json(TrainConfig, data, name)
    elif name.startswith("config_ckpt"):
        shutil.copytree(world.checkpoints[0], folder / "model")
        kind = "config.json" if "eval_config" in name else name.removeprefix("config_ckpt-mutated_").rpartition("-")[0]
        (folder / "model" / kind.replace("_json", ".json")).write_bytes(data)
        with refusing(folder):
            opencloc.load(folder / "model").embed_texts(["a dog"])
    elif path.suffix == ".json" and name.startswith(("json-", "record-")):
        with refusing(name):
            Sample(key="a", image=world.image, where=name, **parse_record(name, data, None))
    elif "stats_json" in name:
        (folder / "00000.tar").write_bytes((world.sets / "grit/00000.tar").read_bytes())
        (folder / "00000_stats.json").write_bytes(data)
        with pytest.warns(UserWarning, match="no count that its tar could hold"):
            assert Shards(str(folder / "00000.tar")).size == 2
    elif path.suffix == ".json":
        target.write_bytes(data)
        readers = {"karpathy": captions.coco_retrieval, "lvis": coco.lvis_recognition, "fg_ovd": None}
        with refusing(folder, world.sets):
            kind = next((kind for kind in readers if kind in name), "coco")
            if (read := readers.get(kind, coco.coco_recognition)) is None:
                coco.fg_ovd(str(target), images=str(world.sets / "fg_ovd/coco"))
            else:
                read(str(world.sets / kind), annotations=str(target))
    elif path.suffix == ".parquet":
        target.write_bytes(data)
        with refusing(folder):
            for row in read_sidecar(str(target)).values():
                check_boxes(row.boxes)
    elif path.suffix == ".tar":
        (folder / "00000.tar").write_bytes(data)
        with refusing(folder):
            grit.grit_retrieval(str(folder))
    else:
        with refusing(name):
            decode_image(data, name)


def test_every_kind_says_what_it_breaks():
    assert all((kind.attempt.__doc__ or "").strip() for kind in KINDS.values())
    assert sum(kind.share for kind in KINDS.values()) == 100

"""Statements about whole images: SugarCrepe's pairs and VSR's true and false ones, read and scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opencloc.eval.registry import open_set
from opencloc.eval.sets.item import by_unit
from tests.eval import sets_on_disk as disk
from tests.eval.oracle import Oracle
from tests.eval.test_sets import changed, colour
from tests.eval.test_tasks import result_of, values


def test_sugarcrepe_pairs_of_all_files_lie_with_their_images(tmp_path: Path) -> None:
    disk.write_sugarcrepe(tmp_path)
    data = open_set("sugarcrepe", str(tmp_path))
    first, second = data.items
    assert first.pairs[0] == ("add_att", "add_att of 1", "add_att, not 1")
    assert ([len(item.pairs) for item in (first, second)], colour(second)) == ([4, 4], "green")
    changed(tmp_path / "data/swap_obj.json", lambda content: next(iter(content.values())).update(caption=" "))
    assert by_unit(open_set("sugarcrepe", str(tmp_path)).skipped) == {"texts": {"empty": 1}}
    changed(tmp_path / "data/swap_obj.json", lambda content: next(iter(content.values())).update(caption=3))
    with pytest.raises(ValueError, match=r"swap_obj\.json: entry '7' .*: caption must be str, it is 3"):
        open_set("sugarcrepe", str(tmp_path))
    (tmp_path / "data/swap_att.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*swap_att\.json"):
        open_set("sugarcrepe", str(tmp_path))


def test_vsr_statements_are_true_or_false(tmp_path: Path) -> None:
    disk.write_vsr(tmp_path)
    data = open_set("vsr", str(tmp_path))
    on, under = "The cat is on the mat of 1.", "The cat is under the mat of 1."
    assert data.items[0].claims == ((on, True), (under, False))
    file = tmp_path / "data/splits/random/test.jsonl"
    for line, message in (
        ("{", r"line 5: not JSON"),
        ('{"label": 2, "caption": "", "image": ""}', r"label is 2, must be"),
    ):
        file.write_text(file.read_text() + line + "\n")
        with pytest.raises(ValueError, match=message):
            open_set("vsr", str(tmp_path))
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))


def test_pairs_of_captions_are_scored_by_category_and_ties_are_wrong(tmp_path: Path) -> None:
    disk.write_sugarcrepe(tmp_path)
    got = result_of("sugarcrepe", str(tmp_path), Oracle({"red": "add_att of 1", "green": "add_att, not 2"}))
    assert got.scores["top1"].of == "8 pairs"
    assert values(got, "top1_add_att") == [0.5]
    kinds = [score.value for key, score in got.scores.items() if key.startswith("top1_")]
    assert len(kinds) == 7
    assert values(got, "macc") == pytest.approx([sum(kinds) / 7])
    flat = Oracle({})
    flat.vector = lambda text: torch.ones(256) / 16  # knows nothing
    assert values(result_of("sugarcrepe", str(tmp_path), flat), "top1", "macc") == [0, 0]


def test_statements_are_scored_by_the_area_under_the_roc_curve(tmp_path: Path) -> None:
    disk.write_vsr(tmp_path)
    right = Oracle({"red": "the cat is on the mat of 1.", "green": "the cat is on the mat of 2."})
    got = result_of("vsr", str(tmp_path), right)
    assert values(got, "auc") == [1.0]
    assert got.scores["auc"].of == "2 true statements against 2 false ones"
    half = Oracle({"red": "the cat is on the mat of 1.", "green": "the cat is under the mat of 2."})
    assert values(result_of("vsr", str(tmp_path), half), "auc")[0] in (
        0.5,
        0.75,
    )  # the second true one beats one or none
    half.vector = lambda text: torch.ones(256) / 16
    assert values(result_of("vsr", str(tmp_path), half), "auc") == [0]

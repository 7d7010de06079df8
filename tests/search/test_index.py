import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from opencloc.cli import main
from opencloc.search import index as index_module
from opencloc.search.index import INTERRUPTED, IndexConfig, IndexReport, format_report, run_index
from opencloc.search.store import Store, open_store
from opencloc.vesl.workers import WorkersConfig
from tests.search.conftest import photo, save_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_photos(tmp_path / "photos", 7)
    return tmp_path / "photos"


@pytest.fixture
def run(folder: Path, model: str, tmp_path: Path) -> Callable[..., IndexReport]:
    def run(out: str = "index", where: WorkersConfig | None = None, **options: Any) -> IndexReport:
        values = {"photos": (str(folder),), "out": str(tmp_path / out), "model": model, "device": "cpu"} | options
        return run_index(IndexConfig(**values), where)

    return run


def content(path: Path | str) -> tuple[list[Any], list[Any]]:
    """Everything in a library, in an order that does not depend on how it came there."""
    store = open_store(str(path))
    photos = store.photos.search().limit(None).to_arrow().to_pylist()
    regions = store.regions.search().limit(None).to_arrow().to_pylist()
    for row in regions:
        row["vector"] = np.asarray(row["vector"], np.float16).tobytes()
    return (
        sorted(photos, key=lambda row: row["path"]),
        sorted(regions, key=lambda row: (row["photo"], row["number"])),
    )


def check_whole(path: Path | str) -> None:
    """Every photo has its regions, once, and no regions are without a photo."""
    known = open_store(str(path)).check()
    assert not known.broken
    assert not known.doubled
    assert not known.unused


def test_without_a_model_the_packaged_one_indexes_and_answers(folder: Path, tmp_path: Path, capsys) -> None:
    index = str(tmp_path / "index")
    assert main(["index", str(folder), "--out", index, "--device", "cpu"]) == 0
    assert open_store(index).settings.model == "tiny"
    capsys.readouterr()
    assert main(["search", index, "a red apple", "--json", "--device", "cpu"]) == 0
    assert str(folder) in capsys.readouterr().out


def test_new_changed_moved_doubled_and_deleted_photos(folder: Path, run, tmp_path: Path) -> None:
    first = run()
    assert (first.photos, first.added, first.encoded, first.exit_code) == (7, 7, 7, 0)
    same = run()
    assert (same.photos, same.added, same.changed, same.removed, same.encoded) == (7, 0, 0, 0, 0)
    photo(100).save(folder / "new.png")
    photo(101, 50, 50).save(folder / "001.png")
    (folder / "moved").mkdir()
    (folder / "002.png").rename(folder / "moved" / "there.png")
    shutil.copy(folder / "003.png", folder / "copy.png")
    (folder / "004.png").unlink()
    after = run()
    assert (after.photos, after.added, after.changed, after.removed) == (8, 3, 1, 2)
    assert after.encoded == 2  # the new one and the changed one
    check_whole(tmp_path / "index")
    run("afresh")
    assert content(tmp_path / "index") == content(tmp_path / "afresh")


def test_broken_photos_are_counted_by_reason_and_the_rest_goes_on(folder: Path, run) -> None:
    (folder / "a.jpg").write_bytes(b"no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    report = run()
    assert report.photos == 7
    assert report.skipped == {"broken image": 2, "not an image": 1}
    assert report.exit_code == 0
    text = format_report("out", report)
    assert "skipped: broken image (2)" in text
    assert "a.jpg" in text


def test_an_empty_folder_leaves_the_library_as_it_was(folder: Path, run, tmp_path: Path) -> None:
    run()
    before = content(tmp_path / "index")
    folder.rename(folder.with_name("away"))
    folder.mkdir()
    with pytest.raises(ValueError, match="no photo"):
        run()
    assert content(tmp_path / "index") == before


def test_photos_under_a_folder_that_cannot_be_listed_stay(folder: Path, run, monkeypatch, tmp_path: Path) -> None:
    save_photos(folder / "locked", 2, first=50)
    assert run().photos == 9
    walk = os.walk

    def refusing(top: str, onerror: Any, **options: Any) -> Any:
        for root, folders, names in walk(top, onerror=onerror, **options):
            if "locked" in folders:
                folders.remove("locked")
                onerror(PermissionError(13, "Permission denied", os.path.join(root, "locked")))
            yield root, folders, names

    monkeypatch.setattr(os, "walk", refusing)
    report = run()
    assert report.photos == 9
    assert report.skipped["unreadable folder"] == 1


def test_two_folders_in_one_library_are_kept_up_to_date_apart(folder: Path, run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_photos(other, 2, first=20)
    run()
    assert run(photos=(str(other),)).photos == 9
    (other / "020.png").unlink()
    assert run().photos == 9  # the other folder was not looked at
    assert run(photos=(str(folder), str(other))).photos == 8


# -- kills ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def _write(store: Store, counted: Callable[..., None], original: Callable[..., None], *arguments: Any) -> None:
    counted(original, store, *arguments)


@pytest.fixture
def small_commits(monkeypatch) -> None:
    monkeypatch.setattr(index_module, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(index_module, "COMMIT_EVERY_S", -1.0)


@pytest.mark.parametrize("write", range(9))
def test_killed_after_any_write_and_run_again_the_library_equals_an_undisturbed_one(
    write: int, folder: Path, run, monkeypatch, tmp_path: Path, small_commits
) -> None:
    run()
    photo(100).save(folder / "new.png")
    photo(101).save(folder / "001.png")
    (folder / "002.png").rename(folder / "moved.png")
    (folder / "004.png").unlink()
    shutil.copytree(tmp_path / "index", tmp_path / "undisturbed")
    run("undisturbed")
    writes = 0
    with monkeypatch.context() as patched:

        def counted(original: Callable[..., None], *arguments: Any) -> None:
            nonlocal writes
            original(*arguments)
            writes += 1
            if writes == write + 1:
                raise Killed

        for name in ("_add", "_upsert", "_delete", "_optimize"):
            patched.setattr(Store, name, functools.partialmethod(_write, counted, getattr(Store, name)))
        with contextlib.suppress(Killed):
            run()
    assert writes == min(write + 1, 8)  # add and upsert, twice; deleted photos, deleted regions, two tables tidied
    run()
    check_whole(tmp_path / "index")
    assert content(tmp_path / "index") == content(tmp_path / "undisturbed")


KILL = """
import os, signal, sys
from opencloc.search import index
from opencloc.search.store import Store
index.IMAGES_AT_ONCE, index.COMMIT_EVERY_S = 1, -1.0
add, count = Store._add, 0
def killing(*arguments):
    global count
    add(*arguments)
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Store._add = killing
index.run_index(index.IndexConfig(photos=(sys.argv[1],), out=sys.argv[2], model=sys.argv[3], device="cpu"))
"""


def test_a_process_that_was_killed_leaves_a_library_that_goes_on(folder: Path, run, model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "index")
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(folder), out, model],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    known = open_store(out).check()
    assert len(known.contents) == 3
    assert len(known.versions) == 2  # the regions of the third were there, its row was not
    report = run()
    assert report.encoded == 4
    run("undisturbed")
    assert content(out) == content(tmp_path / "undisturbed")


def test_ctrl_c_ends_the_run_and_the_next_one_goes_on(run, monkeypatch, tmp_path: Path, small_commits, capsys) -> None:
    advance = index_module.Meter.advance

    def interrupted(meter: Any, count: int = 1) -> None:
        advance(meter, count)
        if meter.done >= 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(index_module.Meter, "advance", interrupted)
        report = run()
    assert (report.stopped, report.exit_code) == (INTERRUPTED, 130)
    assert report.photos == 4
    assert run().added == 3
    assert "resuming: 4 photos" in capsys.readouterr().err
    run("undisturbed")
    assert content(tmp_path / "index") == content(tmp_path / "undisturbed")


def test_a_full_disk_is_an_error_that_names_the_index_which_stays_whole(run, monkeypatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_upsert", full)
        report = run()
    assert report.exit_code == 1
    assert "No space left on device" in str(report.stopped)
    assert str(tmp_path / "index") in str(report.stopped)
    assert run().photos == 7
    check_whole(tmp_path / "index")


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(run, tmp_path: Path) -> None:
    run()
    with filelock.FileLock(tmp_path / "index" / ".lock"), pytest.raises(ValueError, match="another `opencloc index`"):
        run()


def test_another_model_is_refused_naming_both_and_so_are_other_regions(run, make_model, model: str, tmp_path) -> None:
    run()
    other = make_model(tmp_path / "other-model", seed=1)
    with pytest.raises(ValueError, match="was made by the model") as caught:
        run(model=other)
    assert model in str(caught.value)
    assert other in str(caught.value)
    with pytest.raises(ValueError, match="regions 'grid', not 'whole'"):
        run(regions="whole")


def test_a_folder_with_something_else_and_a_foreign_table_are_refused(folder: Path, run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds something else"):
        run("photos")
    import lancedb

    foreign = lancedb.connect(tmp_path / "foreign")
    for name in ("photos", "regions"):
        foreign.create_table(name, data=[{"a": 1}])
    with pytest.raises(ValueError, match="is not of an index"):
        run("foreign")
    with pytest.raises(FileNotFoundError, match="no such index"):
        open_store(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is no index"):
        open_store(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photos": ()}, "no photos"),
        ({"regions": "detector"}, "go together"),
        ({"detector": "x.py:f"}, "go together"),
        ({"names": ("dog",)}, "--names"),
    ],
)
def test_wrong_configurations_are_named(run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


# -- ways to run ---------------------------------------------------------------------------------------------------

DETECTOR = """
import numpy as np
from opencloc.vesl.detect import Detections

def factory():
    def detect(images, phrases):
        assert all(list(own) == ["dog"] for own in phrases)
        boxes = np.array([[0.1, 0.1, 0.4, 0.5], [0.5, -0.1, 1.2, 0.4], [0.9, 0.9, 0.9, 1.0]])
        scores, phrase = np.array([0.5, 0.9, 0.3]), np.zeros(3, int)
        return [Detections(boxes=boxes, scores=scores, phrase=phrase) for _ in images]
    return detect
"""


def test_a_detectors_boxes_are_stored_clipped_the_whole_photo_first(run, tmp_path: Path) -> None:
    (tmp_path / "detector.py").write_text(DETECTOR)
    run(regions="detector", detector=f"{tmp_path}/detector.py:factory", names=("dog",))
    boxes: dict[int, list[list[float]]] = {}
    for row in content(tmp_path / "index")[1]:
        boxes.setdefault(row["photo"], []).append(np.round(row["box"], 3).tolist())
    found = {tuple(box) for own in boxes.values() for box in own}
    assert found <= {(0, 0, 1, 1), (0.5, 0, 1, 0.4), (0.1, 0.1, 0.4, 0.5)}
    assert len(found) > 1
    assert all(own[0] == [0, 0, 1, 1] for own in boxes.values())


def test_a_local_ray_cluster_writes_the_library_that_one_process_writes(run, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(index_module, "PHOTOS_PER_SHARD", 2)
    report = run("ray", WorkersConfig(ray="local", workers=2))
    assert (report.photos, report.failed_shards, report.stopped) == (7, {}, None)
    assert len(report.reports) == 4
    check_whole(tmp_path / "ray")
    run("one")
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def test_what_two_writers_doubled_is_put_right_by_the_next_run(run, tmp_path: Path) -> None:
    run()
    expected = content(tmp_path / "index")
    store = open_store(str(tmp_path / "index"))
    some = store.regions.search().where(f"photo = {expected[1][0]['photo']}").limit(None).to_arrow()
    store.regions.add(some)
    assert store.check().doubled
    run()
    check_whole(tmp_path / "index")
    assert content(tmp_path / "index") == expected

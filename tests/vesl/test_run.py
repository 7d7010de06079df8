"""Runs over many shards: resume after any end, workers that die, Ray, retries, and what people are told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from opencloc.cli import main
from opencloc.data.scenes.scenes import SceneConfig, write_scenes
from opencloc.data.sidecar import read_sidecar
from opencloc.vesl import run as run_module
from opencloc.vesl.config import LabelConfig
from opencloc.vesl.label import Shard, ShardReport, find_shards
from opencloc.vesl.run import RunConfig, RunReport, format_report, run_label
from opencloc.vesl.workers import Outcome

ORACLE = Path(__file__).with_name("oracle.py")
SHARDS = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(SceneConfig(mode="easy"), 4 * SHARDS, str(folder), images_per_shard=4)
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(scenes: str, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    report = run_label(configure(scenes, folder))
    assert report.complete
    return folder


def configure(scenes: str, output: Path, batch_size: int = 2, **options: str) -> LabelConfig:
    query = "&".join(f"{name}={value}" for name, value in {"shards": scenes, **options}.items())
    detector = f"{ORACLE}:factory?{query}"
    return LabelConfig(data=(scenes,), out=str(output), detector=detector, phrases="n-grams", batch_size=batch_size)


def key(number: int) -> str:
    return f"easy-train-0-{number:09d}"


def assert_same_labels(folder: Path, expected: Path) -> None:
    paths = sorted(expected.glob("*.parquet"))
    assert [path.name for path in sorted(folder.glob("*.parquet"))] == [path.name for path in paths]
    for path in paths:
        assert (folder / path.name).read_bytes() == path.read_bytes()


def assert_no_half_files(folder: Path) -> None:
    """Every sidecar can be read; every stats file has its sidecar and is whole."""
    for path in folder.glob("*.parquet"):
        assert len(read_sidecar(str(path))) == 4
    for path in folder.glob("*_stats.json"):
        assert json.loads(path.read_text())["images"] == 4
        assert path.with_name(path.name.replace("_stats.json", ".parquet")).exists()


def test_a_second_run_says_what_is_finished_and_redoes_what_is_not(
    scenes: str, tmp_path: Path, undisturbed, capsys
) -> None:
    config = configure(scenes, tmp_path)
    run_label(config)
    (tmp_path / "00001.vesl_stats.json").unlink()  # as if killed between the two files of a shard
    (tmp_path / "00002.vesl.parquet").unlink()
    leftovers = ("00001.vesl.parquet", "00001.vesl_stats.json", "vesl_manifest.json", "other")
    for name in (f".{name}.123.partial" for name in leftovers):
        (tmp_path / name).write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0000[03]*")}
    report = run_label(config)
    assert (report.finished_before, len(report.reports)) == (2, 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("0000[03]*")} == kept
    assert [path.name for path in tmp_path.glob(".*")] == [".other.123.partial"]
    assert f"resuming: 2 of 4 shards are finished, the next is {scenes}/00001.tar" in capsys.readouterr().err
    assert_same_labels(tmp_path, undisturbed)


def test_a_finished_run_does_nothing_and_loads_no_model(scenes: str, tmp_path: Path) -> None:
    run_label(configure(scenes, tmp_path))
    report = run_label(configure(scenes, tmp_path))
    assert report.finished_before == SHARDS
    assert report.complete
    assert not report.reports


def test_labels_of_another_configuration_are_not_mixed(scenes: str, tmp_path: Path) -> None:
    run_label(configure(scenes, tmp_path))
    with pytest.raises(ValueError, match="made with another configuration"):
        run_label(configure(scenes, tmp_path, score="0.5"))
    (tmp_path / "vesl_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"vesl_manifest.json is missing, but labels 'vesl' lie beside it"):
        run_label(configure(scenes, tmp_path))


def test_an_interrupted_run_is_reported_and_goes_on_where_it_was(scenes: str, tmp_path: Path, undisturbed) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    config = configure(scenes, tmp_path, interrupt=key(9), once=str(marks))
    report = run_label(config)
    assert (report.stopped, len(report.reports), report.not_started) == ("interrupted", 2, 2)
    summary = format_report(report)
    assert summary.splitlines()[0] == str(tmp_path)
    assert "8 images labelled" in summary
    assert "2 shards left" in summary
    assert "same command again" in summary
    again = run_label(config)
    assert (again.finished_before, len(again.reports), again.complete) == (2, 2, True)
    assert_same_labels(tmp_path, undisturbed)


def test_retry_failed_redoes_only_shards_with_failures(scenes: str, tmp_path: Path, undisturbed: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    # Alone in its batch, so that the oracle's one failure isn't made good by asking for the image alone.
    config = configure(scenes, tmp_path, batch_size=1, fail=f"{key(1)},{key(14)}", once=str(marks))
    first = run_label(config)
    assert first.complete
    assert first.skipped()["detector failed (RuntimeError)"].count == 2
    assert "14 images labelled" in format_report(first)
    assert "skipped: detector failed (RuntimeError) (2), for example" in format_report(first)
    assert "--retry-failed" in format_report(first)
    untouched = run_label(config)
    assert untouched.finished_before == SHARDS
    report = run_label(config, RunConfig(retry_failed=True))
    assert (report.finished_before, len(report.reports), report.skipped()) == (2, 2, {})
    assert_same_labels(tmp_path, undisturbed)


def test_a_run_that_labels_no_image_is_a_failure(scenes: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/0.png")  # without a caption
    config = replace(configure(scenes, tmp_path), data=(str(tmp_path / "photos"),))
    report = run_label(config)
    assert (report.complete, report.images, report.labelled, report.exit_code) == (True, 1, 0, 1)


def test_without_a_detector_the_command_says_what_to_give(scenes: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["label", "--data", scenes])
    assert "google/owlv2" in capsys.readouterr().err


def test_an_address_with_a_password_does_not_reach_the_console(scenes: str, tmp_path: Path, capsys) -> None:
    url = "https://user:PASSWORD@host.invalid/v1?api_key=PASSWORD"
    for option in ("--captions.captioner", "--data"):
        arguments = ["label", "--detector", f"{ORACLE}:broken", "--out", str(tmp_path), "--data", scenes, option, url]
        with contextlib.suppress(SystemExit):
            assert main(arguments) == 1
    said = capsys.readouterr()
    assert "PASSWORD" not in said.out + said.err


def test_models_that_cannot_be_loaded_stop_the_run_and_leave_nothing(scenes: str, tmp_path: Path) -> None:
    broken = LabelConfig(data=(scenes,), out=str(tmp_path), detector=f"{ORACLE}:broken")
    with pytest.raises(ValueError, match="RuntimeError: no such weights"):
        run_label(broken)
    assert not list(tmp_path.iterdir())
    assert run_label(configure(scenes, tmp_path)).complete  # the corrected command


class FakeWorkers:
    """Two workers; `plan` says, for every attempt at a shard, why it fails (None: it doesn't)."""

    def __init__(self, plan: dict[str, list[str | None]]) -> None:
        self.plan, self.busy, self.order = plan, [], []

    def idle(self) -> int:
        return 2 - len(self.busy)

    def submit(self, shard: Shard) -> None:
        assert len(self.busy) < 2
        self.busy.append(shard)
        self.order.append(shard.source)

    def outcomes(self):
        shard = self.busy.pop(0)
        problem = self.plan[shard.source].pop(0)
        yield Outcome(shard=shard, report=None if problem else finished(shard), problem=problem or "")

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass


def finished(shard: Shard) -> ShardReport:
    return ShardReport(
        source=shard.source,
        sidecar=shard.sidecar,
        config_hash="",
        images=1,
        labelled=1,
        regions=1,
        phrases=1,
        images_without_phrases=0,
        skipped={},
        dropped={},
        seconds={},
        models={},
        versions={},
    )


def drive(plan: dict[str, list[str | None]], monkeypatch, tmp_path: Path) -> tuple[RunReport, list[str]]:
    """A run of fake workers over shards named in the plan."""
    shards = [Shard(source=name, sidecar=str(tmp_path / name)) for name in plan]
    workers = FakeWorkers(plan)
    monkeypatch.setattr(run_module, "find_shards", lambda config: shards)
    monkeypatch.setattr(run_module, "_workers", lambda *_: workers)
    config = LabelConfig(data=("unused",), out=str(tmp_path), detector="unused")
    return run_label(config, RunConfig(max_attempts=3)), workers.order


def test_a_failed_shard_is_tried_again_after_the_others_a_bounded_number_of_times(monkeypatch, tmp_path) -> None:
    plan = {"a": ["lost", "lost", "gone for good"], "b": [None], "c": ["lost", None], "d": [None]}
    report, order = drive(plan, monkeypatch, tmp_path)
    assert order == ["a", "b", "c", "d", "a", "c", "a"]
    assert report.failed_shards == {"a": "gone for good"}
    assert report.exit_code == 1
    assert len(report.reports) == 3
    assert not report.complete
    assert "a: gone for good" in format_report(report)


def test_a_run_in_which_nothing_succeeds_any_more_stops(monkeypatch, tmp_path: Path) -> None:
    plan = {"good": [None], **{str(i): ["no space left"] * 3 for i in range(20)}}
    report, order = drive(plan, monkeypatch, tmp_path)
    assert report.stopped == "10 attempts failed in a row, last: no space left"
    assert len(order) <= 1 + 10 + 2
    assert report.not_started == 20


def test_two_local_workers_give_what_one_process_gives_though_one_is_killed(
    scenes, tmp_path, undisturbed, capfd
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    config = configure(scenes, tmp_path, die=key(5), once=str(marks))
    report = run_label(config, RunConfig(workers=2))
    assert report.complete
    assert len(report.reports) == SHARDS
    said = capfd.readouterr().err
    assert "killed by SIGKILL, perhaps for want of memory" in said
    assert_same_labels(tmp_path, undisturbed)


def test_a_local_ray_cluster_gives_what_one_process_gives_though_an_actor_is_killed(
    scenes, tmp_path, undisturbed, monkeypatch, capsys
) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    marks = tmp_path / "marks"
    marks.mkdir()
    config = configure(scenes, tmp_path, die=key(5), once=str(marks))
    report = run_label(config, RunConfig(ray="local", workers=2))
    assert report.complete
    assert len(report.reports) == SHARDS
    assert report.images == 4 * SHARDS
    assert "the Ray worker died" in capsys.readouterr().err
    assert_same_labels(tmp_path, undisturbed)


class FakeRay(types.ModuleType):
    """A Ray whose start fails a number of times, as on a machine that is too busy for it."""

    def __init__(self, failures: int) -> None:
        super().__init__("ray")
        self.failures, self.starts, self.stops = failures, 0, 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception("The current node timed out during startup.\nA long story.")

    def shutdown(self) -> None:
        self.stops += 1

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 0.0}


@pytest.mark.parametrize(("failures", "message"), [(1, "has no room"), (2, "timed out during startup.  On one")])
def test_ray_gets_a_second_try_and_then_one_sentence(
    scenes, tmp_path, monkeypatch, failures: int, message: str
) -> None:
    ray = FakeRay(failures)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=message) as caught:
        run_label(configure(scenes, tmp_path), RunConfig(ray="local"))
    assert "\n" not in str(caught.value)
    assert ray.starts == ray.stops == 2


def start(config: LabelConfig, workers: int) -> subprocess.Popen:
    """A run in a process of its own, as from the command line."""
    arguments = ["--data", *config.data, "--out", str(config.out), "--detector", config.detector]
    arguments += ["--phrases", config.phrases, "--batch-size", str(config.batch_size), "--workers", str(workers)]
    command = [sys.executable, "-m", "opencloc", "label", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Waits as long as it takes, or until the process has ended."""
    while not condition() and (process is None or process.poll() is None):
        time.sleep(0.002)


@pytest.mark.parametrize(("workers", "kill_after"), [(0, (1, 3)), (2, (2,))])
def test_kill_9_leaves_no_half_file_and_the_next_run_ends_as_if_undisturbed(
    scenes, tmp_path, undisturbed, workers: int, kill_after: tuple[int, ...]
) -> None:
    out, hold, held = tmp_path / "out", tmp_path / "hold.key", tmp_path / "hold.held"
    config = configure(scenes, out, hold=str(hold))
    for finished in kill_after:  # shards
        hold.write_text(key(4 * finished))
        held.unlink(missing_ok=True)
        with start(config, workers) as process:
            wait_until(lambda n=finished: held.exists() and len(list(out.glob("*_stats.json"))) >= n, process)
            children = children_of(process.pid)
            process.send_signal(signal.SIGKILL)
            hold.unlink()
            process.communicate()
        for child in children:  # workers end by themselves once their parent is gone
            wait_until(lambda pid=child: not alive(pid))
        assert_no_half_files(out)
    report = run_label(config)
    assert report.complete
    assert report.finished_before >= kill_after[-1]
    assert_same_labels(out, undisturbed)


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may just have ended
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_a_run_in_order(scenes, tmp_path, undisturbed, workers: int) -> None:
    out, hold = tmp_path / "out", tmp_path / "hold.key"
    hold.write_text(key(8))
    with start(configure(scenes, out, hold=str(hold)), workers) as process:
        wait_until((tmp_path / "hold.held").exists, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Stopped: interrupted." in output
    assert "Traceback" not in output
    assert "leaked" not in output
    assert_no_half_files(out)


def test_workers_leave_nothing_behind(scenes, tmp_path, undisturbed) -> None:
    with start(configure(scenes, tmp_path), 2) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "leaked" not in output
    assert_same_labels(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("field", "value"), [("workers", -1), ("max_attempts", 0), ("gpus_per_worker", -0.5), ("cpus_per_worker", -1)]
)
def test_a_run_option_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"-1|-0.5|got 0"):
        RunConfig(**{field: value})  # pyright: ignore


def test_every_shard_of_the_input_is_found_once(scenes: str, tmp_path: Path) -> None:
    assert len({shard.sidecar for shard in find_shards(configure(scenes, tmp_path))}) == SHARDS

"""Hours of training under kill -9: does the run end with the same checkpoint as one left in peace?

    python -m benchmarks.soak --seconds 3600 --out results/soak

Two runs of one configuration go side by side, one thread each.  One is left alone.  The other is hit at random
moments: its whole process group is killed or, every third time, one loader worker alone (the training must then end by
itself, with an error).  It is started again with another number of workers.  At the end all files of the last
checkpoints are compared byte by byte (CPU training is bitwise reproducible): weights, optimizer, step, counts of
unusable samples.

The data are generated scenes in tars, read as photos would be.  One tar is cut short and one image is broken.  A short
trial chooses the number of steps, so that the run takes about the time asked for.

Prints a summary and writes it to OUT/README.md, with every event in OUT/figures.json.  Exits with 1 if a file differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common import facts, save
from opencloc.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, to_json
from opencloc.data.scenes.scenes import SceneConfig, Scenes
from opencloc.data.tars.shards import ShardWriter, index_shard

TARS, SCENES_PER_TAR = 12, 100
CHECKPOINTS_PER_KILL = 4
TRIAL_STEPS = 30
PATIENCE_S = 300  # for a training whose worker was killed to notice


@dataclass(kw_only=True)
class Disturbed:
    """The run that is killed, and what happened to it."""

    config: Path
    log: Path  # what it prints
    events: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    before: int = 0  # bytes of its log.jsonl when it was started

    def logged(self) -> int:
        """Bytes of its log.jsonl, which gets a line per step."""
        path = self.config.with_suffix("") / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def start(self, num_workers: int) -> None:
        self.before = self.logged()
        self.process, self.started = start_training(self.config, self.log, num_workers), time.time()
        self.events.append({"event": "start", "num_workers": num_workers, "pid": self.process.pid})

    def wait_for_steps(self) -> int | None:
        """Waits until the run has done a step since it was started; its exit status if it ends before."""
        assert self.process is not None
        while self.logged() in (0, self.before) and self.process.poll() is None:
            time.sleep(0.2)
        return self.process.poll()

    def hit(self, worker_only: bool) -> None:
        """Kills the process group, or one worker; notes the newest checkpoint and how the process ended."""
        assert self.process is not None
        workers = children(self.process.pid)
        event: dict[str, Any] = {"after_s": round(time.time() - self.started, 1)}
        if worker_only and workers:
            event["event"] = "worker killed"
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
            try:
                event["exit"] = self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                event["event"] = "hung after its worker was killed"
                os.killpg(self.process.pid, signal.SIGKILL)
                event["exit"] = self.process.wait()
        else:
            event["event"] = "group killed"
            os.killpg(self.process.pid, signal.SIGKILL)
            event["exit"] = self.process.wait()
        self.events.append(event)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="about how long the undisturbed run takes")
    parser.add_argument(
        "--kill-every",
        type=float,
        nargs=2,
        default=(90, 240),
        metavar=("FROM", "TO"),
        help="seconds after its first step",
    )
    parser.add_argument("--max-kills", type=int, default=10_000, help="then the run is left to end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md and figures.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rng = random.Random(arguments.seed)
        figures = facts() | soak(work, arguments.seconds, tuple(arguments.kill_every), arguments.max_kills, rng)
    save(arguments.out, figures, markdown(figures))
    return 0 if figures["equal"] else 1


def soak(
    work: Path, seconds: float, kill_every: tuple[float, float], max_kills: int, rng: random.Random
) -> dict[str, Any]:
    """What happened, and whether the checkpoints are equal."""
    tars = write_tars(work / "tars")
    trial = configuration(work / "trial", tars, steps=TRIAL_STEPS, checkpoint_every=TRIAL_STEPS)
    start_training(write(trial), work / "trial.log", 1).wait()
    rate = steps_per_second(trial)
    steps = max(TRIAL_STEPS, round(rate * seconds))
    every = max(1, round(rate * kill_every[0] / CHECKPOINTS_PER_KILL))
    configs = {
        name: write(configuration(work / name, tars, steps=steps, checkpoint_every=every))
        for name in ("disturbed", "undisturbed")
    }
    peace = start_training(configs["undisturbed"], work / "undisturbed.log", 1)
    run = Disturbed(config=configs["disturbed"], log=work / "disturbed.log")
    try:
        disturb(run, kill_every, max_kills, rng)
        assert peace.wait() == 0, (work / "undisturbed.log").read_text()[-2000:]
    finally:
        for process in (peace, run.process):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    digests = {name: digest(work / name / "checkpoints" / f"step_{steps:07d}") for name in configs}
    state = json.loads((work / "disturbed/checkpoints" / f"step_{steps:07d}" / "train_state.json").read_text())
    logged = [json.loads(line)["step"] for line in (work / "disturbed/log.jsonl").read_text().splitlines()]
    return {
        "steps": steps,
        "checkpoint_every": every,
        "equal": digests["disturbed"] == digests["undisturbed"],
        "sha256": digests,
        "skipped": state["skipped"],
        "images": steps * trial.batch_size,
        "steps_repeated": (len(logged) - len(set(logged))) * trial.log_every,
        "events": run.events,
    }


def disturb(run: Disturbed, kill_every: tuple[float, float], max_kills: int, rng: random.Random) -> None:
    """Starts the run, kills it and starts it again, until it has ended by itself."""
    hits = 0
    run.start(num_workers=2)
    while True:
        assert run.process is not None
        try:
            code = run.wait_for_steps() or run.process.wait(rng.uniform(*kill_every) if hits < max_kills else None)
        except subprocess.TimeoutExpired:
            run.hit(worker_only=hits % 3 == 2)
            hits += 1
            run.start(num_workers=rng.choice((0, 1, 2)))
        else:
            run.events.append({"event": "end", "exit": code})
            assert code == 0, f"exit status {code}\n" + run.log.read_text()[-2000:]
            return


def start_training(config: Path, log: Path, num_workers: int) -> subprocess.Popen[bytes]:
    """A training in a process group of its own."""
    command = [sys.executable, "-m", "opencloc", "train", str(config), "--data.num-workers", str(num_workers)]
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def write_tars(folder: Path) -> Path:
    """Tars of scenes, of which one is cut short and one holds a broken image."""
    scenes = Scenes(SceneConfig(mode="easy", image_px=64))
    with ShardWriter(str(folder), samples_per_shard=SCENES_PER_TAR) as writer:
        for number in range(TARS * SCENES_PER_TAR):
            writer.write(replace(scenes[number], key=f"{number:06d}"))
    for tar in writer.paths:  # counts as img2dataset gives them, so that the cut tar keeps its positions
        Path(tar.removesuffix(".tar") + "_stats.json").write_text(json.dumps({"successes": SCENES_PER_TAR}))
    cut, broken = Path(writer.paths[3]), Path(writer.paths[5])
    cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * 0.9)])
    offset, size = index_shard(str(broken)).spans[7, 0].tolist()
    data = bytearray(broken.read_bytes())
    data[offset : offset + size] = bytes(size)
    broken.write_bytes(data)
    return folder


def configuration(out: Path, tars: Path, *, steps: int, checkpoint_every: int) -> TrainConfig:
    """A minimal model: the soak is about the run, not the result."""
    return TrainConfig(
        out=str(out),
        model=ModelConfig(
            image_size=64,
            patch_size=16,
            vision_width=64,
            vision_layers=2,
            vision_heads=2,
            text_width=64,
            text_layers=1,
            text_heads=2,
            text_length=16,
            embed_dim=32,
            vocab_size=500,
        ),
        data=DataConfig(train=(f"shards:{tars}",), max_skipped_share=0.05),
        optim=OptimConfig(lr=1e-3, warmup_steps=10),
        steps=steps,
        batch_size=16,
        log_every=1,
        checkpoint_every=checkpoint_every,
        device="cpu",
        precision="fp32",
    )


def write(config: TrainConfig) -> Path:
    path = Path(f"{config.out}.json")
    path.write_text(to_json(config))
    return path


def steps_per_second(run: TrainConfig) -> float:
    """From the second half of a run's log, without what starting takes."""
    lines = [json.loads(line) for line in (Path(run.out) / "log.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_s"] for line in lines[len(lines) // 2 :]) / run.batch_size


def digest(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint.iterdir())}


def markdown(figures: dict[str, Any]) -> str:
    events = figures["events"]
    kinds = [event["event"] for event in events]
    same = sum(figures["sha256"]["disturbed"][name] == one for name, one in figures["sha256"]["undisturbed"].items())
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(figures["skipped"].items()))
    return f"""# Soak test

    {figures["command"]}

{figures["steps"]:,} steps, {figures["images"]:,} images, a checkpoint every {figures["checkpoint_every"]} steps.
The whole process group was killed {kinds.count("group killed")} times, a loader worker alone \
{kinds.count("worker killed")} times (the training then ended by itself with an error); \
it hung {kinds.count("hung after its worker was killed")} times.
{figures["steps_repeated"]:,} steps were done again after a kill.

Files of the last checkpoint equal to those of the undisturbed run: {same} of {len(figures["sha256"]["undisturbed"])}.

Unusable samples met and replaced: {skipped or "none"}.
"""


if __name__ == "__main__":
    sys.exit(main())

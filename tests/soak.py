"""A long run under trouble: does it lose rows, memory, threads, file handles or speed?

    python tests/soak.py --minutes 120 --dir /tmp/soak                  gravitar-ram, at full speed
    python tests/soak.py --minutes 120 --dir /tmp/soak ppo --seed 3     anything that train.py takes

A checkpoint is written every minute and a game filmed at every 25th episode, while the dashboard's server is killed and
started again every few minutes. Every ten seconds the run's processes are looked at. At the end the run is interrupted;
then its tables must hold every game and no gap. What grew from the first half to the second is printed.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from run_helpers import ROOT, rows
from visdom_helpers import Server

from gravitar_dqn.run import checkpoint

EVERY = 10.0  # seconds between two looks


@dataclass(frozen=True)
class Sample:
    """The run's process at one moment. `film` is the memory of the process that films."""

    seconds: float
    memory: float  # MiB
    film: float  # MiB
    threads: float
    files: float
    disk: float  # MiB of the run's folder


def memory_of(pid: int) -> float:
    """MiB of a process that no other shares; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def look(pid: int, began: float, run_dir: Path) -> Sample:
    """At a process and those that it started."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return Sample(
        seconds=time.monotonic() - began,
        memory=memory_of(pid),
        film=sum(map(memory_of, children)),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        disk=sum(path.stat().st_size for path in run_dir.rglob("*.*") if path.is_file()) / 2**20,
    )


def follow(
    process: subprocess.Popen[bytes], server: Server, run_dir: Path, minutes: float, kill_every: float
) -> list[Sample]:
    """Look, and kill and start the server, until the time is over; the samples."""
    began = time.monotonic()
    samples, next_kill, down = list[Sample](), 60 * kill_every, False
    while (now := time.monotonic() - began) < 60 * minutes:
        if process.poll() is not None:
            sys.exit(f"the run ended after {now:.0f} s with {process.returncode}")
        samples.append(look(process.pid, began, run_dir))
        if now >= next_kill:  # killed, and half as long later started again
            if down:
                server.start()
            else:
                server.kill()
            down, next_kill = not down, next_kill + 60 * kill_every / 2
        time.sleep(EVERY)
    return samples


def check_tables(run_dir: Path) -> None:
    """Assert that no row is missing or doubled."""
    clocks = checkpoint.load(run_dir)["agent"]["clocks"]
    games, metrics = rows(run_dir / "episodes.csv"), rows(run_dir / "metrics.csv")
    assert len(games) == clocks["episodes"], (len(games), clocks)
    ends = [game["global_step"] for game in games]
    assert ends == sorted(ends)
    assert metrics[-1]["global_step"] == clocks["global_step"]
    seconds = [row["wall_seconds"] for row in metrics]
    gaps = [later - before for before, later in pairwise(seconds)]
    assert min(gaps) > 0, "a row is doubled"
    print(f"{len(games)} games and {len(metrics)} rows of metrics, none lost; longest gap {max(gaps):.1f} s")


def compare(samples: list[Sample], run_dir: Path) -> None:
    """Print medians of the first and the second half, the start left out."""
    settled = samples[len(samples) // 10 :]
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    table = {name: [[getattr(sample, name) for sample in half] for half in halves] for name in Sample.__annotations__}
    del table["seconds"]
    speeds = [row["sps"] for row in rows(run_dir / "metrics.csv")]
    speeds = speeds[len(speeds) // 10 :]
    table["steps a second"] = [speeds[: len(speeds) // 2], speeds[len(speeds) // 2 :]]
    print(f"{'':16}{'first half':>12}{'second half':>13}{'largest':>10}")
    for name, (first, second) in table.items():
        medians = statistics.median(first), statistics.median(second)
        print(f"{name:16}{medians[0]:12.1f}{medians[1]:13.1f}{max(first + second):10.1f}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--kill-every", type=float, default=4.0, metavar="MINUTES", help="of the dashboard's server")
    parser.add_argument("--dir", type=Path, required=True, help="a new folder")
    options, words = parser.parse_known_args()
    options.dir.mkdir(parents=True)
    run_dir, server = options.dir / "run", Server(Path.home() / ".cache")
    server.start()
    train = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        *(words or ["gravitar-ram"]),
        "--run-dir",
        str(run_dir),
    ]
    train += ["--checkpoint-minutes", "1", "--video-dir", str(options.dir / "videos"), "--dashboard", server.url]
    with (options.dir / "log").open("wb") as log:
        process = subprocess.Popen(train, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not (run_dir / "checkpoints" / "latest").exists():
            time.sleep(0.1)
            assert process.poll() is None, (options.dir / "log").read_text()
        samples = follow(process, server, run_dir, options.minutes, options.kill_every)
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
        assert code == 128 + signal.SIGINT, code
    finally:
        process.kill()
        server.kill()
    check_tables(run_dir)
    compare(samples, run_dir)
    films = list((options.dir / "videos").rglob("*.mp4"))
    print(f"{len(films)} films; the log's warnings:")
    for line in (options.dir / "log").read_text().splitlines():
        if line.startswith(("warning", "error")):
            print(f"  {line}")


if __name__ == "__main__":
    main()

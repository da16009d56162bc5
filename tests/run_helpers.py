"""What the tests of whole runs share: a run so small that it takes a second, and what its files must satisfy."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gravitar_dqn.cli import commands

ROOT = Path(__file__).resolve().parent.parent
QUIET = "--device cpu --precision fp32 --dashboard off --video-every 0".split()
SMALL = "--agent.learning-starts 50 --agent.buffer-size 2000 --agent.batch-size 32".split()
CARTPOLE = ["cartpole", *SMALL, "--env.num-envs", "1", *QUIET]
RANDAL_SMALL = "--agent.num-steps 8 --rnd.init-steps 10 --tasks.replay-length 100 --tasks.num-windows 2".split()
RANDAL_CARTPOLE = ["randal-cartpole", *RANDAL_SMALL, "--env.num-envs", "1", *QUIET]
RANDAL = ["randal", *RANDAL_SMALL, "--env.num-envs", "2", "--agent.update-epochs", "1", *QUIET]
GRAVITAR = ["gravitar", *SMALL, "--agent.batch-size", "8", "--env.num-envs", "2", *QUIET]


def train(*words: object) -> int:
    """`train.py` with these arguments, in this process; its exit code."""
    return commands.run(commands.train_command, [str(word) for word in words], "train.py")


def script(
    name: str, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """A script of scripts/ in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
    )


def rows(path: Path) -> list[dict[str, float]]:
    """A CSV file's rows, all numbers."""
    with path.open(newline="") as file:
        return [
            {name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file, strict=True)
        ]


def check_episodes(run_dir: Path, sessions: list[int]) -> list[dict[str, float]]:
    """Assert that episodes.csv of a run of one environment holds every game once, and return its rows.

    `sessions` are the steps at which the run began anew: 0, and each checkpoint that a resume started from. A game
    starts where the one before it ended, or where a session began.
    """
    games = rows(run_dir / "episodes.csv")
    ends = [game["global_step"] for game in games]
    assert ends == sorted(set(ends)), "the steps at which games ended do not rise"
    before = 0.0
    for game in games:
        start = game["global_step"] - game["episodic_length"]
        assert start == before or (start in sessions and start > before), f"a game is missing before step {start}"
        before = game["global_step"]
    return games


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a command that was refused, without `error: `. What was printed before it does not count."""
    told = capsys.readouterr()
    lines = [
        line
        for line in told.err.splitlines()
        if not line.startswith(("starting ", "replay buffer: ", "pictures learn "))
    ]
    assert code == 2, told
    assert told.out == ""
    assert len(lines) == 1, told.err
    assert lines[0].startswith("error: ")
    assert all(ord(character) >= 32 for character in lines[0])
    return lines[0].removeprefix("error: ")

"""What the dashboard's tests share: a Visdom server to kill, and a synthetic run to draw."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gravitar_dqn.config import to_dict
from gravitar_dqn.dashboard import visdom_files, visdom_server
from gravitar_dqn.presets import get_preset

ROOT = Path(__file__).resolve().parent.parent
METRICS = (
    "wall_seconds,global_step,frames,num_updates,episodes,sps,return_mean,return_min,return_max,int_reward_mean,epsilon,"
    "td_loss,rnd_loss,q_mean,buffer_fill,int_reward_max,samples_per_second"
)
MEASURED = "td_loss q_mean buffer_fill learning_rate epsilon".split()  # by the preset's agent
WINDOWS = ["run", "score", "video", "loss", "q_mean", "epsilon", "speed", "buffer", "settings"]


def wait_until(true: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)


def free_port() -> int:
    """A port that is free, and the next one too; below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # not by the seed: tests run side by side
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


def environ(cache: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}


def pretend_prepared(cache: Path, source: Path | None = None) -> None:
    """Browser files in the test's own cache: those of `source`, else what Visdom ships (a server without a page)."""
    package, version = visdom_files.installed_visdom()
    target = cache / "gravitar_dqn" / f"visdom-{version}"
    shutil.copytree(source or package / "static", target, ignore=shutil.ignore_patterns("*.map"))
    (target / "version.built").write_text(version)


class Server:
    """A Visdom server in a process of its own, on a free port."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "gravitar_dqn", "dashboard", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=environ(self.cache), cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_until(lambda: visdom_server.probe(self.port) == "visdom", 30)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def post(self, endpoint: str, message: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("POST", f"/{endpoint}", json.dumps(message))
        answer = connection.getresponse().read()
        connection.close()
        try:
            return json.loads(answer)
        except ValueError:
            return answer.decode()

    def get(self, path: str) -> tuple[int, str, str]:
        """Status, address (where it leads elsewhere) and text of one of its pages."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.getheader("Location", ""), text

    def windows(self, environment: str) -> dict[str, Any]:
        """What the server holds of an environment: {window: its content}, in the page's order."""
        if environment not in self.post("env_state", {}):
            return {}
        held = self.post("win_data", {"eid": environment, "win": None})
        return dict(sorted(held.items(), key=lambda item: item[1]["i"]))

    def trace(self, environment: str, window: str, name: str) -> tuple[list[float], list[float]]:
        held = self.windows(environment).get(window)
        for trace in held["content"]["data"] if held else ():
            if trace["name"] == name:
                return trace["x"], trace["y"]
        return [], []


def metrics_row(tick: int) -> str:
    step, noise = (tick + 1) * 1000, random.Random(tick)
    score = 180 + 1500 * (1 - math.exp(-tick / 1500))
    cells = {
        "wall_seconds": 1.5 * tick,
        "global_step": step,
        "frames": 4 * step,
        "num_updates": 10 * tick,
        "episodes": tick // 2,
        "sps": 640 + noise.gauss(0, 20),
        "return_mean": score if tick > 3 else math.nan,
        "return_min": max(0, score - 400) if tick > 3 else math.nan,
        "return_max": score + 700 + noise.gauss(0, 80) if tick > 3 else math.nan,
        "int_reward_mean": math.nan,  # the preset has no curiosity
        "epsilon": max(0.01, 1 - tick / 800),
        "td_loss": 0.01 * math.exp(-tick / 2000 + noise.gauss(0, 0.3)),
        "rnd_loss": math.nan,
        "q_mean": 1.2 * (1 - math.exp(-tick / 1000)),
        "buffer_fill": min(1, tick / 1000),
        "int_reward_max": math.nan,
        "samples_per_second": 5120 + noise.gauss(0, 100),
    }
    return ",".join(str(cells[name]) for name in METRICS.split(","))


def write_run(
    run_dir: Path, ticks: int, preset: str = "gravitar", env_id: str = "ALE/Gravitar-v5", **settings: Any
) -> Path:
    """A run's folder as training leaves it after so many log ticks; a game ends every second tick."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = get_preset(preset)
    settings = {"video_dir": "<b onclick='x'>a & b</b>", **settings}
    config = replace(config, env=replace(config.env, id=env_id), **settings)
    record = {"preset": preset, "config": to_dict(config), "commit": "abc1234", "device": "cpu (two cores)"}
    record["frames_per_step"] = 4 if env_id.startswith("ALE/") else 1
    record["metrics"] = MEASURED if preset == "gravitar" else []
    (run_dir / "config.json").write_text(json.dumps(record))
    games = [f"{2000 * game},{random.Random(game).randrange(0, 40) * 50},{500}" for game in range(1, ticks // 2 + 1)]
    (run_dir / "metrics.csv").write_text("\n".join([METRICS, *map(metrics_row, range(ticks)), ""]))
    (run_dir / "episodes.csv").write_text("\n".join(["global_step,episodic_return,episodic_length", *games, ""]))
    return run_dir


def saved_at(run_dir: Path, step: int) -> None:
    """A checkpoint's name, without a checkpoint."""
    home = run_dir / "checkpoints"
    home.mkdir(exist_ok=True)
    for before in home.iterdir():
        before.unlink()
    (home / f"step_{step:012d}.pt").touch()
    (home / "latest").symlink_to(f"step_{step:012d}.pt")


def append_metrics(run_dir: Path, *ticks: int) -> None:
    with (run_dir / "metrics.csv").open("a") as file:
        file.writelines(metrics_row(tick) + "\n" for tick in ticks)

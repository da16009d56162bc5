"""The loop, and a training run around it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from line_profiler import profile

from gravitar_dqn import checkpoint
from gravitar_dqn import envs as games
from gravitar_dqn.agent import DQNAgent
from gravitar_dqn.config import Config, RANDALConfig, RunConfig, UserError, to_dict
from gravitar_dqn.dashboard import Dashboard
from gravitar_dqn.execution import choose_device, choose_execution, choose_precision, keep_freed_memory
from gravitar_dqn.randal.agent import make_randal, plan_replay
from gravitar_dqn.recording import Recorder
from gravitar_dqn.replay import plan_memory
from gravitar_dqn.tracking import Console, Episode, Observer, Sections, TrackedAgent, Tracker, tell, warn
from gravitar_dqn.visdom_files import DashboardError
from gravitar_dqn.visdom_server import find_or_start_server

Array = npt.NDArray[Any]


class Agent(TrackedAgent, Protocol):
    """What the loop, and a run around it, ask of an agent. Arrays and shapes as in `DQNAgent`."""

    device: torch.device
    learns_while_playing: bool  # it may learn while the emulator plays, one step behind

    def begin(self, obs: Array) -> None:
        """Start with the frames of freshly reset environments."""

    def act(self) -> torch.Tensor:
        """Actions for the newest frames, on the device."""

    def observe(
        self,
        actions: torch.Tensor,
        rewards: Array,
        terminations: Array,
        truncations: Array,
        next_obs: Array,
        played: Array,
    ) -> None:
        """Take in one step of every environment."""

    def update(self) -> int:
        """Learn what is due; gives the number of gradient steps.

        Called after `observe`, or, where learning overlaps the emulator's playing, after the `act` that follows it.
        """

    def state_dict(self, *, replay: bool = False) -> dict[str, Any]:
        """All that learning depends on; what was stored only where asked for."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Then call `begin`."""


# The figures are those of the README.
PICTURES_ON_A_CPU = (
    "pictures learn slowly on a CPU. RAM learns faster there: --env.obs-type ram, or the preset gravitar-ram, which "
    "plays more than twice as many steps a second and learns four times as many samples from each"
)


@profile
def play(
    envs: Any, agent: Agent, seed: int, *, overlap: bool = False, sections: Sections | None = None
) -> Iterator[list[Episode]]:
    """Play and learn for ever; yields the games that each step of the vector environment finished.

    Knows nothing of logs, checkpoints or the end. The step after a game's end is Gymnasium's NEXT_STEP reset: no
    action is played there, so it counts neither as a step nor towards a score.

    Args:
        envs: a vector environment of Gymnasium's.
        agent: who plays.
        seed: of the games.
        overlap: learn while the emulator plays, which takes environments with `send` and `recv`. What a step brings is
            then learned after the next actions were chosen instead of before.
        sections: measures where the time goes.
    """
    timed = sections if sections is not None else Sections()
    obs, _ = envs.reset(seed=seed)
    agent.begin(obs)
    number = agent.episodes
    scores = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs, dtype=np.int64)
    played = np.ones(envs.num_envs, dtype=np.bool_)
    while True:
        with timed("act"):
            actions = agent.act()
            on_host = actions.cpu().numpy()  # this is a CPU-GPU sync point
        if overlap:
            envs.send(on_host)
            with timed("learn"):
                agent.update()
        with timed("emulate"):
            obs, rewards, terminations, truncations, _ = envs.recv() if overlap else envs.step(on_host)
        with timed("store"):
            agent.observe(actions, rewards, terminations, truncations, obs, played)
        if not overlap:
            with timed("learn"):
                agent.update()

        scores += rewards * played
        lengths += played
        ended = (terminations | truncations) & played
        finished = []
        for i in np.flatnonzero(ended):
            finished.append(Episode(number, agent.global_step, float(scores[i]), int(lengths[i])))
            number += 1
        scores[ended], lengths[ended] = 0.0, 0
        played = ~ended
        with timed("tell"):
            yield finished


def can_overlap(envs: Any, agent: Agent) -> bool:
    """Whether to learn while the emulator plays. On a CPU they would only take each other's cores."""
    return agent.learns_while_playing and agent.device.type == "cuda" and hasattr(envs, "send")


class Stop:
    """Set by the first Ctrl-C or SIGTERM, so that the run can save; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Stop:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Checkpointer:
    """Saves the run every `checkpoint_minutes`. A full disk costs a warning, not the run."""

    def __init__(self, run_dir: Path, config: RunConfig, agent: Agent, tracker: Tracker, console: Console) -> None:
        self._run_dir, self._config = run_dir, config
        self._agent, self._tracker, self._console = agent, tracker, console
        self._due = time.monotonic() + 60 * config.checkpoint_minutes

    def step(self, episodes: list[Episode]) -> None:
        """Save when it is time."""
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> bool:
        """Write a checkpoint now; False, and a warning, when it could not be written."""
        state = {
            "config": to_dict(self._config),
            "agent": self._agent.state_dict(replay=self._config.checkpoint_replay),
            "tracker": self._tracker.state_dict(),
            "console": self._console.state_dict(),
        }
        try:
            checkpoint.save(self._run_dir, state, self._agent.global_step, self._config.keep_checkpoints)
        except OSError as error:
            warn(f"{error}; the one before it stays")
            return False
        finally:
            self._due = time.monotonic() + 60 * self._config.checkpoint_minutes
        return True

    def close(self) -> None:
        """The run saves by itself at its end."""


def describe_device(device: torch.device) -> str:
    """The device's name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def write_config(run_dir: Path, config: RunConfig, device: torch.device) -> None:
    """config.json: all settings, and what they ran on."""
    record = {
        "preset": config.preset,
        "config": to_dict(config),
        "versions": versions(),
        "commit": commit(),
        "device": describe_device(device),
        "precision": choose_precision(config.precision, device),
        "execution": choose_execution(config.execution, device),
    }
    aside = run_dir / "config.tmp"
    aside.write_text(json.dumps(record, indent=2) + "\n")
    aside.replace(run_dir / "config.json")


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for package in "torch numpy gymnasium ale-py visdom stable-baselines3".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """This source tree's commit, "-dirty" where it was changed; nothing where it is installed without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return ""


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder; UserError while another process does. The lock ends with its process: never stale."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("w")
    except OSError as error:
        raise UserError(f"the run's folder {run_dir} cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run_dir} is in use: another process trains in it; stop that first") from None
        try:
            yield
        finally:
            (run_dir / "lock").unlink(missing_ok=True)


def build(config: RunConfig) -> tuple[Any, Agent]:
    """The environments and a new agent for them, seeded. Tells what takes time, and the replay buffer's size."""
    device = choose_device(config.device)
    check_execution(config, device)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    games.find_game(config.env)
    tell(f"starting {config.env.num_envs} games of {config.env.id}")  # many take some seconds
    envs = games.make_envs(config.env)
    spec = games.spec_of(envs)
    if device.type == "cpu" and spec.is_picture and config.env.id.startswith("ALE/"):
        tell(PICTURES_ON_A_CPU)
    if isinstance(config, RANDALConfig):
        tell(plan_replay(config, spec, device))
        return envs, make_randal(config, spec)
    assert isinstance(config, Config)
    tell(plan_memory(config.agent.buffer_size, spec.frame_shape, spec.frame_dtype, device))
    return envs, DQNAgent(config, spec, device)


def check_execution(config: RunConfig, device: torch.device) -> None:
    """Raise UserError for a way to run that the device does not have."""
    if config.execution == "graphs" and device.type != "cuda":
        raise UserError(f"--execution graphs needs a CUDA device, not {device}: --execution auto or eager works")


def train(config: RunConfig, run_dir: Path, *, resume: bool = False, show_sections: bool = False) -> None:
    """Train until `total_steps`, `total_episodes`, `total_minutes` or Ctrl-C, and save.

    `resume` goes on from the newest checkpoint. `show_sections` prints at the end where the time went.
    """
    check_dashboard(config.dashboard, run_dir)
    state = checkpoint.load(run_dir) if resume else {}
    envs, agent = build(config)
    if resume:
        restore(agent, state.pop("agent", {}), run_dir)  # popped: a replay buffer in it is not kept twice
        if finished(config, agent, state["tracker"]["wall_seconds"]):
            raise UserError(
                f"{run_dir} is complete ({agent.global_step} steps, {agent.episodes} games): "
                "a higher --total-steps, --total-episodes or --total-minutes goes on"
            )
    run(config, run_dir, envs, agent, state, show_sections=show_sections)


def run(
    config: RunConfig,
    run_dir: Path,
    envs: Any,
    agent: Agent,
    state: dict[str, Any],
    *,
    show_sections: bool = False,
    further: Sequence[Observer] = (),
    how_to_resume: str = "",
) -> None:
    """Train an agent in environments, as `train` says, and close them.

    Args:
        config: the run's settings; a resume needs nothing else.
        run_dir: the run's folder.
        envs: a vector environment.
        agent: who plays.
        state: the checkpoint that it was restored from; empty for a new run.
        show_sections: print at the end where the time went.
        further: observers beside the usual ones.
        how_to_resume: what goes on with the run; by default the command that started it, with --resume.
    """
    farewell: list[str] = []
    with lock(run_dir), Stop() as stop, contextlib.ExitStack() as closing:
        closing.callback(lambda: tell("\n".join(farewell)) if farewell else None)  # below the progress line
        closing.callback(envs.close)
        try:
            write_config(run_dir, config, agent.device)
            tracker = Tracker(run_dir, config, agent, state.get("tracker"))
        except OSError as error:
            raise UserError(f"the run's folder {run_dir} cannot be written: {error.strerror or error}") from None
        tell(f"{'going on with' if state else 'run folder:'} {run_dir}, on {describe_device(agent.device)}")
        video_dir = Path(config.video_dir) / run_dir.name
        if (dashboard := open_dashboard(config.dashboard, run_dir, video_dir)) is not None:
            closing.callback(dashboard.close)
        console = Console(agent, state.get("console"))
        checkpointer = Checkpointer(run_dir, config, agent, tracker, console)
        recorder = Recorder(config, video_dir, agent, console)
        observers: list[Observer] = [console, tracker, recorder, checkpointer, *further]
        for observer in observers:
            closing.callback(observer.close)
        if not state:
            checkpointer.save()  # from now on a kill leaves something whole to resume from
        sections = Sections(torch.cuda.synchronize if show_sections and agent.device.type == "cuda" else None)
        first_step = agent.global_step
        overlap = can_overlap(envs, agent)
        for episodes in play(envs, agent, config.seed + agent.global_step, overlap=overlap, sections=sections):
            for observer in observers:
                observer.step(episodes)
            if stop.requested or finished(config, agent, tracker.wall_seconds):
                break
        if not checkpointer.save():
            raise UserError(
                f"step {agent.global_step} could not be saved: {run_dir} goes on from the checkpoint before it"
            )
        if show_sections:
            farewell.append(sections.table(agent.global_step - first_step))
        if finished(config, agent, tracker.wall_seconds):
            farewell.append(f"done: {agent.global_step} steps, {agent.episodes} games, saved in {run_dir}")
        else:
            how = how_to_resume or resume_command(run_dir)
            farewell.append(f"stopped at step {agent.global_step}, saved; go on with: {how}")


def restore(agent: Agent, state: dict[str, Any], run_dir: Path) -> None:
    """Put a checkpoint's state into a new agent; UserError when it does not fit."""
    try:
        agent.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint in {run_dir} does not fit this configuration: {reason}") from None


def resume_command(run_dir: Path) -> str:
    """What to type to go on with a run, as this one was started: by the script or by the installed command."""
    program = Path(sys.argv[0])
    command = [sys.executable, str(program)] if program.suffix == ".py" else [str(program), "train"]
    if program.name == "__main__.py":  # python -m gravitar_dqn
        command = [sys.executable, "-m", "gravitar_dqn", "train"]
    first = Path(command[0])
    if first.is_relative_to(Path.cwd()):
        command[0] = str(first.relative_to(Path.cwd()))
    return shlex.join([*command, "--resume", str(run_dir)])


def finished(config: RunConfig, agent: TrackedAgent, wall_seconds: float) -> bool:
    """Whether the run has reached its end, after `wall_seconds` of training."""
    return (
        agent.global_step >= config.total_steps
        or 0 < config.total_episodes <= agent.episodes
        or 0 < 60 * config.total_minutes <= wall_seconds
    )


def check_dashboard(choice: str, run_dir: Path) -> None:
    """Raise UserError for a server's address that is none, before anything is made."""
    if choice not in ("auto", "off"):
        try:
            Dashboard(run_dir, choice)
        except DashboardError as error:
            raise UserError(f"--dashboard: {error}") from None


def open_dashboard(choice: str, run_dir: Path, video_dir: Path) -> Dashboard | None:
    """The dashboard of a run, on a server of its choice; None, and a warning, when there can be none."""
    if choice == "off":
        return None
    server = find_or_start_server() if choice == "auto" else choice
    if server is None:
        return None
    dashboard = Dashboard(run_dir, server, video_dir=video_dir)
    dashboard.start()
    tell(f"dashboard: {dashboard.url}")
    return dashboard

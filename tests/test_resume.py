"""Runs that are stopped, killed or repeated: nothing is lost or doubled, and a seed plays the same games twice."""

import copy
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import numpy.typing as npt
import ppo_helpers
import probes
import pytest
import torch
from faults import injected
from replay_helpers import check_valid
from run_helpers import CARTPOLE, GRAVITAR, RANDAL, RANDAL_CARTPOLE, check_episodes, refusal, rows, script, train
from tqdm import tqdm

from gravitar_dqn import training
from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.agents.ppo import PPOAgent
from gravitar_dqn.cli import commands
from gravitar_dqn.config import EnvSettings, PPORNDSettings, RNDSettings, RunConfig
from gravitar_dqn.envs import spec_of
from gravitar_dqn.loop import play
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.folder import load_run, lock

FOR_EVER = ["--total-steps", 10**9]


def wait_until(true: Any, process: Any, seconds: float = 60.0) -> None:
    """Until `true()`; an error when the process ended before."""
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, f"it ended: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.001)


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which must be whole."""
    step = checkpoint.read(checkpoint.folder(run_dir) / "latest")["agent"]["clocks"]["global_step"]
    assert isinstance(step, int)
    return step


# ---------------------------------------------------------------- stopped


@pytest.mark.faults
def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path: Path) -> None:
    injected("SIGINT during training")
    run_dir = tmp_path / "run"
    process = script("train.py", *CARTPOLE, *FOR_EVER, "--log-seconds", 0.1, "--run-dir", run_dir)
    episodes = run_dir / "episodes.csv"
    wait_until(lambda: episodes.exists() and len(rows(episodes)) > 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, "a run that has ended returns 0"
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    told = re.fullmatch(rf"stopped at step (\d+), saved; go on with: (\S+ )?\S*train.py --resume {run_dir}", last)
    assert told, last
    step = int(told[1])
    assert saved_step(run_dir) == step
    before = check_episodes(run_dir, [0])
    assert before[-1]["global_step"] <= step
    assert len(re.findall(r"^episode: ", out, re.MULTILINE)) == (len(before) - 1) // 5 + 1

    process = script("train.py", "--resume", run_dir, "--total-steps", step + 300)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"going on with {run_dir}" in err
    assert saved_step(run_dir) == step + 300
    after = check_episodes(run_dir, [0, step])
    assert after[: len(before)] == before
    assert len(after) > len(before)
    numbers = [int(number) for number in re.findall(r"^episode: (\d+),", out, re.MULTILINE)]
    assert numbers == [number for number in range(len(before), len(after)) if number % 5 == 0]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal when its training run has played `step` steps."""
    check = training.Checkpointer.step

    def step_and_signal(self: Any, episodes: Any) -> None:
        check(self, episodes)
        if self._agent.global_step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training.Checkpointer, "step", step_and_signal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stop_at(monkeypatch, 150, number)
    assert train(*CARTPOLE, *FOR_EVER, "--run-dir", tmp_path / "run") == 128 + number
    assert "stopped at step 150, saved; go on with: " in capsys.readouterr().err
    assert saved_step(tmp_path / "run") == 150
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def assert_same(first: Any, second: Any) -> None:
    """Nested states are equal to the bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert list(first) == list(second)
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The agents of the training runs of this test, as they are built."""
    built, build = list[Any](), training.build

    def remember(config: Any) -> Any:
        envs, agent = build(config)
        built.append(agent)
        return envs, agent

    monkeypatch.setattr(training, "build", remember)
    return built


def test_a_resume_goes_on_with_everything_that_learning_depends_on(tmp_path: Path, agents: list[Any]) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--rnd.coef", 0.1, "--total-steps", 200, "--run-dir", run_dir) == 0
    (trained,) = agents
    assert trained.global_step == 200 and trained.num_updates > 0
    state = checkpoint.load(run_dir)["agent"]
    envs, resumed = training.build(load_run(run_dir))
    envs.close()
    resumed.load_state_dict(state)
    for agent in (trained, resumed):
        assert_same(dict(agent.state_dict()), state)
        assert torch.equal(agent.generator.get_state(), state["generator"])
        clocks = {"global_step": agent.global_step, "episodes": agent.episodes, "num_updates": agent.num_updates}
        assert clocks == state["clocks"]
    for name in ("q_network", "target_network", "rnd"):
        assert_same(dict(getattr(trained, name).state_dict()), dict(getattr(resumed, name).state_dict()))
    assert trained.epsilon == resumed.epsilon < 1


def test_a_resume_plays_other_games_than_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, play = list[int](), training.play
    monkeypatch.setattr(
        training, "play", lambda envs, agent, seed, **how: (seeds.append(seed), play(envs, agent, seed, **how))[1]
    )
    assert train(*CARTPOLE, "--seed", 5, "--total-steps", 100, "--run-dir", tmp_path / "run") == 0
    assert train("--resume", tmp_path / "run", "--total-steps", 150) == 0
    assert train("--resume", tmp_path / "run", "--total-steps", 200) == 0
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_a_run_of_the_version_before_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    path = (checkpoint.folder(run_dir) / "latest").resolve()
    state = checkpoint.read(path)
    for old in (state, {**state, "agent": {k: v for k, v in state["agent"].items() if k != "optimizer"}}):
        torch.save({**old, "format": 2}, tmp_path / "old.pt")
        (tmp_path / "old.pt").replace(path)
        if old is state:
            assert (
                commands.run(commands.evaluate_command, [str(run_dir), "--episodes", "2", "--device", "cpu"], "x.py")
                == 0
            )
            assert train("--resume", run_dir, "--total-steps", 101) == 0
            path = (checkpoint.folder(run_dir) / "latest").resolve()
    capsys.readouterr()
    told = refusal(capsys, train("--resume", run_dir, "--total-steps", 200))
    said = "does not fit this version (it has no 'optimizer'): the commit in config.json wrote it"
    assert told == f"the checkpoint in {run_dir} {said}"


# ---------------------------------------------------------------- --resume auto


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [[], ["run"], ["run", "run/lock", "run/config.tmp"]])
def test_auto_begins_resumes_and_ends_well(
    there: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    for name in there:
        (tmp_path / name).touch() if "/" in name else (tmp_path / name).mkdir()
    words = [*CARTPOLE, "--agent.gamma", 0.9, "--run-dir", run_dir, "--resume", "auto", "--total-steps", 300]
    with monkeypatch.context() as interrupted:
        stop_at(interrupted, 150, signal.SIGTERM)
        assert train(*words) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert f"run folder: {run_dir}" in said and f"--resume {run_dir}" in said.splitlines()[-1]
    assert train(*words, "--env.num-threads", 2) == 0, "free, as is the limit of steps"
    assert f"going on with {run_dir}" in capsys.readouterr().err
    games = check_episodes(run_dir, [0, 150])

    before = files(run_dir)
    assert train(*words) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{run_dir} is complete (300 steps, {len(games)} games): ")
    words[words.index(0.9)] = 0.8
    said = refusal(capsys, train(*words, "--total-steps", 400))
    assert said == f"{run_dir} was started with other settings, it cannot go on: agent.gamma: 0.9 -> 0.8"
    said = refusal(capsys, train("--run-dir", run_dir, "--resume=auto", "--dashboard", "off"))
    assert "it cannot go on: preset: cartpole -> gravitar; " in said, "settings are those of the command line alone"
    assert files(run_dir) == before


def test_auto_needs_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", "auto") == 0
    capsys.readouterr()
    for words in (["--resume", "auto"], ["--resume=auto"]):
        said = refusal(capsys, train(*CARTPOLE, *words))
        assert said == "--resume auto needs the run's folder: --run-dir DIR --resume auto begins or resumes it"
    assert train("--resume", "./auto", "--total-steps", 120) == 0, "a folder of that name"
    assert [*tmp_path.iterdir()] == [tmp_path / "auto"]


def test_auto_begins_again_after_a_kill_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    words = [*CARTPOLE, "--eval-every", 10**9, "--run-dir", run_dir, "--resume", "auto", "--total-steps", 60]
    left = dict[str, bytes]()

    def kill(*state: Any) -> None:
        checkpoint.folder(run_dir).mkdir()
        (checkpoint.folder(run_dir) / "step_000000000000.tmp").touch()
        left.update(files(run_dir))
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(training.checkpoint, "save", kill)
        assert train(*words) == 130
    assert "evaluations.csv" in left, "all that a run begins with"
    for name, content in left.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(content)
    assert train(*words, "--agent.gamma", 0.9) == 0, "it is another run"
    assert saved_step(run_dir) == 60
    check_episodes(run_dir, [0])


CONFIG = json.dumps({"preset": "cartpole", "config": {"preset": "cartpole"}})


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["notes.txt"], "is not a run's folder: it has no config.json"),
        (["checkpoints/model.pt"], "is not a run's folder: it has no config.json"),
        (["config.json", "model.pt"], "config.json is not a run's configuration"),
        (["run's config.json", "lock", "eval.json"], "has lost its checkpoints: copy them back, or another folder"),
        (["run's config.json", "lock", "checkpoints/best_7.pt"], "has lost its checkpoints: copy them back, or"),
        (["run's config.json", "lock", "rows of episodes.csv"], "has lost its checkpoints: copy them back, or"),
        (["run's config.json", "lock", "rows of evaluations.csv"], "has lost its checkpoints: copy them back, or"),
    ],
)
def test_auto_removes_nothing_of_worth(
    names: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    for name in names:
        path = run_dir / name.removeprefix("run's ").removeprefix("rows of ")
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = {"run's": CONFIG, "rows": "global_step\n7\n", "lock": ""}
        path.write_text(contents.get(name.partition(" ")[0], "{}"))
    before = files(run_dir)
    assert complaint in refusal(capsys, train(*CARTPOLE, "--run-dir", run_dir, "--resume", "auto"))
    assert files(run_dir) == before


def test_a_resumed_run_saves_a_whole_period_after_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it had trained before: with its replay buffer a checkpoint can be gigabytes."""
    tracker: Any = SimpleNamespace(wall_seconds=595.0)
    checkpointer = training.Checkpointer(tmp_path, RunConfig(checkpoint_minutes=10), MagicMock(), tracker, MagicMock())
    saved: list[float] = []
    monkeypatch.setattr(checkpointer, "save", lambda: saved.append(tracker.wall_seconds))
    for seconds in (596.0, 601.0, 1194.0, 1196.0, 1197.0, 1794.0, 1796.0):
        tracker.wall_seconds = seconds
        checkpointer.step([])
    assert saved == [1196.0, 1796.0]


# ---------------------------------------------------------------- the replay buffer in the checkpoint


def test_a_run_from_before_a_setting_was_there_is_played_but_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", run_dir) == 0
    record = json.loads((run_dir / "config.json").read_text())
    del record["config"]["keep_checkpoints"]  # free: it takes its default
    (run_dir / "config.json").write_text(json.dumps(record))
    assert train("--resume", run_dir, "--total-steps", 90) == 0
    del record["config"]["agent"]["n_step"]
    (run_dir / "config.json").write_text(json.dumps(record))
    capsys.readouterr()
    for words in (["--resume", run_dir], [*CARTPOLE, "--run-dir", run_dir, "--resume", "auto"]):
        said = refusal(capsys, train(*words, "--total-steps", 120))
        assert said == f"{run_dir} was started by a version without agent.n_step: it can be played, but not go on"
    assert (
        commands.run(commands.evaluate_command, [str(run_dir), "--episodes", "1", "--device", "cpu"], "evaluate.py")
        == 0
    )


def test_a_resumed_buffer_holds_what_was_stored(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 200, "--checkpoint-replay", "--run-dir", run_dir) == 0
    stored = checkpoint.load(run_dir)["agent"]["replay"]
    envs, agent = training.build(load_run(run_dir))
    agent.load_state_dict(checkpoint.load(run_dir)["agent"])
    assert len(agent.replay) == 200
    for name, value in agent.replay.state_dict().items():
        assert torch.equal(value, stored[name]) if isinstance(value, torch.Tensor) else value == stored[name], name
    rewards = agent.replay.rewards[agent.replay.valid]
    assert len(rewards) == 200 and (rewards == 1).all()  # every step of CartPole earns 1
    agent.begin(envs.reset(seed=0)[0])
    envs.close()
    check_valid(agent.replay)
    assert len(agent.replay) == 200


@pytest.mark.parametrize(("option", "expected"), [("--checkpoint-replay", True), ("--no-checkpoint-replay", False)])
def test_learning_goes_on_at_once_only_with_the_buffer(tmp_path: Path, option: str, expected: bool) -> None:
    """Without it, 50 transitions must be played before learning begins anew."""
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, option, "--total-steps", 200, "--run-dir", run_dir) == 0
    before = checkpoint.load(run_dir)["agent"]["clocks"]
    assert train("--resume", run_dir, "--total-steps", 240) == 0
    after = checkpoint.load(run_dir)["agent"]["clocks"]
    assert after["global_step"] == before["global_step"] + 40
    assert (after["num_updates"] > before["num_updates"]) == expected
    check_episodes(run_dir, [0, 200])


# ---------------------------------------------------------------- repeated


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (CARTPOLE, 600),
        ([*GRAVITAR, "--env.max-frames", "1200"], 640),
        (RANDAL_CARTPOLE, 300),
        pytest.param([*RANDAL, "--env.max-frames", "240"], 130, marks=pytest.mark.slow),
    ],
    ids=["cartpole", "gravitar", "randal-cartpole", "randal"],
)
def test_the_same_seed_is_the_same_run_to_the_bit(tmp_path: Path, words: list[str], steps: int) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run_dir in runs:
        assert train(*words, "--total-steps", steps, "--run-dir", run_dir) == 0
    first, second = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == second
    assert first.count(b"\n") > 1, "no game was finished"
    a, b = (checkpoint.load(run_dir)["agent"] for run_dir in runs)
    assert a["clocks"] == b["clocks"] and a["clocks"]["num_updates"] > 10, "nothing was learned"
    assert torch.equal(a["generator"], b["generator"])
    (weights, others) = (state["policy"] for state in (a, b))
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


class Clockwork(probes.Probe):
    """Games of three steps that are all the same, so that a new one is no other game than the one that is left."""

    length = 3

    def see(self) -> npt.NDArray[Any]:
        return np.array([self.time / 3], dtype=np.float32)

    def reward(self, action: int) -> float:
        return float(action) if self.time else -1.0


GAME = Clockwork.length + 1  # steps with the dummy one at its end
INTERRUPTED = {
    "dqn": (
        DQNAgent,
        replace(
            PRESETS["cartpole"],
            env=EnvSettings(num_envs=4),
            agent=replace(
                PRESETS["cartpole"].agent, learning_starts=20, batch_size=16, train_frequency=4, n_step=2,
                priority_exponent=0.5, epsilon_decay=300, target_network_frequency=20,
            ),
            rnd=RNDSettings(coef=0.1, init_updates=2),
            device="cpu",
        ),
    ),
    "randal": (
        PPOAgent,
        replace(ppo_helpers.settings(ppo_helpers.VECTOR_TASKS, num_envs=4), rnd=PPORNDSettings(init_steps=GAME)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), INTERRUPTED.values(), ids=INTERRUPTED)
@pytest.mark.faults
def test_an_interrupted_run_is_the_uninterrupted_one_to_the_bit(kind: Any, config: Any) -> None:
    """Where games are alike, the replay is kept, and neither a game nor a rollout is under way."""
    injected("an interruption, bit for bit")

    def build() -> tuple[Any, Any]:
        envs = probes.vector_of(Clockwork, 4)
        return envs, kind(config, spec_of(envs), torch.device("cpu"))

    def go_on(envs: Any, agent: Any, games: int) -> None:
        for _ in islice(play(envs, agent, agent.global_step), GAME * games):
            pass

    torch.manual_seed(0)
    envs, agent = build()
    first = copy.deepcopy(agent.state_dict())
    before, after = 21, 20  # of them 1 is random at RANDAL's start, and 4 fill its first window; a rollout is 4
    go_on(envs, agent, before)
    assert getattr(agent, "_step", 0) == 0 and agent.num_updates > 10
    resumed_envs, resumed = build()
    resumed.load_state_dict(copy.deepcopy(agent.state_dict(replay=True)))
    go_on(resumed_envs, resumed, after)

    envs, agent = build()
    agent.load_state_dict(first)
    go_on(envs, agent, before + after)
    states = resumed.state_dict(), agent.state_dict()
    for state in states:
        state.pop("fill", None)  # a resume takes a row more of the replay buffer, for the games' new beginning
    assert_same(*states)


def test_randal_resumes_evaluates_and_keeps_its_columns(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(*RANDAL_CARTPOLE, "--total-steps", 200, "--run-dir", run_dir) == 0
    before = checkpoint.load(run_dir)["agent"]
    assert before["clocks"]["num_updates"] > 100 and before["random_left"] == 0
    assert train("--resume", run_dir, "--total-steps", 400) == 0
    after = checkpoint.load(run_dir)["agent"]
    assert (after["clocks"]["global_step"], after["random_left"]) == (400, 0)
    assert after["clocks"]["num_updates"] > before["clocks"]["num_updates"]
    check_episodes(run_dir, [0, 200])
    told = rows(run_dir / "metrics.csv")
    assert set(told[-1]) >= {"policy_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance_int"}
    assert told[-1]["global_step"] == 400
    assert (
        commands.run(commands.evaluate_command, [str(run_dir), "--episodes", "3", "--device", "cpu"], "evaluate.py")
        == 0
    )
    assert (run_dir / "eval.json").exists()


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        assert train(*CARTPOLE, "--seed", seed, "--total-steps", 200, "--run-dir", tmp_path / str(seed)) == 0
    assert (tmp_path / "1" / "episodes.csv").read_bytes() != (tmp_path / "2" / "episodes.csv").read_bytes()


# ---------------------------------------------------------------- killed


def _train_alone(words: list[object]) -> None:
    """In a process of its own, whose output nobody reads."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    tqdm.set_lock(threading.RLock())  # its own one is a semaphore that outlives a kill
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    raise SystemExit(train(*words))


class Killable:
    """A training run that can be killed. Forked from a server that has torch loaded, so that 20 of them are cheap."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gravitar_dqn.training", "test_resume"])

    def __init__(self, words: list[object]) -> None:
        self.process = self.context.Process(target=_train_alone, args=(words,))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def communicate(self) -> str:
        return f"exit code {self.process.exitcode}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL


def kill_and_resume(run_dir: Path, times: int, seed: int) -> None:
    """Kill a run that saves as often as it can, at random moments, and resume it each time."""
    often = ["--checkpoint-minutes", 0.0005, "--log-seconds", 0.02, *FOR_EVER]
    rng, sessions, kept = random.Random(seed), [0], list[dict[str, float]]()
    words: list[object] = [*CARTPOLE, "--checkpoint-replay", "--run-dir", run_dir, *often]
    home = checkpoint.folder(run_dir)
    latest = home / "latest"
    torn = 0
    for i in range(times):
        before = latest.readlink() if latest.is_symlink() else Path("step_000000000000.pt")  # written at the start
        run = Killable(words)
        wait_until(lambda before=before: latest.is_symlink() and latest.readlink() != before, run)
        time.sleep(rng.uniform(0, 0.4))
        if i % 2:  # every other kill hits a save
            wait_until(lambda: list(home.glob("*.tmp")), run)
        run.kill()
        torn += bool(list(home.glob("*.tmp")))
        injected("kill -9 during a save" if list(home.glob("*.tmp")) else "kill -9 during training")

        sessions.append(saved_step(run_dir))
        words = ["--resume", run_dir, *often]
        assert sessions[-1] > sessions[-2]
        games = rows(run_dir / "episodes.csv")
        assert games[: len(kept)] == kept, "rows of games before the last checkpoint were lost"
        kept = [game for game in games if game["global_step"] <= sessions[-1]]
    assert train("--resume", run_dir, "--total-steps", sessions[-1] + 50) == 0
    assert saved_step(run_dir) == sessions[-1] + 50
    games = check_episodes(run_dir, sessions)
    assert games[: len(kept)] == kept
    steps = [row["global_step"] for row in rows(run_dir / "metrics.csv")]
    assert steps == sorted(steps)
    episodes = checkpoint.load(run_dir)["agent"]["clocks"]["episodes"]
    assert len(games) == episodes
    print(f"{times} kills, {torn} in the middle of a save, {sessions[-1]} steps, {len(games)} games")


@pytest.mark.faults
def test_a_killed_run_resumes_from_a_whole_checkpoint(tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "run", times=3, seed=3)


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_killed_twenty_times_resumes_every_time(tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "run", times=20, seed=20)


# ---------------------------------------------------------------- two at once


@pytest.mark.faults
def test_a_run_that_is_going_cannot_be_resumed_beside_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    injected("two runs in one folder")
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    before = (run_dir / "metrics.csv").read_bytes()
    with lock(run_dir):
        assert train("--resume", run_dir, "--total-steps", 200) == 2
    assert f"error: {run_dir} is in use" in capsys.readouterr().err
    assert (run_dir / "metrics.csv").read_bytes() == before
    assert train("--resume", run_dir, "--total-steps", 200) == 0

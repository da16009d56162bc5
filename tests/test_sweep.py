"""Sweeps: what they run, in which order, on which cores; how they go on; and what is refused before anything starts."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import refusal, rows, script

from gravitar_dqn.cli import commands
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import get_preset
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.folder import lock, write_config
from gravitar_dqn.runtime import processes as process_module
from gravitar_dqn.tools import sweep

TINY = "agent.learning-starts=50 agent.buffer-size=2000 agent.batch-size=32 device=cpu precision=fp32"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps are made where the command runs."""
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> int:
    """`sweep.py` with these arguments, in this process; its exit code."""
    return commands.run(commands.sweep_command, [str(word) for word in words], "sweep.py")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def jobs(*words: str) -> list[sweep.Job]:
    options = commands.parse(sweep.SweepConfig, words, "sweep.py", "")
    return sweep.plan(options, 3, lambda arguments: commands.parse_train(arguments, "train.py")[0].config)


class Processes:
    """Stands in for the processes of a sweep: writes what they would write, at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.bound: dict[str, list[int]] = {}  # cores, by the run's folder
        self.devices: dict[str, str | None] = {}  # the GPUs that a run finds, by its folder
        self.fails: Callable[[list[str]], str] = lambda words: ""  # the last line of one that fails
        self._cores = threading.local()
        monkeypatch.setattr(sweep, "bind", lambda cores: setattr(self._cores, "set", list(cores)))
        monkeypatch.setattr(sweep.Sweep, "_process", lambda _, *words: self.process(*words))

    def process(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> bool:
        words = list(words)
        self.commands.append(words)
        run_dir = Path(words[words.index("--run-dir") + 1] if "--run-dir" in words else words[1])
        self.bound[run_dir.name] = self._cores.set
        self.devices[run_dir.name] = env.get("CUDA_VISIBLE_DEVICES")
        assert env["OMP_NUM_THREADS"] == str(len(self._cores.set))
        if line := self.fails(words):
            log.write_text(f"{line}\n")
            return False
        if words[0] == "train":
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            (run_dir / "checkpoints" / "latest").touch()
            (run_dir / "metrics.csv").write_text("wall_seconds,global_step,frames\n30,1000,4000\n60,2000,8000\n")
            games = [f"{step},{step},9\n" for step in range(1, 151)]
            (run_dir / "episodes.csv").write_text("".join(["global_step,episodic_return,episodic_length\n", *games]))
            log.write_text("done: 2000 steps, 150 games, saved\n")
        else:
            mean = float(run_dir.name.rpartition("__")[2])
            result = {"mean": mean, "std": 1.0, "median": 2.0, "iqm": 3.0, "iqm_ci95": [2.5, 3.5]}
            (run_dir / "eval.json").write_text(json.dumps(result))
        return True


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


# ---------------------------------------------------------------- the plan


def test_a_sweep_runs_every_preset_and_variant_with_every_seed() -> None:
    variants = ["agent.n-step=1", "agent.gamma=0.9 agent.double-q=False"]
    found = jobs("cartpole", "gravitar", "--seeds", "1", "5", "--variants", *variants, "--settings", "env.num-envs=2")
    keys = [job.key for job in found]
    assert keys[:3] == [("cartpole", name, "1") for name in ("base", *variants)]
    assert keys[3:6] == [("gravitar", name, "1") for name in ("base", *variants)]
    assert [key[:2] for key in keys[6:]] == [key[:2] for key in keys[:6]] and {key[2] for key in keys[6:]} == {"5"}
    config: Any = found[2].config
    assert (config.agent.gamma, config.agent.double_q, config.agent.n_step) == (0.9, False, 3)
    for config in (job.config for job in found):
        assert (config.env.num_envs, config.env.num_threads, config.total_minutes) == (2, 3, 15)
        assert (config.dashboard, config.video_every, config.keep_checkpoints) == ("off", 0, 2)
    assert [job.config.seed for job in found] == [1] * 6 + [5] * 6
    for job in found:
        assert commands.parse_train(job.arguments, "train.py")[0].config == job.config
    assert found[2].run_dir == Path("runs/sweeps/cartpole_gravitar/cartpole__agent.gamma=0.9_agent.double-q=False__1")
    assert len({job.run_dir for job in found}) == len(found)


def test_what_is_said_twice_runs_once_and_a_variant_beats_the_settings() -> None:
    words = ["cartpole", "cartpole", "--seeds", "3", "3", "--no-base", "--settings", "agent.n-step=5"]
    found = jobs(*words, "--variants", "agent.n-step=1", "agent.n_step=1")
    assert [job.key for job in found] == [("cartpole", "agent.n-step=1", "3")]
    config: Any = found[0].config
    assert config.agent.n_step == 1


def test_a_folders_name_is_readable_and_nobody_elses() -> None:
    assert sweep.shortened("gravitar__agent.n-step=1 rnd.coef=0.5__2") == "gravitar__agent.n-step=1_rnd.coef=0.5__2"
    odd = [sweep.shortened(f"gravitar__env.id=ALE{mark}Pong-v5__1") for mark in "/\\:*"]
    long = [sweep.shortened(f"gravitar__{'x' * 300}__{seed}") for seed in (1, 2)]
    assert len({*odd, *long}) == 6
    assert all(len(name) < 130 and not set(name) & set("/\\:* ") for name in odd + long)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no preset: name one or more first, sweep gravitar ..."),
        (["gravtar"], "unknown preset 'gravtar': did you mean gravitar?"),
        (["cartpole", "--seeds"], "--seeds names no seed"),
        (["cartpole", "--seeds", "-1"], "seed is -1: it must be finite and between 0 and 1073741824"),
        (["cartpole", "--no-base"], "--no-base without --variants leaves nothing to run"),
        (["cartpole", "--variants", ""], "--variants has an empty text"),
        (["cartpole", "--minutes", "0"], "--minutes is 0.0: it must be finite and between 0.001 and"),
        (["cartpole", "--parallel", "0"], "--parallel is 0: it must be finite and between 1 and"),
        (["cartpole", "--parallel", "999"], "--parallel is 999, but [0-9]+ cores are available"),
        (["cartpole", "--seed", "1"], "unknown option '--seed': did you mean --seeds?"),
        (["cartpole", "--variants", "agent.gamma"], "--variants 'agent.gamma': 'agent.gamma' is not of the form"),
        (["cartpole", "--variants", "x='"], '--variants "x=\'" cannot be read: No closing quotation'),
        (
            ["cartpole", "--settings", "seed=3"],
            "--settings 'seed=3': seed is not for a sweep to change, --seeds sets it",
        ),
        (
            ["cartpole", "--variants", "agent.gama=0.9"],
            "cartpole agent.gama=0.9: unknown option '--agent.gama=0.9': did you mean --agent.gamma?",
        ),
        (["cartpole", "--variants", "agent.gamma=x"], "cartpole agent.gamma=x: Error parsing --agent.gamma: .*'x'"),
        (["cartpole", "--variants", "agent.gamma=2"], "cartpole agent.gamma=2: agent.gamma is 2.0: it must be finite"),
        (["cartpole", "--settings", "agent.double-q=maybe"], "cartpole base: .*maybe"),
        (["cartpole", "randal-cartpole", "--variants", "agent.n-step=1"], "randal-cartpole agent.n-step=1: .*n-step"),
        (["cartpole", "--variants", "env.id=ALE/Gravitr-v5"], "cartpole env.id=ALE/Gravitr-v5: unknown game"),
        (["cartpole", "--settings", "device=tpu"], "cartpole base: unknown device 'tpu'"),
        (["cartpole", "--dir", "/dev/null/x"], "the run's folder /dev/null/x cannot be written"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: Processes
) -> None:
    said = refusal(capsys, run(*words))
    pattern = re.escape(expected).replace(r"\.\*", ".*").replace(r"\[0\-9\]\+", "[0-9]+")
    assert re.match(pattern, said), said
    assert processes.commands == [] and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the runs


def test_every_run_is_trained_and_evaluated_and_gets_a_row(
    processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cartpole", "--seeds", 4, 8, "--variants", "agent.n-step=1", "--dir", "s", "--episodes", 7]
    assert run(*words, "--settings", "device=cpu") == 0
    found = table(Path("s/sweep.csv"))
    assert [(row["variant"], row["seed"]) for row in found] == [
        (name, seed) for seed in "48" for name in ("base", "agent.n-step=1")
    ]
    assert found[0] == {
        "preset": "cartpole",
        "variant": "base",
        "seed": "4",
        "global_step": "2000",
        "frames": "8000",
        "minutes": "1.0",
        "sps": "33.3",
        "train_mean": "100.5",
        "mean": "4.0",
        "std": "1.0",
        "median": "2.0",
        "iqm": "3.0",
        "iqm_low": "2.5",
        "iqm_high": "3.5",
        "run_dir": "cartpole__base__4",
    }
    trained, evaluated = processes.commands[:2]
    assert trained[:2] == ["train", "cartpole"]
    assert trained[-4:] == ["--run-dir", "s/cartpole__base__4", "--resume", "auto"]
    assert evaluated == ["eval", "s/cartpole__base__4", "--episodes=7", "--epsilon=0.001", "--device=cpu"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 runs, 0 of them done before: s"
    assert lines[2] == "[1/4] cartpole base seed 4: started"
    assert lines[3] == "cartpole base seed 4: mean score 4.0, 2000 steps in 1.0 minutes"
    assert [line.split() for line in lines[-2:]] == [
        ["cartpole", *name, "2", "6.0", "4.0", "to", "8.0", "2,000"] for name in (["base"], ["agent.n-step=1"])
    ]


def test_the_same_command_again_runs_what_is_missing(processes: Processes) -> None:
    words = ["cartpole", "--seeds", 1, 2, "--dir", "s"]
    assert run(*words) == 0
    whole = Path("s/sweep.csv").read_text()
    assert run(*words) == 0
    assert Path("s/sweep.csv").read_text() == whole and len(processes.commands) == 4

    Path("s/sweep.csv").write_text(whole[:-9])  # a kill tore the last row
    assert run(*words, "--budget-minutes", 1000) == 0
    assert Path("s/sweep.csv").read_text() == whole
    assert processes.commands[4:] == processes.commands[2:4]

    assert run("cartpole", "--seeds", 2, "--variants", "agent.n-step=1", "--dir", "s") == 0
    assert [(row["variant"], row["seed"]) for row in table(Path("s/sweep.csv"))] == [
        *[("base", "1"), ("base", "2")],
        ("agent.n-step=1", "2"),
    ]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--minutes", "20"], "minutes: 15.0 -> 20.0"),
        (["--episodes", "5", "--parallel", "2"], "parallel: 1 -> 2; episodes: 100 -> 5"),
        (["--settings", "agent.gamma=0.9"], "settings:  -> agent.gamma=0.9"),
    ],
)
def test_another_kind_of_sweep_is_refused(
    changed: list[str], told: str, processes: Processes, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(process_module, "available_cores", lambda: [0, 1])
    assert run("cartpole", "--seeds", 1, "--dir", "s") == 0
    capsys.readouterr()
    said = refusal(capsys, run("cartpole", "--seeds", 1, "--dir", "s", *changed))
    assert said == f"s holds a sweep with other settings, another --dir starts anew: {told}"
    assert len(processes.commands) == 2


def test_a_folder_of_something_else_is_left_alone(processes: Processes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    said = refusal(capsys, run("cartpole", "--dir", "mine"))
    assert said == "mine exists and is not a sweep's folder: another --dir starts anew"
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_a_sweep_that_is_running_is_not_run_twice(processes: Processes, capsys: pytest.CaptureFixture[str]) -> None:
    with lock(Path("s")):
        assert refusal(capsys, run("cartpole", "--dir", "s")).startswith("s is in use: ")


@pytest.mark.parametrize(
    ("line", "step"),
    [("error: no", "train"), ("stopped at step 7, saved", "train"), ("Killed", "eval"), ("$ x", "eval")],
)
def test_a_run_that_fails_is_told_and_the_others_go_on(
    line: str, step: str, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    processes.fails = lambda words: line if words[0] == step and "__1" in " ".join(words) else ""
    assert run("cartpole", "--seeds", 1, 2, "--dir", "s") == 1
    said = capsys.readouterr()
    reason = "it printed nothing" if line == "$ x" else line
    assert said.err == f"warning: cartpole base seed 1 failed ({reason}); more in s/cartpole__base__1.log\n"
    assert [row["seed"] for row in table(Path("s/sweep.csv"))] == ["2"]
    assert said.out.splitlines()[-1].split()[:3] == ["cartpole", "base", "1"]
    processes.fails = lambda words: ""
    assert run("cartpole", "--seeds", 1, 2, "--dir", "s") == 0
    assert [row["seed"] for row in table(Path("s/sweep.csv"))] == ["2", "1"]


def test_a_sweep_without_any_result_has_an_empty_table(processes: Processes, capsys: Any) -> None:
    processes.fails = lambda words: "error: no"
    assert run("cartpole", "--seeds", 1, "--dir", "s") == 1
    assert capsys.readouterr().out.splitlines()[-1].split() == ["cartpole", "base", "0"]


def test_no_run_is_started_that_would_not_end_in_the_budget(
    processes: Processes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(sweep, "monotonic", lambda: now[0])
    process = processes.process

    def slow(words: Sequence[str], log: Path, threads: int) -> bool:
        now[0] += 60 if words[0] == "train" else 30  # a minute of training, half a minute for the rest
        return process(words, log, threads)

    monkeypatch.setattr(processes, "process", slow)
    words = ["cartpole", "--seeds", 1, 2, 3, 4, "--minutes", 1, "--dir", "s"]
    assert run(*words, "--budget-minutes", 1) == 0  # the first is guessed to need 1.1
    assert processes.commands == []
    assert "4 runs were not started, they would not end in time; again: " in capsys.readouterr().err
    assert run(*words, "--budget-minutes", 3.1) == 0
    assert [row["seed"] for row in table(Path("s/sweep.csv"))] == ["1", "2"]
    assert run(*words) == 0
    assert len(table(Path("s/sweep.csv"))) == 4


def test_runs_side_by_side_have_cores_of_their_own(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "available_cores", lambda: [1, 2, 4, 5, 7])
    meet = threading.Barrier(2)
    process = processes.process

    def both(words: Sequence[str], log: Path, threads: int) -> bool:
        meet.wait(timeout=30)
        return process(words, log, threads)

    monkeypatch.setattr(processes, "process", both)
    assert run("cartpole", "--seeds", 1, 2, "--parallel", 2, "--dir", "s") == 0
    assert sorted(processes.bound.values()) == [[1, 2], [4, 5]]
    assert all("--env.num-threads=2" in words for words in processes.commands if words[0] == "train")
    assert len(table(Path("s/sweep.csv"))) == 2


@pytest.mark.parametrize(
    ("gpus", "visible", "device", "found"),
    [
        (0, None, "auto", [None, None]),
        (1, None, "auto", ["0", "0"]),
        (2, None, "cuda", ["0", "1"]),
        (2, "5,GPU-77", "auto", ["5", "GPU-77"]),
        (2, None, "cuda:1", [None, None]),
        (2, None, "cpu", [None, None]),
    ],
)
def test_runs_side_by_side_have_gpus_of_their_own(
    gpus: int, visible: str | None, device: str, found: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep.split_devices(device, 2) == found


def test_a_run_is_told_its_gpu(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sweep, "split_devices", lambda device, parts: [f"{device} {i} of {parts}" for i in range(parts)]
    )
    monkeypatch.setattr(process_module, "available_cores", lambda: [1, 4])
    assert run("cartpole", "--seeds", 1, 2, "--parallel", 2, "--dir", "s") == 0
    assert set(processes.devices.values()) <= {"auto 0 of 2", "auto 1 of 2"}
    assert len(processes.devices) == 2


def test_cores_are_split_evenly() -> None:
    assert sweep.split_cores([3, 5, 6, 8], 1) == [[3, 5, 6, 8]]
    assert sweep.split_cores(range(7), 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="--parallel is 3, but 2 cores are available"):
        sweep.split_cores([0, 1], 3)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
def test_a_threads_processes_are_bound_with_it() -> None:
    core = process_module.available_cores()[-1]
    seen: list[bytes] = []

    def child() -> None:
        sweep.bind([core])
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        seen.append(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    before = os.sched_getaffinity(0)
    thread = threading.Thread(target=child)
    thread.start()
    thread.join()
    assert seen == [f"[{core}]\n".encode()]
    assert os.sched_getaffinity(0) == before


def test_an_error_in_a_thread_ends_the_sweep(processes: Processes, capsys: Any, monkeypatch: Any) -> None:
    def full(*args: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processes, "process", full)
    assert run("cartpole", "--seeds", 1, 2, "--dir", "s") == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


# ---------------------------------------------------------------- with real processes


@pytest.mark.slow
def test_ctrl_c_saves_the_runs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = ["cartpole", "--seeds", 1, "--settings", TINY, "--minutes", 0.1, "--episodes", 2]
    words += ["--dir", tmp_path / "s"]
    run_dir = tmp_path / "s" / "cartpole__base__1"
    process = script("sweep.py", *words)
    deadline = time.monotonic() + 60
    while not (run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping: the runs save what they have" in err
    assert "stopped; the same command goes on: " in err.splitlines()[-1] and "sweep.py cartpole" in err
    step = checkpoint.load(run_dir)["agent"]["clocks"]["global_step"]
    log = run_dir.with_name("cartpole__base__1.log")
    told = log.read_text().splitlines()[-1]
    assert told.startswith(f"stopped at step {step}, saved; go on with: ")
    assert told.endswith(f" -m gravitar_dqn train --resume {run_dir}")
    assert rows(tmp_path / "s" / "sweep.csv") == []

    process = script("sweep.py", *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (row,) = table(tmp_path / "s" / "sweep.csv")
    assert int(row["global_step"]) > step and float(row["minutes"]) >= 0.1
    assert log.read_text().count("--run-dir s/cartpole__base__1 --resume auto") == 2
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 2
    assert "cartpole base" in out.splitlines()[-1]

    (tmp_path / "s" / "sweep.csv").unlink()  # as by a kill: a complete run without a row is only evaluated
    assert run(*words) == 0
    assert table(tmp_path / "s" / "sweep.csv") == [row]
    assert f"{run_dir} is complete ({row['global_step']} steps" in log.read_text()


def test_a_run_that_does_not_fit_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cartpole", "--seeds", 1, "--no-base", "--variants", "agent.buffer-size=1000000000000", "--dir", "s"]
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert "agent.buffer-size=1000000000000 seed 1 failed (error: a replay buffer of 1000000000000" in said
    assert len(said.splitlines()) == 1


def test_a_run_that_lost_its_checkpoints_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cartpole", "--seeds", 1, 2, "--settings", TINY, "--minutes", 0.02, "--episodes", 1, "--dir", "s"]
    assert run(*words, "--budget-minutes", 0.0001) == 0  # begun, and nothing done
    lost = Path("s/cartpole__base__1")
    lost.mkdir()
    write_config(lost, get_preset("cartpole"))
    (lost / "metrics.csv").write_text("wall_seconds,global_step\n1.5,100\n")
    capsys.readouterr()
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert "cartpole base seed 1 failed (error: s/cartpole__base__1 has lost its checkpoints: copy them back" in said
    assert [row["seed"] for row in table(Path("s/sweep.csv"))] == ["2"]

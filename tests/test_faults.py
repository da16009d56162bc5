"""Faults that long unattended runs meet, injected: nothing whole is lost, and no run looks well that is not.

`pytest -m faults` runs them all, with those of other files; what is marked slow too is left out of the usual tests.
"""

import contextlib
import errno
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import probes
import pytest
import torch
from faults import injected
from run_helpers import CARTPOLE, RANDAL_CARTPOLE, ROOT, check_episodes, refusal, rows, script, train
from test_resume import FOR_EVER, Killable, saved_step, wait_until

from gravitar_dqn import MLP, RANDAL, PPOConfig, PredictorMLP, RANDALTrainer, RANDALTrainerConfig, training
from gravitar_dqn.agents.base import Agent
from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.cli import commands
from gravitar_dqn.config import flatten, to_dict
from gravitar_dqn.errors import NotFinite, UserError
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.files import written_whole
from gravitar_dqn.run.folder import lock, run_to_resume, write_config
from gravitar_dqn.tools.sweep import as_options

pytestmark = pytest.mark.faults

OFTEN = ["--checkpoint-minutes", 0.0005, "--log-seconds", 0.02]
EVERY_STEP = ["--log-seconds", 0]


def evaluate(run_dir: Path, *more: object) -> int:
    """`evaluate.py` for two games, in this process."""
    words = [str(run_dir), "--episodes", "2", "--device", "cpu", *map(str, more)]
    return commands.run(commands.evaluate_command, words, "evaluate.py")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error."""
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("preset", [CARTPOLE, RANDAL_CARTPOLE], ids=["dqn", "randal"])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    preset: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    injected("learning rate 1e30")
    run_dir = tmp_path / "run"
    assert train(*preset, *EVERY_STEP, "--agent.learning-rate", 1e30, "--run-dir", run_dir) == 3
    told = re.fullmatch(
        r"error: (\w+) is (nan|-?inf); stopped at step \d+; .*/run stays as of step 0; "
        "a new run with a lower learning rate may do better",
        last_line(capsys),
    )
    assert told
    assert not np.isfinite(rows(run_dir / "metrics.csv")[-1][told[1]])
    assert saved_step(run_dir) == 0
    assert evaluate(run_dir) == 0


def test_a_run_that_is_healthy_has_no_nan_in_its_metrics(tmp_path: Path) -> None:
    assert train(*CARTPOLE, *EVERY_STEP, "--total-steps", 100, "--run-dir", tmp_path / "run") == 0
    cells = (tmp_path / "run" / "metrics.csv").read_text()
    assert "nan" not in cells and "inf," not in cells and ",," in cells, "what has no value yet is an empty cell"


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_a_broken_game_sends_stops_the_run(
    what: str, bad: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected(f"{bad} as {what}")
    observe = Agent.observe

    def broken(
        self: Any, actions: Any, rewards: Any, terminations: Any, truncations: Any, obs: Any, played: Any
    ) -> None:
        if self.global_step == 70:
            rewards, obs = (rewards * bad, obs) if what == "reward" else (rewards, obs * np.float32(bad))
        observe(self, actions, rewards, terminations, truncations, obs, played)

    monkeypatch.setattr(Agent, "observe", broken)
    assert train(*CARTPOLE, *EVERY_STEP, "--total-steps", 1000, "--run-dir", tmp_path / "run") == 3
    assert re.search(r"(td_loss|q_mean) is (nan|inf); stopped at step", last_line(capsys))
    assert saved_step(tmp_path / "run") == 0


@pytest.mark.parametrize("part", ["q_network", "target_network", "optimizer"])
def test_nan_in_anything_that_is_saved_is_not_saved(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no metric shows it: it is met by the last step, after the last row."""
    injected(f"NaN in {part}")
    step = training.Checkpointer.step

    def poison(self: Any, episodes: Any) -> None:
        step(self, episodes)
        if self._agent.global_step == 100:
            held = getattr(self._agent, part)
            tensors = held.parameters() if part != "optimizer" else [row["exp_avg"] for row in held.state.values()]
            with torch.no_grad():
                next(iter(tensors)).view(-1)[0] = torch.nan

    monkeypatch.setattr(training.Checkpointer, "step", poison)
    words = [*CARTPOLE, "--log-seconds", 100, "--total-steps", 100, "--run-dir", tmp_path / "run"]
    assert train(*words) == 3
    assert (
        f"error: agent.{part}." in (line := last_line(capsys))
        and "holds NaN or infinity; stopped at step 100; " in line
    )
    assert saved_step(tmp_path / "run") == 0


def test_weights_with_nan_of_an_older_version_do_not_play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    injected("NaN in a checkpoint")
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", run_dir) == 0
    for path in checkpoint.folder(run_dir).glob("step_*.pt"):
        state = torch.load(path, weights_only=True)
        next(iter(state["agent"]["policy"].values())).view(-1)[0] = torch.nan
        torch.save(state, path)
    capsys.readouterr()
    for command, words in ((commands.evaluate_command, ["--device", "cpu"]), (commands.watch_command, ["--overlay"])):
        assert "holds NaN or infinity in agent." in refusal(
            capsys, commands.run(command, [str(run_dir), *words], "x.py")
        )
    assert "holds NaN or infinity in agent." in refusal(capsys, train("--resume", run_dir, "--total-steps", 90))


# ---------------------------------------------------------------- disks that are full


def small_trainer(home: Path, validated_on: type[probes.Both], **settings: Any) -> RANDALTrainer:
    """Of a probe, with a validation every 50 steps."""
    agent = RANDAL(MLP, PredictorMLP, (1,), 2, PPOConfig(device="cpu"), pixel_control=False)
    config = RANDALTrainerConfig(
        total_steps=10**6,
        nsteps=8,
        num_minibatches=2,
        init_obs_steps=10,
        replay_length=100,
        validate_freq=50,
        num_val_episodes=1,
        log_dir=str(home),
        log_scalars=False,
        **settings,
    )
    return RANDALTrainer(probes.vector_of(probes.Both, 4), agent, probes.vector_of(validated_on, 1), config)


def limited(size: int) -> Callable[[], None]:
    """For a process that is started: no file of its may grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Training:
    """train.py as a process whose files may not grow beyond `file_size` bytes, as on a full disk."""

    def __init__(self, *words: object, file_size: int = resource.RLIM_INFINITY) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=limited(file_size),
        )
        self.lines: list[str] = []  # of standard error, so far
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line.rstrip("\n"))

    def fill_disk(self, size: int) -> None:
        """Let no file grow beyond `size` bytes from now on."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Until `true()`; an error when the process ended before."""
        deadline = time.monotonic() + 60
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, self.lines
            time.sleep(0.001)

    def told(self, words: str) -> int:
        """How many lines had these words."""
        return sum(words in line for line in self.lines)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(60)
        self._reader.join(60)
        return code

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.end()


@pytest.mark.parametrize(
    "size", [0, 100, 3_000, 20_000], ids=["config", "config later", "checkpoint", "checkpoint later"]
)
def test_a_run_that_cannot_save_at_its_start_stops_and_leaves_the_name_free(size: int, tmp_path: Path) -> None:
    injected("disk full at the start")
    run_dir = tmp_path / "run"
    with Training(*CARTPOLE, *FOR_EVER, "--run-dir", run_dir, file_size=size) as training:
        assert training.end() == 2, training.lines
    assert training.lines[-1].startswith(f"error: the run's folder {run_dir} cannot be written: ")
    assert not training.told("Traceback")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["empty", "linked", "nothing"])
def test_a_folder_that_a_user_has_made_stays(
    kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("disk full at the start")

    def full(*words: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    run_dir = tmp_path / "run"
    if kept == "linked":
        (tmp_path / "elsewhere").mkdir()
        run_dir.symlink_to(tmp_path / "elsewhere")
    elif kept == "empty":
        run_dir.mkdir()
    before = {*tmp_path.rglob("*")}
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", run_dir) == 2
    assert last_line(capsys) == f"error: the run's folder {run_dir} cannot be written: No space left on device"
    assert {*tmp_path.rglob("*")} == before


def test_a_trainer_that_cannot_save_at_its_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("disk full at the start")

    def full(*words: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device$"):
        small_trainer(tmp_path, probes.Both).train()
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_copies_no_weights_with_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    injected("NaN in the policy")
    trainer = small_trainer(tmp_path, probes.Both, save_freq=50, model_dir=str(tmp_path / "models"))
    with torch.no_grad():
        next(trainer.agent.networks.policy.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(NotFinite, match="NaN or infinity"):
        trainer.train()
    assert not (tmp_path / "models").exists()


def test_a_disk_that_fills_up_is_told_at_every_try_and_at_the_end(tmp_path: Path) -> None:
    injected("disk full later")
    run_dir = tmp_path / "run"
    with Training(*CARTPOLE, *FOR_EVER, *OFTEN, "--run-dir", run_dir) as training:
        training.wait_until(lambda: len(list(checkpoint.folder(run_dir).glob("step_*.pt"))) > 1)
        training.fill_disk(1_000)
        training.wait_until(lambda: training.told("checkpoint not written") >= 5)
        training.wait_until(lambda: training.told("csv cannot be written") >= 1)
        before = saved_step(run_dir)
        training.process.send_signal(signal.SIGINT)
        assert training.end() == 4, training.lines
    assert re.match(rf"error: step \d+ could not be saved, .*/run stays as of step {before}: ", training.lines[-1])
    assert training.told("rows are lost"), "what else was lost is not hidden by that"
    assert saved_step(run_dir) == before

    assert train("--resume", run_dir, "--total-steps", before + 100) == 0
    check_episodes(run_dir, [0, before])


def test_a_disk_that_has_room_again_ends_well(tmp_path: Path) -> None:
    injected("disk full for a while")
    run_dir = tmp_path / "run"
    with Training(*CARTPOLE, *FOR_EVER, *OFTEN, "--run-dir", run_dir) as training:
        training.wait_until(lambda: len(list(checkpoint.folder(run_dir).glob("step_*.pt"))) > 1)
        training.fill_disk(1_000)
        training.wait_until(lambda: training.told("checkpoint not written") >= 1)
        training.fill_disk(resource.RLIM_INFINITY)
        training.process.send_signal(signal.SIGINT)
        assert training.end() == 130, training.lines
    games = check_episodes(run_dir, [0])
    assert len(games) == checkpoint.load(run_dir)["agent"]["clocks"]["episodes"], "rows that waited are written"


# ---------------------------------------------------------------- damaged checkpoints


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file somewhere, or change up to 4 000 of its bytes."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    else:
        start = rng.randrange(len(data))
        data[start : start + 4_000] = rng.randbytes(len(data[start : start + 4_000]))
    path.write_bytes(data)


@pytest.fixture
def run_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of 60 steps with two checkpoints."""
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", tmp_path / "run") == 0
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["train", "evaluate", "watch"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(
    command: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint.folder(run_dir) / "step_000000000060.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    injected("checkpoint cut short")
    if command == "train":
        assert train("--resume", run_dir, "--total-steps", 90) == 0
        assert saved_step(run_dir) == 90
        check_episodes(run_dir, [0])  # from step 0, and rows of the lost steps went
    elif command == "evaluate":
        assert evaluate(run_dir) == 0
    else:
        words = [str(run_dir), "--video-dir", str(run_dir.parent)]
        assert commands.run(commands.watch_command, words, "watch.py") == 0
        assert list(run_dir.glob("step_0_seed_*.mp4")), "of the older one"
    err = capsys.readouterr().err
    assert f"warning: {newest} is not a whole checkpoint (" in err
    assert "; step_000000000000.pt is used instead" in err


def test_a_damaged_checkpoint_is_set_aside_by_the_run_that_goes_on(run_dir: Path) -> None:
    """It neither counts among those that are kept nor is lost."""
    injected("checkpoint cut short")
    newest = checkpoint.folder(run_dir) / "step_000000000060.pt"
    newest.write_bytes(cut := newest.read_bytes()[:-100])
    assert train("--resume", run_dir, "--total-steps", 90) == 0
    assert newest.with_name("step_000000000060.pt.damaged").read_bytes() == cut
    steps = [path.name for path in sorted(checkpoint.folder(run_dir).glob("step_*.pt"))]
    assert steps == ["step_000000000000.pt", "step_000000000090.pt"]


def contents(run_dir: Path) -> dict[str, bytes]:
    """Of a run's folder, by name."""
    return {path.name: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("reader", "name", "error"),
    [
        (zipfile, "ZipFile", OSError(errno.EMFILE, "Too many open files")),
        (torch, "load", RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")),
    ],
)
def test_a_checkpoint_that_cannot_be_read_at_present_stops_the_resume(
    reader: Any,
    name: str,
    error: Exception,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older one is no stand-in for a file that may well be whole."""
    injected("a checkpoint that cannot be opened")
    before = contents(run_dir)

    def refuse(*words: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(reader, name, refuse)
    told = refusal(capsys, train("--resume", run_dir, "--total-steps", 90))
    assert f"step_000000000060.pt cannot be read at present: {error}" in told
    assert contents(run_dir) == before


def test_a_checkpoint_on_a_disk_that_fails_is_passed_over(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("a disk that cannot be read")
    test = zipfile.ZipFile.testzip

    def fail(self: Any) -> Any:
        if "60.pt" in str(self.filename):
            raise OSError(errno.EIO, "Input/output error")
        return test(self)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    assert evaluate(run_dir) == 0
    told = capsys.readouterr().err
    assert "is not a whole checkpoint ([Errno 5] Input/output error); step_000000000000.pt is used instead" in told


@pytest.mark.parametrize("why", ["in use", "complete"])
def test_a_resume_that_is_refused_changes_nothing(why: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the name of a damaged checkpoint, which the next evaluation must tell too."""
    injected("checkpoint cut short")
    newest = checkpoint.folder(run_dir) / "step_000000000060.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    before = contents(run_dir)
    if why == "in use":
        with lock(run_dir):
            assert "is in use" in refusal(capsys, train("--resume", run_dir))
    else:
        older = checkpoint.folder(run_dir) / "step_000000000000.pt"
        state = checkpoint.read(older)
        state["agent"]["clocks"]["global_step"] = 60
        with written_whole(older) as temporary:  # what was read is still mapped to the file
            torch.save(state, temporary)
        before = contents(run_dir)
        assert train("--resume", run_dir) == 2
        assert "is complete (60 steps" in last_line(capsys)
    assert contents(run_dir) == before


def test_a_new_run_does_not_begin_in_a_folder_where_another_one_ended_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of the command and the start."""
    injected("two runs in one folder")
    words = [*CARTPOLE, "--total-steps", 60, "--run-dir", tmp_path / "run"]
    parsed = commands.parse_train([str(word) for word in words], "train.py")[0].config
    assert train(*words) == 0
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"exists: --resume .* resumes it"):
        training.train(parsed, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_run_that_still_starts_is_not_removed(tmp_path: Path) -> None:
    injected("two runs in one folder")
    run_dir = tmp_path / "run"
    with lock(run_dir):
        assert run_to_resume(run_dir) is None
        write_config(run_dir, PRESETS["cartpole"])
        with pytest.raises(UserError, match="is in use"):
            run_to_resume(run_dir)
    assert run_to_resume(run_dir) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["run"], "what the kill left, the lock too"


def test_too_little_memory_for_a_checkpoint_is_no_other_version(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("out of memory")

    def full(self: Any, state: Any) -> None:
        raise RuntimeError(ON_A_CPU)

    monkeypatch.setattr(DQNAgent, "load_state_dict", full)
    told = refusal(capsys, train("--resume", run_dir, "--total-steps", 90))
    assert told.startswith("there is not enough memory: ")


def test_a_trainer_that_is_refused_leaves_its_environments_open(tmp_path: Path) -> None:
    """They can be used for the next try."""
    injected("two runs in one folder")
    trainer = small_trainer(tmp_path, probes.Both)
    with lock(trainer.run_dir), pytest.raises(UserError, match="exists"):
        trainer.train()
    assert not trainer.envs.closed and not trainer.val_envs.closed


def test_a_run_that_another_one_ends_meanwhile_is_not_rolled_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read before the folder is held may be old when it is."""
    injected("two runs in one folder")
    load = checkpoint.load

    def late(home: Path, **options: Any) -> Any:
        with pytest.raises(UserError, match="is in use"), lock(home):
            pass
        return load(home, **options)

    monkeypatch.setattr(checkpoint, "load", late)
    assert train("--resume", run_dir, "--total-steps", 90) == 0


@pytest.mark.parametrize("seed", range(100))
def test_damage_anywhere_is_seen_or_harmless(seed: int, run_dir_once: Path, tmp_path: Path) -> None:
    """`read` gives back what was saved, or refuses."""
    rng = random.Random(seed)
    path = tmp_path / "step_000000000060.pt"
    whole = checkpoint.folder(run_dir_once) / path.name
    path.write_bytes(whole.read_bytes())
    damage(path, rng)
    injected("checkpoint damaged at random")
    with contextlib.suppress(checkpoint.NotWhole):
        found = checkpoint.read(path)
        for one, other in zip(tensors(found), tensors(checkpoint.read(whole)), strict=True):
            assert torch.equal(one, other)


@pytest.fixture(scope="module")
def run_dir_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps that is only read."""
    home = tmp_path_factory.mktemp("once") / "run"
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", home) == 0
    return home


def test_damage_of_the_archives_own_words_is_seen_or_harmless(run_dir_once: Path, tmp_path: Path) -> None:
    """Where the parts lie, how long they are, how they are packed: no checksum guards these."""
    path = tmp_path / "step_000000000060.pt"
    shutil.copy(whole := checkpoint.folder(run_dir_once) / path.name, path)
    expected, data, rng = tensors(checkpoint.read(whole)), bytearray(whole.read_bytes()), random.Random(0)
    directory = data.index(b"PK\x01\x02")
    places = [*range(60), *range(directory, len(data))]
    for place in rng.sample(places, 500):
        injected("bit flipped in a checkpoint's directory")
        changed = data.copy()
        changed[place] ^= 1 << rng.randrange(8)
        path.unlink()  # what was read is still mapped to it
        path.write_bytes(changed)
        with contextlib.suppress(checkpoint.NotWhole):
            for one, other in zip(tensors(checkpoint.read(path)), expected, strict=True):
                assert torch.equal(one, other)


def tensors(state: Any) -> list[torch.Tensor]:
    """All in a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in inner for tensor in tensors(value)]


# ---------------------------------------------------------------- readers that go away


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "sweep.py"])
def test_help_below_head_is_silent(name: str) -> None:
    injected("nobody reads standard output")
    command = f"{sys.executable} {ROOT / 'scripts' / name} --help | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_an_evaluation_that_nobody_reads_is_silent_and_written(run_dir: Path) -> None:
    injected("nobody reads standard output")
    process = script("evaluate.py", run_dir, "--episodes", 2, "--device", "cpu")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE
    assert (run_dir / "eval.json").exists()


def test_training_that_nobody_reads_goes_on_to_its_end(tmp_path: Path) -> None:
    injected("nobody reads standard output")
    process = script("train.py", *CARTPOLE, "--total-steps", 500, "--run-dir", tmp_path / "run")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0, err
    assert err.count("standard output cannot be written") == 1 and "Exception ignored" not in err
    assert saved_step(tmp_path / "run") == 500


@pytest.mark.parametrize("closed", ["1", "2"])
def test_output_that_the_shell_has_closed_is_no_error(closed: str, tmp_path: Path) -> None:
    injected("standard output or error closed")
    words = ["train.py", *CARTPOLE, "--total-steps", "500", "--run-dir", str(tmp_path / "run")]
    command = f"{shlex.join([sys.executable, str(ROOT / 'scripts' / words[0]), *words[1:]])} {closed}>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert saved_step(tmp_path / "run") == 500


@pytest.mark.parametrize(("words", "code"), [(["--agent.learning-rate", "1e30", *EVERY_STEP], 3), (["--nonsense"], 2)])
def test_the_exit_code_tells_also_where_the_log_has_no_room(words: list[object], code: int, tmp_path: Path) -> None:
    injected("disk full for the log")
    command = shlex.join(map(str, [sys.executable, ROOT / "scripts" / "train.py", *CARTPOLE, *words]))
    done = subprocess.run(
        ["bash", "-c", f"{command} --run-dir {tmp_path / 'run'} 2>/dev/full"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code


def test_a_pipe_that_breaks_elsewhere_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A web server that hangs up, say: standard output is as it was."""
    injected("a broken pipe that is not standard output's")

    def broken(argv: Any, prog: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert "Broken pipe" in refusal(capsys, commands.run(broken, [], "x.py"))


# ---------------------------------------------------------------- signals and kills


def test_the_first_signal_ends_a_validation_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    injected("signal during a validation")
    played: list[int] = []

    class Slow(probes.Both):
        """A game that gets no further than its second step before the signal."""

        length = 10**9

        def step(self, action: int) -> Any:
            played.append(action)
            if len(played) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    trainer = small_trainer(tmp_path, Slow)
    trainer.train()
    assert 2 <= len(played) < 20
    assert saved_step(trainer.run_dir) >= 50
    assert rows(trainer.run_dir / "validation.csv") == [], "a validation that was broken off is none"


def signal_at_random(home: Path, number: signal.Signals, times: int, rng: random.Random) -> None:
    """Start a run, send it a signal (twice, where `times` is 2) at any moment of its life, and resume what it left."""
    injected(f"{number.name} {'twice' if times == 2 else 'once'} at a random moment")
    run = Killable([*CARTPOLE, *FOR_EVER, *OFTEN, "--run-dir", home])
    try:
        wait_until(lambda: (checkpoint.folder(home) / "latest").exists(), run)
        time.sleep(rng.uniform(0, 0.5))
        for _ in range(times):
            os.kill(run.process.pid or 0, number)
            time.sleep(rng.choice([0, 0.001, 0.01]))
        run.process.join(60)
        code = run.process.exitcode
    finally:
        run.process.kill()
    assert code == 128 + number or (times == 2 and code in (-number, 130)), code
    step = saved_step(home)
    assert train("--resume", home, "--total-steps", step + 20) == 0
    check_episodes(home, [0, step])


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_leaves_a_run_that_goes_on(number: signal.Signals, times: int, tmp_path: Path) -> None:
    signal_at_random(tmp_path / "run", number, times, random.Random(times))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_many_moments_leave_runs_that_go_on(number: signal.Signals, seed: int, tmp_path: Path) -> None:
    signal_at_random(tmp_path / "run", number, 1 + seed % 2, random.Random(seed))


# ---------------------------------------------------------------- what breaks beneath a run


def test_a_game_that_raises_ends_the_run_badly_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("an environment that raises")

    def broken(self: Any, *step: Any) -> None:
        observe(self, *step)
        if self.global_step == 150:
            raise RuntimeError("the emulator died")

    observe = Agent.observe
    monkeypatch.setattr(Agent, "observe", broken)
    run_dir = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the emulator died"):  # the process ends with its traceback, and 1
        train(*CARTPOLE, *FOR_EVER, *OFTEN, "--run-dir", run_dir)
    monkeypatch.undo()
    step = saved_step(run_dir)
    assert train("--resume", run_dir, "--total-steps", step + 100) == 0
    check_episodes(run_dir, [0, step])


ON_A_CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError(ON_A_CPU)]
)
def test_too_little_memory_is_one_line(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("out of memory")

    def full(self: Any) -> int:
        if self.global_step == 100:
            raise error
        return 0

    monkeypatch.setattr(DQNAgent, "update", full)
    assert train(*CARTPOLE, *FOR_EVER, "--run-dir", tmp_path / "run") == 2
    assert last_line(capsys) == (
        "error: there is not enough memory: smaller batches, a smaller replay buffer or fewer games need less; "
        f"stopped at step 100; {tmp_path / 'run'} stays as of step 0"
    )
    assert saved_step(tmp_path / "run") == 0


def test_too_little_memory_at_the_start_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("out of memory")

    def full(*words: Any, **options: Any) -> None:
        raise RuntimeError(ON_A_CPU)

    monkeypatch.setattr(training, "entry_of", full)
    assert refusal(capsys, train(*CARTPOLE, "--run-dir", tmp_path / "run")).startswith("there is not enough memory: ")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_dies_does_not_hide_what_ended_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its death nothing can be read from it any more, the metrics of the last row neither."""
    injected("out of memory")

    def dead(self: Any) -> Any:
        if self.global_step >= 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return metrics(self)

    metrics = DQNAgent.metrics
    monkeypatch.setattr(DQNAgent, "metrics", dead)
    assert train(*CARTPOLE, *FOR_EVER, *EVERY_STEP, "--run-dir", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "warning: " in told and "metrics.csv has no last row (CUDA out of memory. Tried)" in told
    assert told.splitlines()[-1].startswith("error: there is not enough memory: ")


def test_an_interrupted_run_that_saves_past_its_limit_of_time_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("a save that takes long")
    save_last, step = training.Checkpointer.save_last, training.Checkpointer.step

    def interrupt(self: Any, episodes: Any) -> None:
        step(self, episodes)
        if self._agent.global_step == 60:
            os.kill(os.getpid(), signal.SIGINT)

    def slow(self: Any) -> None:
        save_last(self)
        time.sleep(1.5)

    monkeypatch.setattr(training.Checkpointer, "step", interrupt)
    monkeypatch.setattr(training.Checkpointer, "save_last", slow)
    assert train(*CARTPOLE, "--total-minutes", 1.5 / 60, "--run-dir", tmp_path / "run") == 130


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    injected("a clock that jumps")
    jumps = cycle([0.0, 1e9, 4e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    assert train(*CARTPOLE, *EVERY_STEP, "--total-steps", 200, "--run-dir", tmp_path / "run") == 0
    seconds = [row["wall_seconds"] for row in rows(tmp_path / "run" / "metrics.csv")]
    assert seconds == sorted(seconds) and seconds[-1] < 60


def test_a_folder_that_is_removed_ends_the_run_badly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("a run's folder removed")
    step, run_dir = training.Checkpointer.step, tmp_path / "run"

    def remove(self: Any, episodes: Any) -> None:
        step(self, episodes)
        if self._agent.global_step == 150:
            shutil.rmtree(run_dir)

    monkeypatch.setattr(training.Checkpointer, "step", remove)
    assert train(*CARTPOLE, "--total-steps", 300, "--run-dir", run_dir) == 4
    assert re.search(r"error: .*csv could not be written: its last \d+ rows are lost", last_line(capsys))
    assert saved_step(run_dir) == 300, "what could be saved is"


# ---------------------------------------------------------------- settings


NUMBERS: dict[str, list[object]] = {
    "whole": [-1, 0, 1, 2, 3, 7, 20, "x", "", 1.5, "nan"],
    "real": [-1, 0, 1e-9, 0.001, 0.3, 0.5, 1, 2, 1e6, "nan", "inf", "x"],
}
SMALL_RUNS = {
    "cartpole": [*CARTPOLE, "--total-steps", 150],
    "randal-cartpole": [*RANDAL_CARTPOLE, "--total-steps", 150],
    "ram": ["gravitar-ram", *CARTPOLE[1:], "--env.num-envs", 2, "--total-steps", 120],
}
LEFT_ALONE = {"preset", "env.id", "dashboard", "video_dir", "total_steps", "total_minutes", "log_seconds", "seed"}
LEFT_ALONE |= {"total_episodes", "threads"}  # threads would stay for the tests that follow


def random_settings(preset: str, rng: random.Random) -> list[str]:
    """One to three settings of a preset with values that may fit or not."""
    config = commands.parse_train([str(word) for word in SMALL_RUNS[preset]], "train.py")[0].config
    values = {name: value for name, value in flatten(to_dict(config)).items() if name not in LEFT_ALONE}
    chosen: dict[str, object] = {}
    for name, value in rng.sample(sorted(values.items()), rng.choice([1, 1, 2, 3])):
        if isinstance(value, bool):
            chosen[name] = rng.choice(["true", "false"])
        elif isinstance(value, str):
            chosen[name] = rng.choice([value, "nonsense", ""])
        else:
            chosen[name] = rng.choice(NUMBERS["whole" if isinstance(value, int) else "real"])
    return list(as_options(config, {name: str(value) for name, value in chosen.items()}))


def try_settings(preset: str, seed: int, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run with random settings trains, or is refused by one line and leaves nothing."""
    words = random_settings(preset, random.Random(f"{preset} {seed}"))
    injected("random settings")
    code = train(*SMALL_RUNS[preset], *words, "--run-dir", home)
    err = capsys.readouterr().err
    assert "Traceback" not in err, words
    if code == 2:
        assert err.splitlines()[-1].startswith("error: "), words
        assert not home.exists(), words
    elif code == 3:  # a step of 1e6 may well end in infinity
        assert "stays as of step 0" in err, words
    else:
        assert code == 0, (words, err)
        assert saved_step(home) >= 120, words


@pytest.mark.parametrize(
    ("preset", "seed"), [("ram", 0), ("ram", 1), *product(("cartpole", "randal-cartpole"), range(6))]
)
def test_any_settings_train_or_are_refused(
    preset: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_settings(preset, seed, tmp_path / "run", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
@pytest.mark.parametrize("preset", SMALL_RUNS)
def test_many_settings_train_or_are_refused(
    preset: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_settings(preset, seed, tmp_path / "run", capsys)

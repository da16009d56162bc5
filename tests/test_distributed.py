"""Several ranks are one agent: the same weights as one process with all the games, and whatever befalls a rank, one
whole checkpoint."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_helpers import CARTPOLE, ROOT, refusal, rows, train

from gravitar_dqn import training
from gravitar_dqn.config import build, nest
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import get_preset
from gravitar_dqn.run import checkpoint
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.processes import Stop

SMALL = [*CARTPOLE, "--env.num-envs", "2", "--rank-timeout", "60"]


def command(*words: object) -> list[str]:
    """torchrun of two ranks with a script and its arguments, and options of its own before those."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *map(str, words),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_to_end(*words: object) -> str:
    """What two ranks of a script, which must succeed, tell on standard error."""
    ended = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


class Torchrun:
    """A training run on two ranks, and what becomes of it."""

    def __init__(self, home: Path, *words: object, options: tuple[str, ...] = ()) -> None:
        self.run_dir, self._log = home / "run", home / "log"
        words = (*words, "--run-dir", self.run_dir, "--log-seconds", 0.1, "--checkpoint-minutes", 0.005)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command(*options, ROOT / "scripts" / "train.py", *words),
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )
        self._seen: set[int] = set()

    @property
    def told(self) -> str:
        return self._log.read_text()

    @property
    def workers(self) -> list[int]:
        """The ranks' processes, in the order of their start."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self._process.pid and "train.py" in (path / "cmdline").read_text():
                    found.append(int(path.name))
        self._seen |= set(found)
        return sorted(found)

    @property
    def step(self) -> int:
        """Of the newest whole row of metrics.csv."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(rows(self.run_dir / "metrics.csv")[-1]["global_step"])
        return 0

    def wait_until(self, true: Callable[[], object], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.told
            assert self._process.poll() is None, self.told
            time.sleep(0.05)

    def play(self, steps: int) -> None:
        """Until so many more steps are in metrics.csv; a restart counts from its checkpoint on."""
        self.wait_until(lambda: self.step > 0)
        target = self.step + steps
        self.wait_until(lambda: self.step >= target and len(self.workers) == 2)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.workers[rank], number)

    def interrupt(self) -> None:
        """Ctrl-C, and to the ranks twice: from whoever tells all processes of a job, and by torchrun."""
        for pid in [*self.workers, self._process.pid]:
            os.kill(pid, signal.SIGINT)

    def end(self, seconds: float = 120.0) -> int:
        """Its exit code; no process of it may be left."""
        code = self._process.wait(seconds)
        left = [pid for pid in self._seen if Path(f"/proc/{pid}").exists()]
        assert not left, self.told
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in self._seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def saved(self) -> int:
        """The step of the newest checkpoint, which must be whole."""
        latest = (self.run_dir / "checkpoints" / "latest").resolve()
        return int(checkpoint.read(latest)["agent"]["clocks"]["global_step"])


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., Torchrun]]:
    started: list[Torchrun] = []

    def start(*words: object, **how: Any) -> Torchrun:
        started.append(Torchrun(tmp_path, *words, **how))
        return started[-1]

    yield start
    for run in started:
        run.close()


# ---------------------------------------------------------------- the same agent


def found(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """What tests/ranks.py found: in one process, and on each of two ranks."""
    run_to_end(ROOT / "tests" / "ranks.py", folder, *kinds)
    return [torch.load(folder / f"{name}.pt") for name in ("alone", "rank_0", "rank_1")]


def floats(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        if state.is_floating_point():
            yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from floats(value, f"{name}.{key}")


def test_two_ranks_are_one_agent(tmp_path: Path) -> None:
    kinds = list(ranks.SETTINGS)
    one, *two = found(tmp_path, *kinds)
    check_told(*(rank["tell"] for rank in two))
    for kind in kinds:
        check_equal(one[kind], [rank[kind] for rank in two])
        assert len(one[kind]["losses"]) >= (ranks.UPDATES if kind != "pictures" else 8)


def check_equal(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert one["games"] > 10, "games must have ended, or nothing is masked"
    losses = torch.tensor([rank["losses"] for rank in two]).mean(dim=0)
    torch.testing.assert_close(losses, torch.tensor(one["losses"]), atol=1e-5, rtol=0)
    for rank in two:
        assert rank["clocks"] == one["clocks"]
        assert rank["games"] == one["games"]
        theirs = dict(floats(rank["state"]))
        for name, ours in floats(one["state"]):
            relative = 1e-5 if "_rms" in name else 0.0  # statistics of pixels, up to 255
            torch.testing.assert_close(theirs[name], ours, atol=1e-5, rtol=relative, msg=f"{name} differs")
    torch.testing.assert_close(torch.cat([rank["epsilons"] for rank in two]), one["epsilons"])
    weights = [dict(floats(rank["state"])) for rank in two]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "the ranks have drifted apart"


def check_told(first: dict[str, Any], second: dict[str, Any]) -> None:
    """What the ranks have told each other, by hand."""
    assert first.pop("own_part") == [0, 1]
    assert second.pop("own_part") == [2, 3]
    assert first == second
    assert first == {
        "total": [[10.0, 12.0, 14.0, 16.0], [10.0]],
        "masked_mean": (0 + 10 + 11 + 12) / 4,
        "gradient": [(0 + 10) / 4, 11 / 4, 12 / 4, 0.0],
        "other": [5.0, 6.0, 7.0, 8.0],
        "largest": 13.0,
        "gathered": [[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]],
        "same": {"rank": 0},
        "counts": [2, 1],
        "all_games": [(0.0, 1), (10.0, 1), (10.0, 1), (10.0, 1)],
        "no_games": [],
        "agreed": [0, [0], 130],  # not before the next step, which is the same one for both
    }


def test_alone_nothing_is_changed() -> None:
    values, mask = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 0.0])
    assert distributed.rank() == 0
    assert distributed.size() == 1
    assert distributed.total(values) == (values,)
    assert distributed.gathered(values) is values
    assert distributed.weighted(values, mask) is values
    assert distributed.masked_mean(values, mask).item() == 1.5
    assert distributed.largest(values).item() == 4
    assert distributed.counts(1, 2) == [1, 2]
    assert distributed.all_games([(5.0, 3)], 7) == [(5.0, 3)]
    assert [distributed.agreed(wish) for wish in (0, distributed.END, 130)] == [0, distributed.END, 130]
    config = get_preset("cartpole")
    assert distributed.share_of(config) is config
    with distributed.joined(config):
        assert distributed.size() == 1


# ---------------------------------------------------------------- what is said for the whole run


def configured(preset: str, **changes: Any) -> Any:
    return build(get_preset(preset), nest(changes))


def test_a_run_is_shared_out() -> None:
    whole = configured("gravitar-ram")
    shares = [whole.share(rank, 4) for rank in range(4)]
    assert {share.env.num_envs for share in shares} == {whole.env.num_envs // 4}
    assert {share.agent.batch_size for share in shares} == {whole.agent.batch_size // 4}
    assert {share.agent.buffer_size for share in shares} == {whole.agent.buffer_size // 4}
    assert {share.first_update for share in shares} == {whole.first_update}
    assert shares[0].seed == whole.seed
    seeds = {share.seed + i for share in shares for i in range(share.env.num_envs)}
    assert len(seeds) == whole.env.num_envs, "two games have the same seed"
    unreal = configured("randal").share(1, 2)
    assert (unreal.tasks.num_windows, unreal.tasks.reward_batch) == (4, 32)


@pytest.mark.parametrize(
    ("preset", "changes", "complaint"),
    [
        (
            "cartpole",
            {"env.num_envs": 5},
            "env.num_envs is 5, which 2 ranks cannot share evenly: 4 and 6 can be divided",
        ),
        ("cartpole", {"env.num_envs": 1}, "env.num_envs is 1, which 2 ranks cannot share evenly: 2 can be divided"),
        ("cartpole", {"agent.batch_size": 33}, "agent.batch_size is 33"),
        ("cartpole", {"agent.buffer_size": 20_001}, "agent.buffer_size is 20001"),
        ("randal", {"tasks.num_windows": 7}, "tasks.num_windows is 7"),
        (
            "randal",
            {"tasks.reward_batch": 66},
            "tasks.reward_batch is 66, which 2 ranks cannot share evenly: 64 and 68 can",
        ),
        ("notebook", {}, "rnd.variant is notebook, which is for one process: several ranks need rnd"),
        ("ppo", {"env.num_envs": 2, "agent.num_steps": 3, "agent.num_minibatches": 6}, "agent.num_minibatches is 6"),
    ],
)
def test_what_cannot_be_divided_is_said(preset: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        configured(preset, **changes).share(0, 2)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, **more: object) -> None:
    """Be what torchrun has started."""
    monkeypatch.setattr(distributed, "die_with_parent", lambda: None)  # the tests' process has other parents
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "none", **more}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


def test_a_restart_resumes_and_ends_well_where_the_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--run-dir", tmp_path / "run", "--resume", "auto", "--total-steps"]
    as_rank(monkeypatch, 0)
    assert train(*words, 100) == 0
    capsys.readouterr()
    assert train(*words, 200) == 0
    assert "going on with" in capsys.readouterr().err
    shared: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed, "same", lambda state: shared.append(state) or state)
    assert train(*words, 200) == 0, "a run that was complete when a rank was lost"
    assert shared == [{}], "the other ranks wait for a word"
    capsys.readouterr()
    assert "exists: " in refusal(capsys, train(*SMALL, "--run-dir", tmp_path / "run")), "nobody asked for a resume"


def test_only_rank_0_looks_at_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    words = [*SMALL, "--run-dir", tmp_path / "run", "--resume", "auto"]
    asked: list[Any] = []
    monkeypatch.setattr(training, "train", lambda config, run_dir, **how: asked.append(how) or 0)
    as_rank(monkeypatch, 0)
    assert "is not a run's folder" in refusal(capsys, train(*words))
    as_rank(monkeypatch, 1)
    assert train(*words) == 0
    assert asked == [{"resume": False, "auto": True, "show_times": False}]


def test_a_restart_that_begins_another_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "train", lambda config, run_dir, **how: 0)
    hint = "warning: torchrun's restart begins another run: with --run-dir DIR --resume auto it resumes the first\n"
    for count, words, expected in ((0, [], ""), (1, [], hint), (1, ["--resume", "auto"], "")):
        as_rank(monkeypatch, 0, TORCHELASTIC_RESTART_COUNT=count)
        assert train(*SMALL, "--run-dir", tmp_path / "run", *words) == 0
        assert capsys.readouterr().err == expected


def test_a_mistake_is_told_once_and_before_anybody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--env.num-envs", 6, "--agent.batch-size", 9, "--run-dir", tmp_path / "run"]
    as_rank(monkeypatch, 0, WORLD_SIZE=2)
    told = refusal(capsys, train(*words))
    assert told == (
        "agent.batch_size is 9, which 2 ranks cannot share evenly: 8 and 10 can be divided; "
        "as it is, the run can have 1 ranks"
    )
    as_rank(monkeypatch, 1, WORLD_SIZE=2)
    assert train(*words) == 2
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "local", "tells"), [(0, 0, True), (1, 1, False), (2, 0, True)])
def test_who_tells_what_is_wrong_on_all_ranks(
    rank: int, local: int, tells: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, rank, LOCAL_RANK=local)
    assert train("--resume", "nowhere") == 2
    assert ("nowhere is not a run's folder" in capsys.readouterr().err) == tells


def test_under_torchrun_a_second_signal_does_not_interrupt_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130


def test_a_helping_rank_has_games_and_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("cartpole", **{"device": "cpu", "env.num_envs": 8})
    _, first = training.build(config)
    first.global_step = 40
    control: Any = None
    group = distributed._Ranks.__new__(distributed._Ranks)
    group.rank, group.size, group.control, group.timeout, group.wish, group.agreed = 1, 2, control, 1.0, 0, 0
    monkeypatch.setattr(distributed, "_ranks", group)
    monkeypatch.setattr(distributed, "same", lambda state: first.state_dict())
    monkeypatch.setattr(distributed, "memory_for_each", lambda free: free)
    monkeypatch.setattr(distributed, "leave", lambda: None)
    seen: list[Any] = []

    def played(envs: Any, agent: Any, seed: int, **how: Any) -> Iterator[list[Any]]:
        seen.extend([envs.num_envs, agent, seed])
        group.agreed = distributed.END
        yield []

    monkeypatch.setattr(training, "play", played)
    assert training.help_train(config) == 0
    num_envs, agent, seed = seen
    monkeypatch.setattr(distributed, "same", lambda state: {})
    assert training.help_train(config) == 0, "the run is complete"
    assert len(seen) == 3, "nothing was played"
    assert num_envs == 4
    assert seed == config.seed + 4 + 40, "rank 0 plays seeds 0 to 3"
    assert agent.global_step == 40
    assert not torch.equal(agent.generator.get_state(), first.generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), first.policy.parameters(), strict=True))


# ---------------------------------------------------------------- what befalls a rank


@pytest.mark.faults
def test_a_killed_rank_is_started_again_and_ctrl_c_saves_once(
    torchrun: Callable[..., Torchrun], capsys: pytest.CaptureFixture[str]
) -> None:
    run = torchrun(*SMALL, "--resume", "auto", options=("--max-restarts=1",))
    run.play(200)
    run.signal(1, signal.SIGKILL)
    run.wait_until(lambda: "another rank has ended; stopped at step" in run.told)
    run.wait_until(lambda: "going on with" in run.told)
    run.play(200)
    run.interrupt()
    assert run.end() != 0
    assert run.told.count("; go on with: ") == 1
    assert "Traceback" not in run.told.replace('Traceback (most recent call last):\n  File "<frozen runpy>', "")
    last = run.saved()
    assert last == run.step, "what was played after the last checkpoint is lost"
    # As many ranks as one likes: here none but this process.
    assert train("--resume", run.run_dir, "--total-steps", last + 100, "--env.num-envs", 2) == 0
    assert run.saved() >= last + 100
    steps = [row["global_step"] for row in rows(run.run_dir / "metrics.csv")]
    assert steps == sorted(steps)  # equal ones come of a step in which all games began anew
    capsys.readouterr()


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_ranks(
    torchrun: Callable[..., Torchrun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*SMALL, "--run-dir", tmp_path / "run", "--total-steps", 300, "--checkpoint-replay") == 0
    told = run_to_end(ROOT / "scripts" / "train.py", "--resume", tmp_path / "run", "--total-steps", 600)
    assert "on 2 ranks of" in told
    assert "the replay buffer fills anew" in told
    assert "of several ranks are not saved" in told
    capsys.readouterr()
    assert "is complete" in refusal(capsys, train("--resume", tmp_path / "run", "--total-steps", 600))
    words = [*SMALL, "--run-dir", tmp_path / "run", "--resume", "auto", "--total-steps", 600]
    told = run_to_end(ROOT / "scripts" / "train.py", *words)  # both ranks end well
    assert told.count("is complete (") == 1


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_noticed(rank: int, torchrun: Callable[..., Torchrun]) -> None:
    run = torchrun(*SMALL, "--rank-timeout", 5)
    run.play(200)
    run.signal(rank, signal.SIGSTOP)
    began = time.monotonic()
    run.wait_until(lambda: "exitcode" in run.told or len(run.workers) < 2)
    assert time.monotonic() - began < 5 + 10
    assert run.end() != 0  # torchrun waits 30 seconds for the one that hangs, and kills it
    assert run.saved() >= 200 * rank, "rank 0 saves what it has when another one hangs"
    if rank == 1:
        assert run.saved() == run.step
        assert "did not answer for 5 seconds" in run.told


@pytest.mark.faults
@pytest.mark.slow
def test_twenty_killed_ranks_lose_nothing(torchrun: Callable[..., Torchrun]) -> None:
    rng = random.Random(1)
    run = torchrun(*SMALL, "--resume", "auto", options=("--max-restarts=20",))
    saved = 0
    for _ in range(20):
        run.wait_until(lambda: len(run.workers) == 2)
        workers = run.workers
        time.sleep(rng.uniform(0, 12))  # while they start, join, play, learn or save
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[rng.randrange(2)], signal.SIGKILL)
        run.wait_until(lambda old=workers: not set(old) & set(run.workers))  # type: ignore[misc]
        if (run.run_dir / "checkpoints" / "latest").exists():
            before, saved = saved, run.saved()
            assert saved >= before, "a checkpoint was lost"
    run.wait_until(lambda: run.step > saved + 200)
    run.interrupt()
    run.end()
    assert run.saved() == run.step


@pytest.mark.slow
@pytest.mark.parametrize("seed", [742, 1, 2])
def test_cartpole_is_learned_by_two_ranks(seed: int, torchrun: Callable[..., Torchrun]) -> None:
    run = torchrun("cartpole", "--seed", seed, "--device", "cpu", "--dashboard", "off", "--video-every", 0)
    run.wait_until(lambda: run.step > 0)
    run.wait_until(lambda: rows(run.run_dir / "metrics.csv")[-1]["return_mean"] >= 440, seconds=3_600)
    run.interrupt()
    run.end()

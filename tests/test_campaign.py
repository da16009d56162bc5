"""Campaigns: how they share out their time, how they go on, what they leave, and what is refused."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import refusal, rows, script

from gravitar_dqn import campaign, checkpoint, cli, execution, files, trained, training
from gravitar_dqn.campaign import PIECE, STAGES, CampaignConfig
from gravitar_dqn.errors import UserError
from gravitar_dqn.run_dir import lock
from gravitar_dqn.telemetry import CsvLog

ALL_DONE = dict.fromkeys(STAGES, "done")
HOME = Path("runs/campaign")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Campaigns are made where the command runs."""
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> int:
    """`campaign.py` with these arguments, in this process; its exit code."""
    return cli.run(cli.campaign_command, [str(word) for word in words], "campaign.py")


def outcomes(folder: Path = HOME) -> dict[str, str]:
    return {row["stage"]: row["outcome"] for row in files.read_rows(folder / "campaign.csv")}


class Clock:
    """Time that passes only in processes."""

    now = 0.0


class FakeProcess:
    """Stands in for a process: it is over at once, and the clock says when."""

    pid = 2**30  # nobody's

    def __init__(self, clock: Clock, ends: float, returncode: int) -> None:
        self._clock, self._ends, self.returncode, self._over = clock, ends, returncode, False

    def poll(self) -> int | None:
        if self._over:
            return self.returncode
        self._clock.now += 1.0
        self._over = self._clock.now >= self._ends
        return None

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGINT
        self._over, self.returncode = True, self.returncode or 130

    def wait(self) -> None:
        self._over = True


class Processes:
    """Stands in for the processes of a campaign: writes what they would write, and lets the time pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.words: dict[str, list[list[str]]] = {name: [] for name in STAGES}
        self.seconds = {"tests": 100.0, "benchmark": 150.0, "weights": 2.0, "evaluation": 200.0, "curves": 3.0}
        self.fails: Callable[[str], str] = lambda name: ""  # the last line of a stage that fails
        monkeypatch.setattr(campaign, "monotonic", lambda: self.clock.now)
        monkeypatch.setattr(campaign, "sleep", lambda seconds: None)
        monkeypatch.setattr(campaign.processes, "start", self.start)
        monkeypatch.setattr(execution, "choose_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(training, "check_machine", lambda config: None)

    def start(self, command: Sequence[str], log: Path, *, dies_with_us: bool) -> FakeProcess:
        assert dies_with_us
        name, words, steps = log.stem, list(command)[3:], 1_000 * len(self.words["train"]) + 1_000
        self.words[name].append(words)
        if line := self.fails(name):
            log.write_text(f"much\n{line}\n")
            return FakeProcess(self.clock, self.clock.now + min(self.seconds.get(name, 9.0), 100), 2)
        log.write_text("12 passed\n")
        if name != "train":
            return FakeProcess(self.clock, self.clock.now + self.seconds[name], 0)
        run_dir = Path(words[2] if words[1] == "--resume" else words[-1 - words[::-1].index("--run-dir") + 1])
        checkpoint.save(run_dir, {}, steps, keep=9)
        before = files.wall_seconds(run_dir)
        limit = 60 * float(option(words, "total-minutes")) - before
        names = "wall_seconds,global_step,frames,num_updates,episodes,return_mean"
        wall = before + min(limit, 300.0)
        (run_dir / "metrics.csv").write_text(f"{names}\n{wall},{steps},{4 * steps},9,9,55.5\n")
        record = {"device": "Some GPU", "commit": "abc", "config": {"env": {"id": "ALE/Gravitar-v5"}}}
        (run_dir / "config.json").write_text(json.dumps(record))
        return FakeProcess(self.clock, self.clock.now + limit + 20, 0)  # the start takes time too


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def finish(processes: Processes, *words: object) -> tuple[list[float], int]:
    """Call until all has ended: seconds of each call, and the last exit code."""
    calls: list[float] = []
    while not calls or set(outcomes()) != set(STAGES) or PIECE in outcomes().values():
        before = processes.clock.now
        code = run(*words)
        calls.append(processes.clock.now - before)
        assert len(calls) < 20
    return calls, code


def option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


# ---------------------------------------------------------------- time


def test_the_time_is_used_and_no_call_is_too_long(processes: Processes, capsys: pytest.CaptureFixture[str]) -> None:
    calls, code = finish(processes)
    assert code == 0 and outcomes() == ALL_DONE
    assert max(calls) < 9 * 60 and sum(calls) <= 45 * 60 and len(calls) <= 7
    seconds = [float(row["seconds"]) for row in files.read_rows(HOME / "campaign.csv") if row["stage"] == "train"]
    assert sum(seconds) > 32 * 60, "what the tests, the benchmark and the evaluation leave"
    assert len(processes.words["train"]) >= 4
    assert all(len(processes.words[name]) == 1 for name in STAGES if name != "train")
    said = capsys.readouterr().out
    assert "end of this piece; next: train\n" in said and "the same command goes on: " in said
    assert said.endswith((HOME / "table.md").read_text() + "all stages have ended, 0 of them badly\n")


def test_the_run_goes_on_and_keeps_checkpoints_of_its_last_part(processes: Processes) -> None:
    finish(processes, "gravitar", "--seed", 5, "--settings", "agent.gamma=0.9 env.num-envs=16")
    first, *others = processes.words["train"]
    assert first[:2] == ["train", "gravitar"] and first[-2:] == ["--run-dir", "runs/campaign/gravitar__5"]
    config: Any = cli.parse_train(first[1:], "train.py")[0].config
    assert (config.seed, config.agent.gamma, config.env.num_envs) == (5, 0.9, 16)
    assert (config.dashboard, config.video_every) == ("off", 0) and config.total_steps > 10**9
    for words in others:
        assert words[:3] == ["train", "--resume", "runs/campaign/gravitar__5"]
        free = [name.partition("=")[0].removeprefix("--").replace("-", "_") for name in words[3:]]
        assert set(free) == {"checkpoint_minutes", "keep_checkpoints", "total_minutes", "device"}
    minutes = [float(option(words, "total-minutes")) for words in (first, *others)]
    assert 30 < min(minutes) <= max(minutes) < 40
    spacing = [float(option(words, "checkpoint-minutes")) for words in (first, *others)]
    kept = [int(option(words, "keep-checkpoints")) for words in (first, *others)]
    assert kept[0] == 2 and kept[-1] * spacing[-1] >= minutes[-1] / 6 and kept == sorted(kept)
    evaluated = processes.words["evaluation"][0]
    assert evaluated[:2] == ["eval", "runs/campaign/gravitar__5"]
    assert "--episodes=100" in evaluated and "--snapshots=5" in evaluated
    assert "--published" in processes.words["curves"][0]
    assert len(list(Path("runs/campaign/gravitar__5/checkpoints").glob("step_*.pt"))) == 1, "what travels is small"
    written = processes.words["weights"][0]
    assert written == ["runs/campaign/gravitar__5", "runs/campaign/weights/gravitar.safetensors"]


def test_a_run_that_reaches_its_own_end_ends_the_training(processes: Processes) -> None:
    run("gravitar", "--settings", "total-steps=1000")
    processes.fails = lambda name: (
        "error: runs/x is complete (1000 steps, 9 games): a higher" if name == "train" else ""
    )
    assert finish(processes, "gravitar", "--settings", "total-steps=1000")[1] == 0
    assert outcomes() == ALL_DONE and len(processes.words["train"]) == 2


def test_what_takes_too_long_is_cut_short_and_not_tried_for_ever(processes: Processes) -> None:
    processes.seconds |= dict.fromkeys(("tests", "benchmark", "evaluation"), 1e9)
    calls, code = finish(processes)
    assert code == 1 and max(calls) < 9 * 60
    cut = dict.fromkeys(("tests", "benchmark", "evaluation"), "cut short")
    assert outcomes() == ALL_DONE | cut
    assert len(processes.words["tests"]) == 1 and all(len(processes.words[name]) <= 2 for name in cut)
    assert "| tests | cut short | 8.5 | after 510 s; more in logs/tests.log |" in (HOME / "table.md").read_text()


def test_what_does_not_fit_into_the_rest_of_a_call_waits(processes: Processes) -> None:
    processes.seconds["tests"] = 400.0
    assert run("--minutes", 60) == 0
    assert outcomes()["tests"] == "done" and processes.words["benchmark"] == []
    assert run("--minutes", 60) == 0
    assert outcomes()["benchmark"] == "done"


def test_training_that_was_killed_counts(processes: Processes, capsys: pytest.CaptureFixture[str]) -> None:
    run("--minutes", 12)  # 720 s, of which 250 were tests and benchmark, and 108 are kept for the end
    noted = (HOME / "campaign.csv").read_text().splitlines()
    assert noted[-1].startswith("train,a piece,")
    (HOME / "campaign.csv").write_text("\n".join(noted[:-1]) + "\n")  # as a kill would have left it
    wall = files.wall_seconds(HOME / "gravitar-ram__742")
    assert wall > 250
    capsys.readouterr()
    run("--minutes", 12)
    told = re.search(r"train: started, for at most (.*) minutes", capsys.readouterr().out)
    assert told is not None and abs(60 * float(told[1]) - (720 - 250 - 108 - wall)) < 10


@pytest.mark.parametrize("name", ["tests", "evaluation"])
def test_a_stage_that_kills_every_call_is_not_begun_for_ever(
    name: str, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    def killed(stage: str) -> str:
        if stage == name:
            raise Killed
        return ""

    processes.fails = killed
    calls = 0
    while outcomes().get(name) != "cut short":
        calls += 1
        assert calls < 20
        try:
            run()
        except Killed:
            assert (HOME / "table.md").exists(), "what is known so far is kept"
    processes.fails = lambda stage: ""
    assert finish(processes)[1] == 1
    assert outcomes() == ALL_DONE | {name: "cut short"} and len(processes.words[name]) == 3


def test_a_process_that_does_not_listen_is_killed(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    monkeypatch.setattr(FakeProcess, "send_signal", lambda self, number: None)
    monkeypatch.setattr(campaign.os, "killpg", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(FakeProcess, "wait", lambda self: setattr(self, "returncode", -9))
    processes.seconds["tests"] = 1e9
    began = processes.clock.now
    run("--minutes", 30)
    assert (FakeProcess.pid, signal.SIGKILL) in killed and outcomes()["tests"] == "cut short"
    assert processes.clock.now - began < 9 * 60


# ---------------------------------------------------------------- what goes wrong


def test_a_stage_that_fails_is_noted_and_the_others_follow(processes: Processes) -> None:
    broken = {"tests": "1 failed, 3 passed in 7.12s", "benchmark": "a | b"}
    processes.fails = lambda name: broken.get(name, "")
    assert finish(processes)[1] == 1
    assert outcomes() == ALL_DONE | dict.fromkeys(broken, "failed")
    table = (HOME / "table.md").read_text()
    assert "| tests | failed | 1.7 | 1 failed, 3 passed in 7.12s; more in logs/tests.log |" in table
    assert r"| a \| b; more in logs/benchmark.log |" in table
    assert "## evaluation\n\n```\n12 passed\n```" in table
    assert run() == 1, "and it stays so"


def test_the_only_whole_checkpoint_is_not_among_those_that_have_served(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = processes.start

    def damaging(command: Sequence[str], log: Path, *, dies_with_us: bool) -> FakeProcess:
        if log.stem == "evaluation":
            next(Path().rglob("latest")).write_bytes(b"damaged")
        return start(command, log, dies_with_us=dies_with_us)

    monkeypatch.setattr(campaign.processes, "start", damaging)
    finish(processes, "--minutes", 30)
    assert outcomes()["evaluation"] == "done" and len({*Path().rglob("step_*.pt")}) > 1


@pytest.mark.parametrize("code", [-signal.SIGINT, 130, 1, 4])
def test_training_that_is_interrupted_at_any_moment_is_a_piece(
    code: int, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it imports its libraries, which may end with 1; and what could not be saved is trained once more."""
    end_interrupted_training(code, processes, monkeypatch)
    assert "train" not in {name for name, outcome in outcomes().items() if outcome == "failed"}


def end_interrupted_training(code: int, processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the campaign whose training returns `code` when it is interrupted."""
    monkeypatch.setattr(FakeProcess, "send_signal", lambda self, number: setattr(self, "returncode", code))
    start = processes.start

    def endless(command: Sequence[str], log: Path, *, dies_with_us: bool) -> FakeProcess:
        process = start(command, log, dies_with_us=dies_with_us)
        return process if log.stem != "train" else FakeProcess(processes.clock, processes.clock.now + 500, 0)

    monkeypatch.setattr(campaign.processes, "start", endless)
    run()


@pytest.mark.parametrize("code", [2, 3])
def test_a_run_that_is_interrupted_and_ends_badly_has_failed(
    code: int, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It met NaN, say: that is no piece of the training."""
    end_interrupted_training(code, processes, monkeypatch)
    assert outcomes()["train"] == "failed"


def test_a_run_that_cannot_be_trained_leaves_a_table(processes: Processes) -> None:
    processes.fails = lambda name: "error: a replay buffer of 9 does not fit" if name == "train" else ""
    assert finish(processes)[1] == 1
    skipped = dict.fromkeys(("weights", "evaluation", "curves"), "skipped")
    assert outcomes() == ALL_DONE | {"train": "failed"} | skipped
    assert "error: a replay buffer of 9 does not fit; more in logs/train.log" in (HOME / "table.md").read_text()


def test_the_link_to_the_newest_checkpoint_may_be_lost_on_the_way(processes: Processes) -> None:
    run()
    run()
    Path("runs/campaign/gravitar-ram__742/checkpoints/latest").unlink()
    Path("runs/campaign").rename("runs/elsewhere")
    run("--dir", "runs/elsewhere")
    assert processes.words["train"][-1][:3] == ["train", "--resume", "runs/elsewhere/gravitar-ram__742"]


def test_nor_are_results_lost_with_it(processes: Processes) -> None:
    while outcomes().get("train") != "done":
        run()
    for name in ("weights", "evaluation", "curves"):  # what the last call still did
        kept = [line for line in (HOME / "campaign.csv").read_text().splitlines() if not line.startswith(name)]
        (HOME / "campaign.csv").write_text("\n".join(kept) + "\n")
    (HOME / "gravitar-ram__742/checkpoints/latest").unlink()
    assert run() == 0 and outcomes() == ALL_DONE


def test_a_full_disk_ends_the_call(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CsvLog, "flush", lambda self: None)
    assert run() == 2
    assert "error: runs/campaign/campaign.csv cannot be written: is the disk full?" in capsys.readouterr().err


def test_a_run_without_its_checkpoints_does_not_start_anew(
    processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    for path in Path("runs/campaign/gravitar-ram__742/checkpoints").iterdir():
        path.unlink()
    capsys.readouterr()
    said = refusal(capsys, run())
    assert said.startswith("runs/campaign/gravitar-ram__742 has lost its checkpoints: copy them back, or another --dir")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--minutes", "50"], "minutes: 45.0 -> 50.0"),
        (["gravitar", "--seed", "1"], "preset: gravitar-ram -> gravitar; seed: 742 -> 1"),
        (["--settings", "agent.gamma=0.9", "--quick"], "settings:  -> agent.gamma=0.9; quick: False -> True"),
        (["--device", "cuda:0"], "device: auto -> cuda:0"),
    ],
)
def test_other_options_are_refused(
    changed: list[str], told: str, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--piece-minutes", 5)
    capsys.readouterr()
    before = (HOME / "campaign.json").read_text()
    said = refusal(capsys, run(*changed))
    assert said == f"runs/campaign holds a campaign with other settings, another --dir starts anew: {told}"
    assert (HOME / "campaign.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gravtar"], "unknown preset 'gravtar': did you mean gravitar?"),
        (["cartpole", "gravitar"], "unknown argument 'gravitar'"),
        (["--piece-minutes", "0"], "--piece-minutes is 0.0: it must be finite and between 0.25 and"),
        (["--minutes", "nan"], "--minutes is nan: it must be finite and between"),
        (["--seed", "-1"], "seed is -1: it must be finite and between 0 and"),
        (["--settings", "seed=3"], "--settings 'seed=3': seed is not for a campaign to change, --seed sets it"),
        (["--settings", "device=cpu"], "--settings 'device=cpu': device is not for a campaign to change"),
        (["--settings", "agent.gama=1"], "unknown option '--agent.gama=1': did you mean --agent.gamma?"),
        (["--settings", "env.id=ALE/Gravitr-v5"], "unknown game 'ALE/Gravitr-v5'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, run(*words)).startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    said = refusal(capsys, run("--dir", "mine"))
    assert said == "mine exists and is not a campaign's folder: another --dir starts anew"
    Path("mine/notes.txt").rename("mine/campaign.json")
    assert refusal(capsys, run("--dir", "mine")).startswith("mine/campaign.json cannot be read: ")
    assert Path("mine/campaign.json").read_text() == "x"


@pytest.mark.parametrize("preset", ["gravitar", "gravitar-ram", "cartpole", "notebook", "randal", "randal-cartpole"])
def test_every_preset_has_a_quick_form(preset: str) -> None:
    config: Any = cli.parse_train(campaign.arguments_of(CampaignConfig(preset, quick=True)), "train.py")[0].config
    assert config.env.num_envs <= 4 and config.preset == preset


# ---------------------------------------------------------------- with real processes


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def trained_seconds(run_dir: Path) -> float:
    path = run_dir / "metrics.csv"
    found = rows(path) if path.exists() else []
    return found[-1]["wall_seconds"] if found else 0.0


def free(run_dir: Path) -> bool:
    """Whether no process trains in it."""
    try:
        with lock(run_dir):
            return True
    except UserError:
        return False


@pytest.mark.slow
def test_a_campaign_that_is_killed_and_stopped_comes_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    run_dir = folder / "cartpole__742"
    words = ["cartpole", "--dir", "c", "--minutes", 3, "--quick", "--device", "cpu"]
    log = folder / "logs" / "train.log"
    folder.mkdir()
    noted = "stage,outcome,seconds,global_step,said\nbenchmark,failed,0.0,0,left out since it takes a minute\n"
    asked = {"preset": "cartpole", "minutes": 3.0, "seed": 742, "settings": "", "quick": True, "device": "cpu"}
    (folder / "campaign.json").write_text(json.dumps(asked))
    (folder / "campaign.csv").write_text(noted)

    process = script("campaign.py", *words, cwd=tmp_path)
    wait_for(lambda: trained_seconds(run_dir) > 1, process)
    process.kill()
    process.communicate()
    wait_for(lambda: free(run_dir))
    assert log.read_text().splitlines()[-1].startswith("stopped at step "), "its run saved, and did not outlive it"
    first = checkpoint.load(run_dir)["agent"]["clocks"]["global_step"]

    process = script("campaign.py", *words, cwd=tmp_path)
    before = trained_seconds(run_dir)
    wait_for(lambda: trained_seconds(run_dir) > before + 0.5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.search(r"stopped; next: train\nthe same command goes on: .*campaign\.py", out)
    second = checkpoint.load(run_dir)["agent"]["clocks"]["global_step"]
    assert second > first and "train --resume c/cartpole__742" in log.read_text()

    with (folder / "campaign.csv").open("a") as file:  # the time for training is over
        file.write("train,a piece,160.0,5,much was learned\n")
    out, err = script("campaign.py", *words, cwd=tmp_path).communicate(timeout=90)
    assert err == "" and "| tests | skipped | 0.0 | no CUDA device |" in out
    assert outcomes(folder) == ALL_DONE | {"tests": "skipped", "benchmark": "failed"}, out
    agent = trained.read(folder / "weights" / "cartpole.safetensors")
    assert agent.global_step == second and agent.config.preset == "cartpole"
    assert (folder / "table.md").read_text() in out and "epsilon              0.001" in out
    assert (folder / "curves.png").exists()
    for path in (*folder.rglob("*.json"), *folder.rglob("*.csv"), *folder.rglob("*.md"), *folder.rglob("*.log")):
        text = path.read_text()
        assert str(tmp_path) not in text and "\n$ /" not in f"\n{text}", f"{path} tells where somebody lives"

"""Campaigns: how they share out their time, how they go on, what they leave, and what is refused."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import ROOT, refusal, rows, script

from gravitar_dqn import campaign, campaign_plan, checkpoint, cli, execution, snapshots, trained
from gravitar_dqn.campaign_plan import STAGES, CampaignConfig, Stage
from gravitar_dqn.errors import UserError
from gravitar_dqn.run_dir import lock

ALL_DONE = dict.fromkeys(STAGES, "done")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Campaigns are made where the command runs."""
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> int:
    """`campaign.py` with these arguments, in this process; its exit code."""
    return cli.run(cli.campaign_command, [str(word) for word in words], "campaign.py")


def outcomes(folder: Path = Path("runs/campaign")) -> dict[str, str]:
    return {name: stage.outcome for name, stage in campaign_plan.load(folder / "campaign.json").stages.items()}


class Processes:
    """Stands in for the processes of a campaign: writes what they would write, and lets the time pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.words: dict[str, list[list[str]]] = {name: [] for name in STAGES}
        self.seconds = {"tests": 100.0, "benchmark": 150.0, "evaluation": 200.0, "curves": 3.0}
        self.fails: Callable[[str], str] = lambda name: ""  # the last line of a stage that fails
        self.last_line = "12 passed"
        self.steps = 0
        monkeypatch.setattr(campaign, "monotonic", lambda: self.now)
        monkeypatch.setattr(campaign.processes, "age", lambda: 0.0)
        monkeypatch.setattr(campaign.Campaign, "_process", lambda *given: self.process(*given))
        monkeypatch.setattr(execution, "choose_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(trained, "from_run", lambda run_dir: run_dir)
        monkeypatch.setattr(trained, "write", lambda agent, path: None)

    def process(
        self, owner: Any, stage: Stage, name: str, command: Sequence[str], seconds: float, cwd: Path | None = None
    ) -> str:
        words = list(command)[3:]
        self.words[name].append(words)
        owner._fresh = False
        took = min(self.seconds.get(name, seconds), seconds)
        self.now += took
        stage.seconds += took
        log = owner._log(name)
        if line := self.fails(name):
            log.write_text(f"much\n{line}\n")
            return "failed"
        if name == "train":
            run_dir = Path(words[2] if words[1] == "--resume" else words[-1])
            self.train(run_dir, took)
            log.write_text("stopped at step 1, saved\n")
            return "cut short"
        log.write_text(f"{self.last_line}\n")
        return "cut short" if took < self.seconds[name] else "done"

    def train(self, run_dir: Path, seconds: float) -> None:
        before = rows(run_dir / "metrics.csv")[-1]["wall_seconds"] if (run_dir / "metrics.csv").exists() else 0.0
        self.steps += 1_000
        checkpoint.save(run_dir, {}, self.steps, keep=9)
        names = "wall_seconds,global_step,frames,num_updates,episodes,return_mean"
        wall = before + seconds - 20  # the start takes time too
        (run_dir / "metrics.csv").write_text(f"{names}\n{wall},{self.steps},{4 * self.steps},9,9,55.5\n")
        record = {"device": "Some GPU", "commit": "abc", "config": {"env": {"id": "ALE/Gravitar-v5"}}}
        (run_dir / "config.json").write_text(json.dumps(record))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def finish(processes: Processes, *words: object) -> tuple[list[float], int]:
    """Call until all has ended: seconds of each call, and the last exit code."""
    calls = []
    while not calls or campaign_plan.load(Path("runs/campaign/campaign.json")).next is not None:
        before = processes.now
        code = run(*words)
        calls.append(processes.now - before)
        assert len(calls) < 20
    return calls, code


def option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


# ---------------------------------------------------------------- time


def test_the_time_is_used_and_no_call_is_too_long(processes: Processes, capsys: pytest.CaptureFixture[str]) -> None:
    calls, code = finish(processes)
    assert code == 0 and outcomes() == ALL_DONE
    assert max(calls) < 9 * 60 and sum(calls) <= 45 * 60 and len(calls) <= 7
    stages = campaign_plan.load(Path("runs/campaign/campaign.json")).stages
    assert stages["train"].seconds > 32 * 60, "what the tests, the benchmark and the evaluation leave"
    assert len(processes.words["train"]) == stages["train"].tries >= 4
    assert all(len(processes.words[name]) == 1 for name in ("tests", "benchmark", "evaluation", "curves"))
    said = capsys.readouterr().out
    assert "end of this piece; next: train, " in said and "the same command goes on: " in said
    assert said.endswith(Path("runs/campaign/table.md").read_text())


def test_the_run_goes_on_and_keeps_checkpoints_only_of_its_last_part(processes: Processes) -> None:
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
    kept = [int(option(words, "keep-checkpoints")) for words in (first, *others)]
    assert kept[0] == 2 and kept[-1] == 9 and kept == sorted(kept)
    minutes = [float(option(words, "total-minutes")) for words in (first, *others)]
    assert 30 < min(minutes) <= max(minutes) < 40
    evaluated = processes.words["evaluation"][0]
    assert evaluated[:3] == ["eval", "runs/campaign/gravitar__5", "--episodes=100"] and "--snapshots=5" in evaluated
    assert "--published" in processes.words["curves"][0]
    assert len(list(Path("runs/campaign/gravitar__5/checkpoints").glob("step_*.pt"))) == 1, "what travels is small"


def test_a_run_that_reaches_its_own_end_ends_the_training(processes: Processes) -> None:
    run("gravitar", "--settings", "total-steps=1000")
    processes.fails = lambda name: (
        "error: runs/x is complete (1000 steps, 9 games): a higher" if name == "train" else ""
    )
    assert finish(processes, "gravitar", "--settings", "total-steps=1000")[1] == 0
    assert outcomes() == ALL_DONE and len(processes.words["train"]) == 2


def test_a_run_without_snapshots_was_evaluated_all_the_same(processes: Processes) -> None:
    Path("run/checkpoints").mkdir(parents=True)
    checkpoint.save(Path("run"), {"tracker": {"wall_seconds": 9.0}}, 1)
    with pytest.raises(UserError) as refused:
        snapshots.evaluate_snapshots(Path("run"), 3, episodes=1, epsilon=0.0, seed=1, device=torch.device("cpu"))
    processes.fails = lambda name: f"error: {refused.value}" if name == "evaluation" else ""
    assert finish(processes)[1] == 0
    assert (
        "| evaluation | done | 3.3 | gravitar-ram__742/eval.json; no snapshots |"
        in Path("runs/campaign/table.md").read_text()
    )


def test_what_outlasts_a_call_is_cut_short_and_not_tried_for_ever(processes: Processes) -> None:
    processes.seconds |= dict.fromkeys(("tests", "benchmark", "evaluation"), 1e9)
    calls, code = finish(processes)
    assert code == 1 and max(calls) < 9 * 60
    cut = dict.fromkeys(("tests", "benchmark", "evaluation"), "cut short")
    assert outcomes() == ALL_DONE | cut
    assert [len(processes.words[name]) for name in cut] == [1, 1, 1]
    assert (
        "| tests | cut short | 8.5 | after 510 s; more in logs/tests.log |"
        in Path("runs/campaign/table.md").read_text()
    )


def test_what_does_not_fit_into_the_rest_of_a_call_waits(processes: Processes) -> None:
    processes.seconds["tests"] = 400.0
    assert run("--minutes", 60) == 0
    assert outcomes()["tests"] == "done" and processes.words["benchmark"] == []
    assert run("--minutes", 60) == 0
    assert outcomes()["benchmark"] == "done"


def test_a_stage_that_was_killed_twice_is_not_begun_again(processes: Processes) -> None:
    run()
    state = campaign_plan.load(Path("runs/campaign/campaign.json"))
    state.stages["tests"] = Stage(tries=2)
    state.save(Path("runs/campaign"))
    processes.words["tests"].clear()
    assert finish(processes)[1] == 1
    assert outcomes() == ALL_DONE | {"tests": "cut short"} and processes.words["tests"] == []


# ---------------------------------------------------------------- what goes wrong


def test_a_stage_that_fails_is_noted_and_the_others_follow(processes: Processes) -> None:
    broken = {"tests": "1 failed, 3 passed in 7.12s", "benchmark": "a | b"}
    processes.fails = lambda name: broken.get(name, "")
    assert finish(processes)[1] == 1
    assert outcomes() == ALL_DONE | dict.fromkeys(broken, "failed")
    table = Path("runs/campaign/table.md").read_text()
    assert "| tests | failed | 1.7 | 1 failed, 3 passed in 7.12s; more in logs/tests.log |" in table
    assert r"| benchmark | failed | 2.5 | a \| b; more in logs/benchmark.log |" in table
    assert run() == 1, "and it stays so"


def test_a_run_that_cannot_be_trained_leaves_a_table(processes: Processes) -> None:
    processes.fails = lambda name: "error: a replay buffer of 9 does not fit" if name == "train" else ""
    assert finish(processes)[1] == 1
    assert outcomes() == ALL_DONE | {
        "train": "failed",
        **dict.fromkeys(("weights", "evaluation", "curves"), "skipped"),
    }
    assert (
        "error: a replay buffer of 9 does not fit; more in logs/train.log" in Path("runs/campaign/table.md").read_text()
    )


def test_the_link_to_the_newest_checkpoint_may_be_lost_on_the_way(processes: Processes) -> None:
    run()
    run()
    Path("runs/campaign/gravitar-ram__742/checkpoints/latest").unlink()
    Path("runs/campaign").rename("runs/elsewhere")
    run("--dir", "runs/elsewhere")
    assert processes.words["train"][-1][:3] == ["train", "--resume", "runs/elsewhere/gravitar-ram__742"]


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
    before = Path("runs/campaign/campaign.json").read_text()
    said = refusal(capsys, run(*changed))
    assert said == f"runs/campaign holds a campaign with other options, another --dir starts anew: {told}"
    assert Path("runs/campaign/campaign.json").read_text() == before


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
    Path("mine/campaign.json").write_text('{"minutes": 3}')
    assert refusal(capsys, run("--dir", "mine")).startswith("mine/campaign.json is not a campaign's, or of another")


@pytest.mark.parametrize("preset", ["gravitar", "gravitar-ram", "cartpole", "notebook", "randal", "randal-cartpole"])
def test_every_preset_has_a_quick_form(preset: str) -> None:
    config: Any = cli.parse_train(campaign_plan.arguments_of(CampaignConfig(preset, quick=True)), "train.py")[0].config
    assert config.env.num_envs <= 4 and config.preset == preset


# ---------------------------------------------------------------- with real processes


def test_a_process_knows_when_it_was_started() -> None:
    code = "import time; time.sleep(0.5); from gravitar_dqn.processes import age; print(age())"
    began = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    assert 0.5 <= float(told) <= time.monotonic() - began + 0.02


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


def test_a_campaign_that_is_killed_and_stopped_comes_to_its_end(tmp_path: Path) -> None:
    options = CampaignConfig("cartpole", tmp_path / "c", minutes=3, quick=True, device="cpu")
    state = campaign_plan.claim(options)
    state.stages["benchmark"] = Stage("failed", said="left out, it takes a minute")
    state.save(options.dir)
    words = ["cartpole", "--dir", options.dir, "--minutes", 3, "--quick", "--device", "cpu"]
    log = options.dir / "logs" / "train.log"

    process = script("campaign.py", *words)
    wait_for(lambda: trained_seconds(options.run_dir) > 1, process)
    process.kill()
    process.communicate()
    wait_for(lambda: free(options.run_dir))
    assert log.read_text().splitlines()[-1].startswith("stopped at step "), "its run saved, and did not outlive it"
    first = checkpoint.load(options.run_dir)["agent"]["clocks"]["global_step"]
    assert 1 < campaign_plan.load(options.dir / "campaign.json").seconds < 25

    process = script("campaign.py", *words)
    before = trained_seconds(options.run_dir)
    wait_for(lambda: trained_seconds(options.run_dir) > before + 0.5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert re.search(r"stopped; next: train, 2\.[0-9] minutes are left\nthe same command goes on: .*campaign\.py", out)
    second = checkpoint.load(options.run_dir)["agent"]["clocks"]["global_step"]
    assert second > first and f"train --resume {options.run_dir}" in log.read_text()

    state = campaign_plan.load(options.dir / "campaign.json")
    state.seconds = 60 * options.minutes - options.reserve  # the time for training is over
    state.save(options.dir)
    out, err = script("campaign.py", *words).communicate(timeout=90)
    assert err == "" and "| tests | skipped | 0.0 | no CUDA device |" in out
    assert outcomes(options.dir) == ALL_DONE | {"tests": "skipped", "benchmark": "failed"}, out
    agent = trained.read(options.dir / "weights" / "cartpole.safetensors")
    assert agent.global_step == second and agent.config.preset == "cartpole"
    assert (options.dir / "table.md").read_text() in out and "| games, epsilon | 4, 0.001 |" in out
    assert (options.dir / "curves.png").exists()
    assert str(tmp_path) not in (options.dir / "campaign.json").read_text()

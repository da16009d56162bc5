"""The command line: every mistake gets one clear line and exit code 2, and leaves nothing behind."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import CARTPOLE, QUIET, RANDAL_CARTPOLE, ROOT, SMALL, refusal, rows, train

from gravitar_dqn import training
from gravitar_dqn.cli import commands
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.folder import load_run
from gravitar_dqn.runtime import memory

ONLY_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders are made where the command runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of 60 steps."""
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", "run") == 0
    capsys.readouterr()
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MISTAKES = {
    "preset": (["gravtar"], "unknown preset 'gravtar': did you mean gravitar? there are gravitar, breakout, "),
    "game": (["--env.id", "ALE/Gravitr-v5"], "unknown game 'ALE/Gravitr-v5': .*Did you mean: `Gravitar`?"),
    "game without its parts": (["--env.id", "Humanoid-v2"], "cannot make Humanoid-v2: "),
    "game of another kind": (["--env.id", "Pendulum-v1"], "Pendulum-v1 has .* an ALE game, or one with a vector"),
    "device": (["cartpole", "--device", "tpu"], "unknown device 'tpu': auto, cpu, cuda or cuda:N"),
    "kind of device": (["cartpole", "--device", "meta"], "device 'meta' is not supported: auto, cpu, cuda or cuda:N"),
    "graphs on a CPU": (["cartpole", "--device", "cpu", "--execution", "graphs"], "--execution graphs needs a CUDA"),
    "option": (["cartpole", "--sed", "3"], "unknown option '--sed': did you mean --seed?"),
    "nested option": (["cartpole", "--env.num_envz=3"], "unknown option '--env.num_envz=3': did you mean --env.num-en"),
    "option like none": (["cartpole", "--zzzzzzzz"], "unknown option '--zzzzzzzz': train.py --help lists all"),
    "argument": (["cartpole", "breakfast"], "unknown argument 'breakfast': train.py --help lists all"),
    "another preset's setting": (
        ["--rnd.init-steps", "100"],
        "--rnd.init-steps is a setting of other presets, which come first: train.py randal --rnd.init-steps",
    ),
    "pixel control of vectors": (
        ["randal", "--env.id", "CartPole-v1", "--env.num-envs", "1"],
        "pixel control needs pictures, not numbers: the preset randal-cartpole",
    ),
    "second preset": (["cartpole", "breakout"], "the preset comes first: train.py breakout [options]"),
    "option without its group": (
        ["--learning-rate", "1"],
        "unknown option '--learning-rate': did you mean --agent.learning-rate or --rnd.learning-rate?",
    ),
    "typo without its group": (["--gama", "1"], "unknown option '--gama': did you mean --agent.gamma?"),
    "typo in one group of two": (["--rnd.learning-rat", "1"], ".*did you mean --rnd.learning-rate?"),
    "switch without its group": (
        ["--no-double-q"],
        "unknown option '--no-double-q': did you mean --agent.no-double-q?",
    ),
    "another group": (["--agent.num-envs", "1"], ".*: did you mean --env.num-envs?"),
    "end of it": (["cartpole", "--envs", "1"], ".*'--envs': did you mean --env.num-envs?"),
    "end of two": (["--steps", "1"], ".*'--steps': did you mean --total-steps or --agent.gradient-steps?"),
    "nothing like it in the group": (["cartpole", "--agent.zzz", "1"], ".*'--agent.zzz': train.py --help lists all"),
    "preset as an option": (["--preset", "randal"], "the preset comes first: train.py randal [options]"),
    "preset after =": (["--preset=ppo"], "the preset comes first: train.py ppo [options]"),
    "no value": (["cartpole", "--seed"], "Missing value for argument '--seed'"),
    "word for a number": (["cartpole", "--seed", "x"], "Error parsing --seed: 'x' is no whole number, such as 1000000"),
    "fraction": (["cartpole", "--agent.batch-size", "1.5"], "Error parsing --agent.batch-size: '1.5' is no whole num"),
    "tiny power": (["cartpole", "--total-steps", "1e-3"], ".*'1e-3' is no whole number, such as 1000000, 1_000_000 or"),
    "huge power": (["cartpole", "--total-steps", "1e999999999"], ".*'1e999999999' is no whole number"),
    "choice": (["cartpole", "--precision", "fp16"], ".*'fp16' .*--precision.*('auto', 'fp32', 'bf16')"),
    "switch": (["cartpole", "--agent.double-q", "maybe"], "unknown argument 'maybe'"),
    "number too low": (["cartpole", "--env.num-envs", "0"], "env.num_envs is 0: it must be finite and at least 1"),
    "number too high": (["cartpole", "--env.sticky-actions", "2"], "env.sticky_actions is 2.0: .* between 0 and 1"),
    "no number": (["cartpole", "--agent.gamma", "nan"], "agent.gamma is nan: it must be finite and between 0 and 1"),
    "seed": (["cartpole", "--seed", "9" * 30], "seed is 9+: it must be finite and between 0 and 1073741824"),
    "settings at odds": (["cartpole", "--agent.learning-starts", "50000"], ".*learning would never begin"),
    "replay that does not fit": (
        ["cartpole", "--agent.buffer-size", "1000000000000"],
        "a replay buffer of 1000000000000 transitions needs .* GiB, but cpu .*: --agent.buffer-size [0-9]+ would fit",
    ),
    "dashboard": (["cartpole", "--dashboard", "http://127.0.0.1:99999"], "--dashboard: .*is not a server's address"),
    "resume without a folder": (["cartpole", "--resume"], "Missing value for argument '--resume'"),
    "resume of an empty word": (["cartpole", "--resume="], ". is not a run's folder: it has no config.json"),
    "resume of nothing": (["--resume", "nowhere"], "nowhere is not a run's folder: it has no config.json"),
    "folder inside a file": (["cartpole", "--run-dir", "/dev/null/run"], ".*/dev/null/run"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = [] if "--dashboard" in words or words[-1] in ("--seed", "--resume") else ["--dashboard", "off"]
    said = refusal(capsys, train(*words, *quiet))
    pattern = re.escape(expected).replace(r"\.\*", ".*").replace(r"9\+", "9+").replace(r"\[0\-9\]\+", "[0-9]+")
    assert re.match(pattern, said), said
    assert contents(tmp_path) == {} and list(tmp_path.iterdir()) == []


@ONLY_CPU
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_here_is_told(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, train("cartpole", "--device", device, "--dashboard", "off"))
    assert said == f"device '{device}' is not here (0 CUDA devices): --device cpu works"
    assert list(tmp_path.iterdir()) == []


def test_the_buffer_that_would_fit_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000_000)
    words = ["cartpole", *QUIET, "--total-steps", 60, "--run-dir", "run", "--agent.buffer-size"]
    said = refusal(capsys, train(*words, 1_000_000))
    # 16 bytes of observation and 17 with it; a tenth of the memory stays free: 9 000 000 / 33 = 272 727
    assert said == (
        "a replay buffer of 1000000 transitions needs 0.0 GiB, but cpu has 0.0 GiB free: "
        "--agent.buffer-size 272000 would fit"
    )
    assert list(tmp_path.iterdir()) == []
    assert train(*words, 272_000) == 0
    assert "replay buffer: 272000 transitions of 33 bytes, 0.01 GiB on cpu\n" in capsys.readouterr().err


def test_a_run_folder_that_exists_is_left_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run_dir)
    said = refusal(capsys, train(*CARTPOLE, "--run-dir", run_dir))
    assert said == (
        f"{run_dir} exists: --resume {run_dir} resumes it, as does this command with --resume auto; "
        "another --run-dir starts anew"
    )
    assert contents(run_dir) == before


def test_a_file_in_place_of_the_run_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    assert "notes exists: " in refusal(capsys, train(*CARTPOLE, "--run-dir", "notes"))
    assert contents(tmp_path) == {"notes": b"mine"}


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train(*CARTPOLE, "--total-steps", 20, "--run-dir", "run") == 0
    assert (tmp_path / "run" / "config.json").exists()


def test_without_a_run_folder_one_is_made_by_its_name(tmp_path: Path) -> None:
    assert train(*CARTPOLE, "--total-steps", 20, "--seed", 5) == 0
    (home,) = (tmp_path / "runs").iterdir()
    assert home.name.startswith("CartPole-v1__cartpole__5__20")
    config = load_run(home)
    assert (config.preset, config.seed, config.total_steps) == ("cartpole", 5, 20)
    about = json.loads((home / "config.json").read_text())
    assert set(about["versions"]) >= {"python", "torch", "numpy", "gymnasium", "ale-py"}
    assert about["device"] and about["precision"] == "fp32" and "commit" in about


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of_another_shape(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    for weights in (state["agent"]["policy"], state["agent"]["q_network"]):
        for name in list(weights):
            weights[name] = torch.zeros([size + 1 for size in weights[name].shape])
    torch.save(state, path)


def of_another_agent(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["agent"]["target_network"], state["agent"]["clocks"]
    torch.save(state, path)


def not_ours(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def no_checkpoint_at_all(path: Path) -> None:
    path.write_text("step,score\n")


BROKEN = {
    cut: "is not a whole checkpoint",
    of_another_shape: "does not fit",
    not_ours: "is not a checkpoint of this program",
    no_checkpoint_at_all: "is not a whole checkpoint",
}


def only_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint, when the others are gone."""
    *others, newest = sorted(checkpoint.folder(run_dir).glob("step_*.pt"))
    for path in others:
        path.unlink()
    return newest


@pytest.mark.parametrize(("spoil", "expected"), [*BROKEN.items(), (of_another_agent, "does not fit")])
def test_a_broken_checkpoint_is_refused_and_the_run_left_alone(
    spoil: Callable[[Path], None], expected: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(only_checkpoint(run_dir))
    before = contents(run_dir)
    said = refusal(capsys, train("--resume", run_dir, "--total-steps", 99))
    assert expected in said and str(run_dir) in said
    assert contents(run_dir) == before


@pytest.mark.parametrize(("spoil", "expected"), BROKEN.items())
@pytest.mark.parametrize("command", [commands.evaluate_command, commands.watch_command])
def test_a_broken_checkpoint_is_neither_evaluated_nor_watched(
    command: Any, spoil: Callable[[Path], None], expected: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(only_checkpoint(run_dir))
    before = contents(run_dir.parent)
    said = refusal(capsys, commands.run(command, [str(run_dir)], "x.py"))
    assert expected.replace("does not fit", "do not fit") in said
    assert contents(run_dir.parent) == before


def test_a_run_without_a_checkpoint_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoint.folder(run_dir).iterdir():
        path.unlink()
    before = contents(run_dir)
    for command, words in (
        (commands.train_command, ["--resume", str(run_dir)]),
        (commands.evaluate_command, [str(run_dir)]),
        (commands.watch_command, [str(run_dir)]),
    ):
        said = refusal(capsys, commands.run(command, words, "x.py"))
        assert said == f"{run_dir} has no checkpoint yet: start the run again in another folder"
    assert contents(run_dir) == before


@pytest.mark.parametrize("command", [commands.evaluate_command, commands.watch_command])
def test_only_a_run_is_evaluated_or_watched(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for words, expected in (
        (["folder"], "folder is not a run's folder, and there is none in it"),
        (["nowhere"], "nowhere is no run: name a run's folder, one in runs, or a preset"),
        ([], "one agent is needed: x.py RUN_DIR, or x.py --pretrained NAME"),
        (["folder", "--pretrained", "x"], "one agent is needed: x.py RUN_DIR, or x.py --pretrained NAME"),
        (["folder", "--episodes", "0"], "--episodes is 0: it must be finite and at least 1"),
        (["folder", "--epsilon", "nan"], "--epsilon is nan: it must be finite and between 0 and 1"),
        (["folder", "--seed", "-1"], "--seed is -1: it must be finite and between 0 and 1073741824"),
        (["folder", "--episode", "3"], "unknown option '--episode': did you mean --episodes?"),
    ):
        assert expected in refusal(capsys, commands.run(command, words, "x.py"))
    assert contents(tmp_path) == {}


def test_an_evaluation_on_a_device_that_does_not_exist_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_dir), "--device", "tpu"]
    assert refusal(capsys, commands.run(commands.evaluate_command, words, "x.py")).startswith("unknown device 'tpu'")


def test_a_resume_refuses_changed_settings_and_tells_them(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run_dir)
    said = refusal(capsys, train("--resume", run_dir, "--agent.gamma", 0.9, "--seed", 3, "--total-steps", 99))
    changes = "seed: 742 -> 3; agent.gamma: 0.99 -> 0.9"
    assert said == f"{run_dir} was started with other settings, it cannot go on: {changes}"
    said = refusal(capsys, train("breakout", f"--resume={run_dir}"))
    assert said == f"{run_dir} was started with the preset cartpole, not breakout: leave the preset out"
    assert contents(run_dir) == before


def test_a_resume_takes_no_other_folder(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, train("--resume", run_dir, "--run-dir", "elsewhere"))
    assert said == "--resume goes on in its own folder: leave --run-dir out"


def test_a_complete_run_is_told_how_to_go_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run_dir)
    games = len(rows(run_dir / "episodes.csv"))
    said = refusal(capsys, train("--resume", run_dir))
    assert said == (
        f"{run_dir} is complete (60 steps, {games} games): "
        "a higher --total-steps, --total-episodes or --total-minutes goes on"
    )
    assert contents(run_dir) == before


def test_a_run_ends_after_its_minutes_those_before_a_resume_included(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = Path("run")
    assert train(*CARTPOLE, "--total-minutes", 0.01, "--run-dir", run_dir) == 0
    steps, games = check_minutes(run_dir, 0.01), len(rows(run_dir / "episodes.csv"))
    assert f"done: {steps} steps, {games} games, saved in run" in capsys.readouterr().err

    said = refusal(capsys, train("--resume", run_dir))
    assert said.startswith(f"run is complete ({steps} steps, ") and said.endswith(" or --total-minutes goes on")

    assert train("--resume", run_dir, "--total-minutes", 0.015) == 0
    assert check_minutes(run_dir, 0.015) > steps


def check_minutes(run_dir: Path, minutes: float) -> int:
    """Assert that a run trained this long, by its checkpoint and its metrics; its steps."""
    state = checkpoint.load(run_dir)
    assert 60 * minutes <= state["tracker"]["wall_seconds"]
    last = rows(run_dir / "metrics.csv")[-1]
    assert last["wall_seconds"] == pytest.approx(60 * minutes, abs=0.5)
    assert last["global_step"] == state["agent"]["clocks"]["global_step"]
    return int(last["global_step"])


def test_a_run_keeps_as_many_checkpoints_as_asked_for() -> None:
    words = ["--total-minutes", 0.01, "--checkpoint-minutes", 0.001, "--keep-checkpoints", 4]
    assert train(*CARTPOLE, *words, "--run-dir", "run") == 0
    assert len(list(Path("run/checkpoints").glob("step_*.pt"))) == 4


def test_a_resume_may_change_free_settings(run_dir: Path) -> None:
    words = ["--total-steps", 90, "--log-seconds", 0, "--checkpoint-minutes", 7, "--checkpoint-replay"]
    assert train("--resume", run_dir, *words) == 0
    config = load_run(run_dir)
    assert (config.total_steps, config.log_seconds, config.checkpoint_replay) == (90, 0, True)
    steps = [row["global_step"] for row in rows(run_dir / "metrics.csv")]
    assert sorted(set(steps))[-30:] == list(range(61, 91))  # the step of a reset is a row, but counts no step


def test_a_full_disk_at_the_start_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **facts: object) -> None:
        raise OSError(28, "No space left on device")

    before = training.write_config
    monkeypatch.setattr(training, "write_config", full)
    said = refusal(capsys, train(*CARTPOLE, "--run-dir", "run"))
    assert said == "the run's folder run cannot be written: No space left on device"
    assert list(contents(tmp_path)) == []
    monkeypatch.setattr(training, "write_config", before)
    assert train(*CARTPOLE, "--total-steps", 20, "--run-dir", "run") == 0, "the name is free again"


def test_a_table_that_cannot_be_written_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "eval.tmp").mkdir()
    words = [str(run_dir), "--episodes", "1", "--device", "cpu"]
    assert commands.run(commands.evaluate_command, words, "x.py") == 2
    assert re.fullmatch(r"error: .*Is a directory.*\n", capsys.readouterr().err)
    assert not (run_dir / "eval.json").exists()


def test_a_full_disk_at_a_checkpoint_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, failures = torch.save, []

    def full(state: Any, file: Any) -> None:
        if state["agent"]["clocks"]["global_step"] in (0, 60):  # there is room again at the end
            save(state, file)
        else:
            failures.append(file.write_bytes(b"half"))
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", "run", "--checkpoint-minutes", 0.0001) == 0
    said = capsys.readouterr().err
    assert failures
    assert "warning: checkpoint not written: [Errno 28] No space left on device; the one of step 0 stays" in said
    assert checkpoint.load(tmp_path / "run")["agent"]["clocks"]["global_step"] == 60
    assert not list(tmp_path.rglob("*.tmp"))


def test_interrupting_before_the_run_begins_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: object, prog: object) -> int:
        raise KeyboardInterrupt

    assert commands.run(interrupted, [], "x.py") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_installed_command_lists_its_commands(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gravitar-dqn", *words])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 0
    assert f"{{{'|'.join(commands.COMMANDS)}}}" in capsys.readouterr().out


def test_the_installed_command_names_an_unknown_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gravitar-dqn", "trian"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert refusal(capsys, int(stopped.value.code or 0)).startswith("unknown command 'trian': did you mean train? ")


def test_the_installed_command_tells_its_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gravitar-dqn", "--version"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 0
    assert re.match(r"gravitar-dqn \d+\.\d+\.\d+( \S+)?\n$", capsys.readouterr().out)


@pytest.mark.parametrize("script", ["evaluate", "benchmark"])
def test_the_installed_command_knows_the_names_of_the_scripts(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (ROOT / "scripts" / f"{script}.py").exists()
    monkeypatch.setattr(sys, "argv", ["gravitar-dqn", script, "--nonsense"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert refusal(capsys, int(stopped.value.code or 0)).startswith("unknown option '--nonsense'")


def test_help_names_presets_and_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, default in (("gravitar", "ALE/Gravitar-v5"), ("notebook", "Gravitar-v0"), ("cartpole", "CartPole-v1")):
        assert train(preset, "--help") == 0
        text = capsys.readouterr().out
        assert f"The defaults below are those of {preset}." in text
        assert all(word in text for word in (default, "notebook", "--agent.buffer-size", "--run-dir", "--resume"))


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "watch.py"])
def test_help_answers_within_a_second(name: str) -> None:
    """Of the processor's time, the best of a few: the machine may be busy."""
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
        done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "usage: " + name in done.stdout and done.stderr == ""
        if best < 1.0:
            break
    assert best < 1.0


def test_help_loads_neither_torch_nor_the_games() -> None:
    code = (
        "import sys, atexit\n"
        "from gravitar_dqn.cli import commands\n"
        "atexit.register(lambda: print('loaded', *sys.modules))\n"
        "commands.run(commands.train_command, ['notebook', '--help'], 'train.py')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded")[2].split())
    assert "gravitar_dqn.config" in loaded
    assert loaded & {"torch", "gymnasium", "ale_py", "numpy", "cv2"} == set()


def test_a_run_ends_after_its_games_or_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*CARTPOLE, "--total-episodes", 3, "--run-dir", "a") == 0
    assert len(rows(Path("a/episodes.csv"))) == 3
    assert train("cartpole", *SMALL, *QUIET, "--env.num-envs", 4, "--total-steps", 60, "--run-dir", "b") == 0
    assert 60 <= rows(Path("b/metrics.csv"))[-1]["global_step"] < 64
    assert "stopped" not in capsys.readouterr().err


@pytest.mark.parametrize("word", ["1000000", "1_000_000", "1e6", "1E6", "1.0e6", "+1e6"])
def test_numbers_are_read_as_people_write_them(word: str) -> None:
    arguments, _ = commands.parse_train(["cartpole", "--total-steps", word, "--env.num-envs", "1e1"], "train.py")
    assert (arguments.config.total_steps, arguments.config.env.num_envs) == (1_000_000, 10)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--env.id", "Gravitar"], "unknown game 'Gravitar': did you mean ALE/Gravitar-v5?"),
        (["--seed", "1", "cartpole"], "the preset comes first: train.py cartpole"),
        (["cartpole", "gravitar"], "the preset comes first"),
    ],
)
def test_a_beginners_mistake_is_told_the_right_way(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words, "--dashboard", "off", "--run-dir", "run") == 2
    assert hint in capsys.readouterr().err
    assert not Path("run").exists()


def test_torch_takes_as_many_threads_as_asked_for(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert train("--resume", run_dir, "--total-steps", 70, "--threads", 3) == 0, "it is free to change"
    assert train("--resume", run_dir, "--total-steps", 80, "--threads", 0) == 0
    assert asked == [3]


def test_profile_prints_at_the_end_where_the_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*CARTPOLE, "--total-steps", 200, "--run-dir", "run", "--profile") == 0
    told = capsys.readouterr().err
    table = told[told.index("where the time went, 200 steps:") :].splitlines()
    assert sorted(line.split()[0] for line in table[1:6]) == ["act", "emulate", "learn", "report", "store"]
    assert told.splitlines()[-1].startswith("done: 200 steps")


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ([*CARTPOLE, "--total-steps", 50], "the run ends after 50 steps and learns nothing: learning begins after 50"),
        ([*CARTPOLE, "--total-steps", 60], None),
        (
            [*RANDAL_CARTPOLE, "--env.id", "ALE/Pong-v5", "--env.obs-type", "ram", "--total-steps", 40],
            "the preset randal-cartpole has settings for CartPole-v1, ALE/Pong-v5 is a game of another kind: "
            "another preset may learn better",
        ),
        ([*RANDAL_CARTPOLE, "--total-steps", 40], None),
        ([*CARTPOLE, "--env.id", "Acrobot-v1", "--total-steps", 60], None),
    ],
)
def test_what_is_hardly_meant_is_a_warning(
    words: list[Any], warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words, "--run-dir", "run") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == ([] if warning is None else [f"warning: {warning}"])


def test_it_is_said_when_learning_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", "run") == 0
    assert "learning begins after 50 steps\n" in capsys.readouterr().err
    assert train("--resume", "run", "--total-steps", 70) == 0
    assert "learning begins" not in capsys.readouterr().err


def test_a_run_goes_on_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", "runs/a") == 0
    assert train("--resume", "a", "--total-steps", 70) == 0
    assert rows(Path("runs/a/metrics.csv"))[-1]["global_step"] == 70


def test_ram_of_a_game_without_a_console_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*CARTPOLE, "--env.obs-type", "ram", "--total-steps", 60, "--run-dir", "run") == 0
    assert "warning: env.obs_type ram is for ALE's games: CartPole-v1 is played as without it" in (
        capsys.readouterr().err
    )


def test_an_export_needs_runs_and_a_folder_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, commands.run(commands.export_command, [], "export.py")).startswith(
        "no run: name one or more"
    )
    for home in ("a", "b"):
        assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", f"{home}/run") == 0
    capsys.readouterr()
    words = ["a/run", "b/run", "--out", "logs"]
    assert "have the same name" in refusal(capsys, commands.run(commands.export_command, words, "export.py"))


def test_runs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(commands.runs_command, [], "runs.py") == 0
    assert capsys.readouterr().out == "there is no run in runs yet: train.py begins one\n"
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", "runs/a") == 0
    Path("runs/b").mkdir()
    Path("runs/b/config.json").write_text("{}")
    capsys.readouterr()
    assert commands.run(commands.runs_command, [], "runs.py") == 0
    told = capsys.readouterr()
    _, line = told.out.splitlines()
    assert line.split()[:5] == ["a", "cartpole", "742", "finished", "60"]
    assert told.err == "warning: runs/b/config.json is not a run's configuration: left out\n"

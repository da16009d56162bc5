"""Agents after training: read from a run or from weights that ship, and played by the commands."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_helpers import CARTPOLE, refusal, train
from safetensors.torch import save_file

from gravitar_dqn.cli import commands
from gravitar_dqn.config import to_dict
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation import trained_agent
from gravitar_dqn.evaluation.acting import load_policy
from gravitar_dqn.presets import PRESETS


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained") / "run"
    assert train(*CARTPOLE, "--total-steps", 600, "--run-dir", home) == 0
    return home


def test_weights_that_ship_are_the_runs_rounded_to_float16(run_dir: Path, tmp_path: Path) -> None:
    ours = trained_agent.from_run(run_dir)
    trained_agent.write(ours, tmp_path / "small.safetensors")
    shipped = trained_agent.read(tmp_path / "small.safetensors")
    assert (shipped.config, shipped.global_step, shipped.name) == (ours.config, ours.global_step, "small")
    assert shipped.state is None and ours.state is not None
    assert shipped.weights.keys() == ours.weights.keys()
    for name, value in ours.weights.items():
        assert shipped.weights[name].dtype == torch.float32
        torch.testing.assert_close(shipped.weights[name], value.half().float(), rtol=0, atol=0)
    load_policy(shipped.config, shipped.weights)
    first = (tmp_path / "small.safetensors").read_bytes()
    trained_agent.write(ours, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_settings_that_are_newer_than_the_weights_are_as_in_the_preset(tmp_path: Path) -> None:
    config = to_dict(replace(PRESETS["cartpole"], seed=5))
    del config["total_steps"], config["agent"]["n_step"], config["rnd"]
    header = json.dumps({"config": config, "global_step": 7})
    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", metadata={"trained": header})
    assert trained_agent.read(tmp_path / "old.safetensors").config == replace(PRESETS["cartpole"], seed=5)


@pytest.mark.parametrize("spoil", ["cut", "no header", "no file"])
def test_what_holds_no_agent_is_refused(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if spoil != "no file":
        save_file({"x": torch.zeros(9)}, path)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"x\.safetensors does not hold a trained agent: "):
        trained_agent.read(path)


def test_an_unknown_name_is_answered_with_those_there_are(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained_agent, "PRETRAINED", tmp_path)
    assert commands.run(commands.evaluate_command, ["--pretrained", "small"], "x.py") == 2
    assert capsys.readouterr().err == "error: no pretrained agent 'small': there are none yet\n"
    assert trained_agent.main([str(run_dir), "small"]) == 0
    assert commands.run(commands.evaluate_command, ["--pretrained", "smal"], "x.py") == 2
    assert capsys.readouterr().err == "error: no pretrained agent 'smal': did you mean small? there are small\n"
    assert trained_agent.main([str(run_dir)]) == 2 and trained_agent.main(["nowhere", "small"]) == 2


def test_a_pretrained_agent_is_evaluated_and_filmed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained_agent, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert trained_agent.main([str(run_dir), "small"]) == 0
    assert commands.run(commands.evaluate_command, ["--pretrained", "small", "--episodes", "4"], "x.py") == 0
    assert "games                4" in capsys.readouterr().out
    assert commands.run(commands.watch_command, ["--pretrained", "small", "--overlay"], "x.py") == 0
    assert (tmp_path / "videos" / "small" / "step_600_seed_742_overlay.mp4").exists()
    monkeypatch.setattr(commands, "PRETRAINED", tmp_path / "pretrained")
    for words, told in (
        (["small"], "small is no run's folder, but weights of that name ship: x.py --pretrained small"),
        (["--pretrained", "small", "--episode", "4"], "unknown option '--episode': did you mean --episodes?"),
        (["--pretrained", "small", "--overley"], "unknown option '--overley'"),
    ):
        capsys.readouterr()
        assert told in refusal(capsys, commands.run(commands.watch_command, words, "x.py"))


@pytest.mark.parametrize("name", trained_agent.names() or ["none"])
def test_what_ships_can_be_played(name: str) -> None:
    if name == "none":
        pytest.skip("nothing ships yet")
    agent = trained_agent.from_pretrained(name)
    network = load_policy(agent.config, agent.weights)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    assert sum(path.stat().st_size for path in trained_agent.PRETRAINED.iterdir()) < 15e6

"""The panel beside a filmed game: what it shows is what the agent makes of it."""

from pathlib import Path
from typing import Any

import numpy as np
import probes
import pytest
import torch
from ppo_helpers import PICTURE_TASKS, settings
from run_helpers import CARTPOLE, train

from gravitar_dqn.agents.base import Insight
from gravitar_dqn.agents.ppo import PPOAgent
from gravitar_dqn.cli import commands
from gravitar_dqn.config import RunConfig
from gravitar_dqn.evaluation.overlay import BLUE, LEAST_HEIGHT, ORANGE, PAPER, WIDTH, Overlay, make_look
from gravitar_dqn.evaluation.trained_agent import Trained
from gravitar_dqn.networks import DuelingConvQNetwork
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.rnd import make_rnd

PICTURE = np.zeros((210, 160, 3), dtype=np.uint8)
STACKS = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)


def count(panel: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((panel == color).all(axis=2).sum())


def test_the_panel_shows_values_choice_map_and_curiosity() -> None:
    cells = np.zeros((21, 21), dtype=np.float32)
    cells[3, 17] = 1.0
    insights = iter([Insight("Q value", np.array([1.0, 3.0, 2.0], dtype=np.float32), 0.5, cells)] * 2)
    overlay = Overlay(lambda obs: next(insights), ["NOOP", "FIRE", "UP"])
    assert (overlay.beside(PICTURE)[:, 320:] == PAPER).all(), "nothing is known before the first action"
    overlay.update(STACKS, torch.tensor([1]))
    whole = overlay.beside(PICTURE)
    assert whole.shape == (420, 320 + WIDTH, 3) and (whole[:, :320] == 0).all()
    panel = whole[:, 320:]
    bars = panel[:140]
    assert count(bars, ORANGE) > count(bars, BLUE) / 2 > 0, "the chosen action is the highest"
    heat = panel[140:280]
    rows, columns = np.nonzero(heat[30:].astype(int).max(axis=2) - heat[30:].min(axis=2) > 200)
    assert rows.max() < 60 and columns.min() > WIDTH // 2, "the lit cell is up at the right"
    overlay.update(STACKS, torch.tensor([0]))
    assert not np.array_equal(panel, overlay.beside(PICTURE)[:, 320:])


def test_a_small_picture_is_enlarged_and_sides_are_even() -> None:
    overlay = Overlay(lambda obs: Insight("Q value", np.zeros(2, dtype=np.float32)), ["a", "b"])
    overlay.update(STACKS, torch.tensor([0]))
    for height, width in ((210, 160), (400, 600), (50, 40)):
        shape = overlay.beside(np.zeros((height, width, 3), dtype=np.uint8)).shape
        assert shape[0] >= LEAST_HEIGHT and shape[0] % 2 == shape[1] % 2 == 0
        overlay._panel = None


def trained(config: RunConfig, state: dict[str, Any] | None) -> Trained:
    return Trained("run", config, {}, 0, state)


@pytest.mark.parametrize("preset", ["gravitar", "notebook", "breakout"])
def test_dqn_shows_q_values_and_the_predictors_error(preset: str) -> None:
    config: Any = PRESETS[preset]
    network = DuelingConvQNetwork(4, 18)
    rnd = make_rnd(probes.spec_of_shape((4, 84, 84)), config.env.num_envs, config.rnd)
    insight = make_look(trained(config, {"rnd": None if rnd is None else rnd.state_dict()}), network)(STACKS)
    with torch.no_grad():
        np.testing.assert_allclose(insight.values, network(STACKS)[0])
        assert insight.bonus == (None if rnd is None else pytest.approx(rnd.bonus(STACKS).item()))
    assert insight.cells is None


def test_randal_shows_probabilities_its_map_and_the_predictors_error() -> None:
    config = settings(PICTURE_TASKS, num_envs=2)
    agent = PPOAgent(config, probes.spec_of_shape((4, 84, 84), 18), torch.device("cpu"))
    agent.rnd.obs_rms.update(torch.randint(0, 256, (20, 1, 84, 84)))
    insight = make_look(trained(config, agent.state_dict()), agent.policy)(STACKS)
    assert insight.values.shape == (18,) and insight.values.sum() == pytest.approx(1)
    with torch.no_grad():
        errors, _ = agent.rnd.errors(STACKS[:, -1:])
        cells = agent.tasks.heads["pixel_control"](agent.policy.trunk(STACKS))[0].amax(dim=0)
    assert insight.bonus == pytest.approx(errors.item())
    np.testing.assert_allclose(insight.cells, cells, rtol=1e-5)


@pytest.mark.parametrize("preset", ["cartpole", "randal-cartpole"])
def test_watch_films_with_the_panel(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    words = CARTPOLE if preset == "cartpole" else "randal-cartpole --dashboard off --video-every 0 --device cpu".split()
    assert train(*words, "--total-steps", "120", "--run-dir", tmp_path / "run") == 0
    argv = [str(tmp_path / "run"), "--overlay", "--video-dir", str(tmp_path / "videos")]
    assert commands.run(commands.watch_command, argv, "watch.py") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    path = Path(told.split(": score ")[0])
    assert path.name.endswith("_seed_742_overlay.mp4") and path.stat().st_size > 1_000

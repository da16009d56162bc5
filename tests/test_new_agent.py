"""A new agent is one file with an entry, a line in the registry and a preset: here all of it, and all that it gets."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import tyro
from run_helpers import rows
from torch import Tensor, nn

from gravitar_dqn.agents import REGISTRY
from gravitar_dqn.agents.base import Agent, AgentEntry, Insight, Means
from gravitar_dqn.benchmark.contenders import Ours
from gravitar_dqn.benchmark.worker import _play_for
from gravitar_dqn.cli import commands
from gravitar_dqn.config import EnvSettings, RunConfig, bounded
from gravitar_dqn.dashboard.board import Board
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.replay import ReplayBuffer

# ---------------------------------------------------------------- the agent: from here ...


@dataclass(frozen=True)
class ToySettings:
    learning_rate: float = bounded(0.01)
    """Adam's."""


@dataclass(frozen=True)
class ToyRunConfig(RunConfig):
    preset: Annotated[str, tyro.conf.Suppress] = "toy"
    env: EnvSettings = field(default_factory=lambda: EnvSettings(id="CartPole-v1", num_envs=2))
    agent: ToySettings = field(default_factory=ToySettings)


class ToyAgent(Agent):
    """Linear regression of the reward of one step."""

    batch_size = 32

    def __init__(self, config: ToyRunConfig, spec: EnvSpec, device: torch.device) -> None:
        replay = ReplayBuffer(1_000, config.env.num_envs, spec.frame_shape, spec.frame_dtype, stack=1, device=device)
        super().__init__(config, spec, device, replay)
        self.network = ENTRY.make_policy(config, spec).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), config.agent.learning_rate)
        self._means = [Means(("toy_loss",), device)]

    @property
    def policy(self) -> nn.Module:
        return self.network

    def act(self) -> Tensor:
        return torch.randint(self.spec.num_actions, (len(self._obs),), generator=self.generator, device=self.device)

    def update(self) -> int:
        if len(self.replay) < self.batch_size:
            return 0
        batch = self.replay.sample(self.batch_size, self.generator)
        values = self.network(batch.obs).gather(1, batch.actions[:, None])
        loss = (values - batch.rewards[:, :1]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._means[0].add({"toy_loss": loss})
        self.num_updates += 1
        return 1

    def _capture(self) -> None: ...

    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self.optimizer}


ENTRY = AgentEntry(
    make=ToyAgent,
    make_policy=lambda config, spec: nn.Linear(spec.obs_shape[0], spec.num_actions),
    action_scores=lambda network, obs, generator: network(obs),
    make_look=lambda config, spec, network, state: lambda obs: Insight("reward", network(obs)[0].detach().numpy()),
)

# ---------------------------------------------------------------- ... to here


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(REGISTRY, ToyRunConfig, __name__)
    monkeypatch.setitem(PRESETS, "toy", ToyRunConfig())
    monkeypatch.chdir(tmp_path)


def train(*words: object) -> int:
    quiet = "--dashboard off --video-every 0 --log-seconds 0 --device cpu".split()
    return commands.run(commands.train_command, [*map(str, words), *quiet], "train.py")


def test_it_is_short() -> None:
    first, then = "the agent: from" + " here", "... to" + " here"
    lines = Path(__file__).read_text().splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if mark in line) for mark in (first, then))
    assert len("\n".join(lines[begin + 1 : end]).strip().splitlines()) <= 60


def test_it_trains_resumes_and_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("toy", "--total-steps", 200, "--run-dir", "run") == 0
    told = rows(Path("run/metrics.csv"))
    assert told[-1]["toy_loss"] < told[40]["toy_loss"] < 1, "it learns"
    assert not any(name.startswith(("td_", "policy_")) and row[name] == row[name] for row in told for name in row)
    assert train("--resume", "run", "--total-steps", 300) == 0
    assert rows(Path("run/metrics.csv"))[-1]["global_step"] >= 300
    assert train("--resume", "run", "--agent.learning-rate", 1) == 2
    assert "agent.learning_rate: 0.01 -> 1.0" in capsys.readouterr().err
    assert commands.run(commands.evaluate_command, ["run", "--episodes", "3", "--device", "cpu"], "evaluate.py") == 0
    assert len(json.loads(Path("run/eval.json").read_text())["returns"]) == 3


def test_it_is_watched_with_what_it_sees() -> None:
    assert train("toy", "--total-steps", 20, "--run-dir", "run") == 0
    assert commands.run(commands.watch_command, ["run", "--overlay"], "watch.py") == 0
    assert [path.suffix for path in Path("videos/run").iterdir()] == [".mp4"]


def test_the_dashboard_draws_its_metric_without_knowing_it() -> None:
    assert train("toy", "--total-steps", 100, "--run-dir", "run") == 0
    board = Board(json.loads(Path("run/config.json").read_text()))
    for row in rows(Path("run/metrics.csv")):
        board.add("metrics", row)
    assert [chart.title for chart in board.charts] == ["Score", "Speed", "Replay buffer", "toy_loss"]
    assert len(board.pane(board.charts[-1])["data"][0]["y"]) > 30


def test_the_benchmark_plays_it() -> None:
    speed, waited = _play_for(Ours(replace(ToyRunConfig(), device="cpu")), 0.05)
    assert speed > 0 and waited == 0

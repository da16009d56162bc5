"""What only a CUDA device can show. Run with `-m gpu`."""

import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ppo_helpers
import probes
import pytest
import torch
from replay_helpers import check_valid
from test_distributed import run_to_end

from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.config import DQNRunConfig, DQNSettings, EnvSettings, RNDSettings
from gravitar_dqn.envs import spec_of
from gravitar_dqn.loop import play
from gravitar_dqn.replay import ReplayBuffer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = DQNRunConfig(
    env=EnvSettings(num_envs=4),
    agent=DQNSettings(buffer_size=1_000, learning_starts=50, batch_size=32, train_frequency=4, n_step=3),
    rnd=RNDSettings(coef=0.1, init_updates=5),
    precision="fp32",
)


def build(config: DQNRunConfig, device: str, probe: type = probes.Remember) -> tuple[Any, DQNAgent]:
    torch.manual_seed(config.seed)
    envs = probes.vector_of(probe, config.env.num_envs)
    return envs, DQNAgent(config, spec_of(envs), torch.device(device))


@pytest.mark.parametrize("variant", ["rnd", "notebook"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_plays_and_learns(precision: str, variant: str) -> None:
    config = replace(CONFIG, precision=precision, rnd=replace(CONFIG.rnd, variant=variant))
    envs, agent = build(config, "cuda")
    for _ in islice(play(envs, agent, 1), 60):
        pass
    metrics = agent.metrics()
    assert agent.num_updates > 10
    assert np.isfinite([metrics["td_loss"], metrics["rnd_loss"], metrics["q_mean"]]).all()
    check_valid(agent.replay)


def test_act_curiosity_and_updates_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    envs, agent = build(CONFIG, "cuda")
    for _ in islice(play(envs, agent, 1), 60):
        pass
    assert "no CUDA graph" not in caplog.text
    for function in (agent.select_actions, agent.compute_int_rewards, agent.update_q_network, agent.update_predictor):
        assert function._graph is not None, function
    agent._epsilons.fill_(1.0)
    drawn = set()
    for _ in range(12):
        agent.select_actions()
        drawn.add(tuple(agent._actions.tolist()))
    assert len(drawn) > 4, "a captured policy that repeats its random numbers"
    before = agent.replay.int_rewards.clone(), [p.clone() for p in agent.q_network.parameters()]
    for _ in range(4):
        agent.update_q_network()
        agent.update_predictor()
    assert (before[0] != agent.replay.int_rewards).any()
    assert any((old != new).any() for old, new in zip(before[1], agent.q_network.parameters(), strict=True))


@pytest.mark.parametrize("probe", [probes.Remember, probes.RamBoth], ids=["pictures", "RAM"])
def test_graphs_learn_what_eager_learns(probe: type) -> None:
    envs, agent = build(replace(CONFIG, execution="eager"), "cuda", probe)
    for _ in islice(play(envs, agent, 1), 60):
        pass
    state = copy.deepcopy(agent.state_dict(replay=True))
    learned = {}
    for execution in ("eager", "graphs"):
        _, twin = build(replace(CONFIG, execution=execution), "cuda", probe)
        twin.load_state_dict(copy.deepcopy(state))
        for _ in range(10):
            twin.gradient_step()
        if execution == "graphs":
            assert twin.update_q_network._graph is not None
        networks = (twin.q_network, twin.target_network)
        learned[execution] = [p.detach().clone() for network in networks for p in network.parameters()]
    for eager, graphs in zip(learned["eager"], learned["graphs"], strict=True):
        torch.testing.assert_close(eager, graphs, rtol=1e-3, atol=1e-4)


def test_what_the_emulator_shows_while_the_device_learns_is_what_is_stored() -> None:
    assert probes.check_overlap(replace(CONFIG, env=EnvSettings(num_envs=8)), "cuda", 60).num_updates > 50


@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_checkpoints_travel_between_devices(here: str, there: str, tmp_path: Any) -> None:
    envs, agent = build(CONFIG, here)
    for _ in islice(play(envs, agent, 1), 40):
        pass
    torch.save(agent.state_dict(replay=True), tmp_path / "agent.pt")
    _, other = build(CONFIG, there)
    other.load_state_dict(torch.load(tmp_path / "agent.pt", map_location="cpu", weights_only=True))
    for a, b in zip(agent.q_network.parameters(), other.q_network.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    updates = other.num_updates
    for _ in islice(play(probes.vector_of(probes.Remember, 4), other, 2), 20):
        pass
    assert other.num_updates > updates
    if there == "cuda":
        assert other.update_q_network._graph is not None, "the graphs were lost on the way"


def test_replay_holds_the_same_on_both_devices() -> None:
    buffers = [
        ReplayBuffer(200, 2, (2, 2), stack=4, n_step=3, priority_exponent=0.5, device=d) for d in ("cpu", "cuda")
    ]
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 255, (2, 2, 2), dtype=np.uint8)
    for buffer in buffers:
        buffer.begin(obs)
    played = np.ones(2, dtype=bool)
    for _ in range(150):
        actions, rewards = rng.integers(0, 18, 2), rng.normal(size=2).astype(np.float32)
        ends, no = rng.random(2) < 0.1, np.zeros(2, dtype=bool)
        obs = rng.integers(0, 255, (2, 2, 2), dtype=np.uint8)
        for buffer in buffers:
            buffer.put(torch.as_tensor(actions).to(buffer.device), rewards, ends, no, obs, played)
        played = ~(ends & played)
    one, two = (buffer.state_dict() for buffer in buffers)
    for name in ("frames", "actions", "rewards", "terminations", "valid", "ages", "sampling_weights"):
        assert torch.equal(one[name], two[name].cpu()), name


# ---------------------------------------------------------------- PPO

RANDAL_TASKS = {"ppo-rnd": ppo_helpers.PPO_RND, "randal": ppo_helpers.PICTURE_TASKS}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tasks", RANDAL_TASKS.values(), ids=RANDAL_TASKS)
def test_randal_is_captured_and_learns(tasks: Any, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(ppo_helpers.settings(tasks), device="cuda", precision=precision)
    agent = ppo_helpers.learn(config, probes.Remember, 5 + 16 * 6)
    assert "no CUDA graph" not in caplog.text
    for function in (agent.select_actions, agent.compute_advantages, agent.update_policy, agent.update_normalizers):
        assert function._graph is not None, function
    assert np.isfinite(agent.metrics()["policy_loss"])
    before = [p.clone() for p in agent.learners.parameters()]
    agent.update_policy()
    assert any((old != new).any() for old, new in zip(before, agent.learners.parameters(), strict=True))
    drawn = set()
    for _ in range(12):
        agent.select_actions()
        drawn.add(tuple(agent._actions.tolist()))
    assert len(drawn) > 4, "a captured policy that repeats its random numbers"


def test_randals_learning_rate_reaches_the_graphs() -> None:
    config = replace(ppo_helpers.settings(learning_rate_decay=100_000, learning_rate_end=1e-5), device="cuda")
    agent = ppo_helpers.learn(config, probes.Remember, 5 + 16 * 3)
    agent.global_step = 100_000
    agent._set_learning_rate()
    assert agent.optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-5)
    before = [p.clone() for p in agent.policy.parameters()]
    agent.update_policy()
    moved = max((old - new).abs().max().item() for old, new in zip(before, agent.policy.parameters(), strict=True))
    assert 0 < moved < 1e-4, "steps of Adam are about as long as the learning rate"


@pytest.mark.parametrize("device", ["cuda:0", "cuda"], ids=["one shared, gloo", "two, NCCL"])
def test_two_ranks_train_together(device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs a GPU for every rank")
    words = ["cartpole", "--device", device, "--dashboard", "off", "--video-every", 0, "--total-steps", 3_000]
    run_to_end(ROOT / "scripts" / "train.py", *words, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()

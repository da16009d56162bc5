"""The DQN agent: probe environments, its clocks, the notebook's habits, and what it remembers."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import probes
import pytest
import torch

from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.config import DQNRunConfig, DQNSettings, EnvSettings, RNDSettings
from gravitar_dqn.envs import spec_of
from gravitar_dqn.evaluation.acting import Policy, play_games
from gravitar_dqn.loop import play
from gravitar_dqn.networks import DuelingConvQNetwork
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.runtime.execution import choose_precision

CPU = torch.device("cpu")


def settings(**changes: Any) -> DQNRunConfig:
    """A small learner; `changes` go to its DQNSettings."""
    agent = DQNSettings(
        network="notebook", policy="online", buffer_size=1_000, learning_starts=100, batch_size=32, train_frequency=4,
        target_network_frequency=100, tau=1.0,
        learning_rate=2e-3, adam_epsilon=1e-8, gamma=0.5, n_step=1, reward_scale=1.0, priority_exponent=0.0,
        epsilon_start=1.0, epsilon_end=1.0, epsilon_ladder=0.0,
    )  # fmt: skip
    return DQNRunConfig(
        env=EnvSettings(num_envs=4),
        agent=replace(agent, **changes),
        rnd=RNDSettings(coef=0.0),
        precision="fp32",
        seed=1,
    )


def build(config: DQNRunConfig, probe: type) -> tuple[Any, DQNAgent]:
    torch.manual_seed(config.seed)
    envs = probes.vector_of(probe, config.env.num_envs)
    return envs, DQNAgent(config, spec_of(envs), CPU)


def learn(config: DQNRunConfig, probe: type, steps: int) -> DQNAgent:
    envs, agent = build(config, probe)
    for _ in islice(play(envs, agent, config.seed), steps):
        pass
    return agent


def q(agent: DQNAgent, *obs: float) -> torch.Tensor:
    with torch.no_grad():
        return agent.q_network(torch.tensor(obs).view(-1, 1))


VARIANTS = {
    "plain": {},
    "double, 3 steps": {"n_step": 3},
    "priorities": {"priority_exponent": 0.6},
    "single": {"double_q": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_probe_constant_reward(changes: dict[str, Any]) -> None:
    agent = learn(settings(**changes), probes.ConstantReward, 400)
    torch.testing.assert_close(q(agent, 0.0), torch.ones(1, 2), atol=0.05, rtol=0)


def test_probe_reward_tells_the_observation() -> None:
    agent = learn(settings(), probes.ObservedReward, 500)
    torch.testing.assert_close(q(agent, 1.0, -1.0), torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), atol=0.1, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_probe_delayed_reward(changes: dict[str, Any]) -> None:
    agent = learn(settings(**changes), probes.DelayedReward, 700)
    torch.testing.assert_close(q(agent, 0.0, 1.0), torch.tensor([[0.5, 0.5], [1.0, 1.0]]), atol=0.1, rtol=0)


def test_probe_action_matters() -> None:
    agent = learn(settings(), probes.ActionMatters, 500)
    torch.testing.assert_close(q(agent, 0.0), torch.tensor([[-1.0, 1.0]]), atol=0.1, rtol=0)


def test_probe_action_and_observation() -> None:
    agent = learn(settings(), probes.Both, 600)
    torch.testing.assert_close(q(agent, 1.0, -1.0), torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), atol=0.15, rtol=0)


def test_probe_time_out_bootstraps() -> None:
    agent = learn(settings(), probes.TimeLimit, 700)
    torch.testing.assert_close(q(agent, 0.0), torch.full((1, 2), 2.0), atol=0.15, rtol=0)  # 1 / (1 - 0.5)


def test_probe_time_out_taken_for_a_death_as_the_notebook_did() -> None:
    agent = learn(settings(time_limit_is_terminal=True), probes.TimeLimit, 500)
    torch.testing.assert_close(q(agent, 0.0), torch.ones(1, 2), atol=0.1, rtol=0)


def test_probe_remember_needs_the_stack() -> None:
    config = settings(learning_rate=5e-4, batch_size=16, n_step=3, train_frequency=8)
    envs, agent = build(config, probes.Remember)
    for _ in islice(play(envs, agent, 1), 330):
        pass
    stacks = torch.full((2, 4, 84, 84), 128, dtype=torch.uint8)
    stacks[:, 0] = 0  # before the game
    stacks[0, 1], stacks[1, 1] = 255, 60
    with torch.no_grad():
        assert agent.q_network(stacks).argmax(1).tolist() == [1, 0]


# ---------------------------------------------------------------- clocks


def test_gradient_steps_and_target_copies_follow_agent_steps() -> None:
    config = settings(learning_starts=100, train_frequency=8, gradient_steps=3, target_network_frequency=60)
    envs, agent = build(config, probes.DelayedReward)
    seen: list[tuple[int, int, int]] = []
    syncs = 0
    for _ in islice(play(envs, agent, 1), 90):
        syncs += agent.messages.count("Matching network values")
        agent.messages.clear()
        seen.append((agent.global_step, agent.num_updates, syncs))
    first = next(step for step, updates, _ in seen if updates)
    assert 100 < first <= 100 + 8 + 4
    for step, updates, syncs in seen:
        if step >= first:
            assert updates % 3 == 0
            assert abs(updates / 3 - (step - first) / 8 - 1) <= 1
            assert syncs >= step // 60 - 1
    # two of every three steps of a two-step game are played: the third is the reset
    assert seen[-1][0] == 4 * 90 * 2 // 3


def test_many_updates_catch_up_within_one_step_of_many_environments() -> None:
    config = settings(train_frequency=1, learning_starts=20)
    envs, agent = build(config, probes.TimeLimit)
    for _ in islice(play(envs, agent, 1), 40):
        pass
    # 4 environments alternate a played step and a reset: 4 gradient steps a played step, none at a reset
    assert agent.global_step == 80
    assert agent.num_updates == 80 - 20


def test_every_environment_starts_at_random_and_ends_on_its_rung() -> None:
    config = settings(epsilon_start=1.0, epsilon_end=0.4, epsilon_ladder=7.0, epsilon_decay=200)
    envs, agent = build(config, probes.TimeLimit)
    ends = [0.4, 0.4 ** (1 + 7 / 3), 0.4 ** (1 + 14 / 3), 0.4**8]
    assert agent._schedule(agent._epsilon_ends).tolist() == [1.0] * 4
    loop = play(envs, agent, 1)
    for _ in islice(loop, 49):
        pass
    assert agent.global_step == 100  # half-way, for each environment on its own line
    np.testing.assert_allclose(agent._schedule(agent._epsilon_ends), [1 + (end - 1) / 2 for end in ends])
    for _ in islice(loop, 100):
        pass
    np.testing.assert_allclose(agent._schedule(agent._epsilon_ends), ends)
    assert agent.epsilon == pytest.approx(np.mean(ends))


def test_epsilon_falls_by_the_clock() -> None:
    config = settings(epsilon_start=0.9, epsilon_end=0.1, epsilon_decay=80)
    envs, agent = build(config, probes.TimeLimit)
    values = [agent.epsilon for _ in islice(play(envs, agent, 1), 60)]
    assert values[0] == pytest.approx(0.9 - 0.8 * 4 / 80)
    assert values[-1] == pytest.approx(0.1)


# ---------------------------------------------------------------- the notebook


def notebook(**changes: Any) -> DQNRunConfig:
    base = PRESETS["notebook"]
    return replace(base, agent=replace(base.agent, **changes))


def test_notebook_trains_ten_steps_at_the_end_of_an_episode_and_syncs_every_hundred() -> None:
    envs, agent = build(notebook(buffer_size=500, learning_starts=30, batch_size=8), probes.DelayedReward)
    syncs: Counter[int] = Counter()
    updates_before = 0
    for finished in islice(play(envs, agent, 742), 3 * 205):
        if agent.messages:
            syncs[agent.episodes] += len(agent.messages)
            agent.messages.clear()
        grown = agent.num_updates - updates_before
        updates_before = agent.num_updates
        assert grown == (10 if finished and len(agent.replay) > 30 else 0)
    assert syncs == {100: 1, 200: 1}
    # epsilon: 0.50 less 1/2000 an episode
    assert agent.episodes == 205
    assert agent.epsilon == pytest.approx(0.5 - 205 / 2000)


def test_notebook_learns_score_and_bonus_over_500_with_a_plain_maximum() -> None:
    config = notebook(buffer_size=300, learning_starts=10, batch_size=64)
    envs, agent = build(config, probes.DelayedReward)
    for _ in islice(play(envs, agent, 742), 150):
        pass
    batch = agent.replay.sample(64, torch.Generator().manual_seed(3))
    loss, errors, _ = agent._q_loss(batch)
    expected = []
    with torch.no_grad():
        for i in range(64):
            target = batch.rewards[i, 0].item() / 500 + batch.int_rewards[i, 0].item() / 500
            if not batch.terminated[i]:
                target += 0.99 * agent.target_network(batch.next_obs[i : i + 1]).max().item()
            expected.append(target - agent.q_network(batch.obs[i : i + 1])[0, batch.actions[i]].item())
    np.testing.assert_allclose(errors, expected, atol=1e-5)
    huber = [0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in expected]
    assert loss.item() == pytest.approx(np.mean(huber), abs=1e-6)
    assert (batch.int_rewards.abs() <= 5).all() and batch.int_rewards.abs().max() > 0


def test_notebook_predictor_stays_as_it_was_made() -> None:
    envs, agent = build(notebook(buffer_size=300, learning_starts=10, batch_size=8), probes.DelayedReward)
    before = [p.clone() for p in agent.rnd.predictor.parameters()]
    q_before = [p.clone() for p in agent.q_network.parameters()]
    for _ in islice(play(envs, agent, 742), 60):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, agent.rnd.predictor.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(q_before, agent.q_network.parameters(), strict=True))


def test_notebook_stack_repeats_the_first_frame() -> None:
    envs, agent = build(notebook(buffer_size=300), probes.Remember)
    obs, _ = envs.reset(seed=0)
    agent.begin(obs)
    assert (agent._obs == torch.from_numpy(obs)[:, None]).all()


# ---------------------------------------------------------------- curiosity in the agent


def test_bonuses_of_sampled_transitions_are_refreshed_and_the_predictor_learns() -> None:
    config = replace(
        settings(n_step=2), rnd=RNDSettings(coef=0.5, learning_rate=1e-3, update_frequency=1, init_updates=5)
    )
    envs, agent = build(config, probes.DelayedReward)
    loop = play(envs, agent, 1)
    for _ in islice(loop, 45):
        agent.metrics()
    for _ in islice(loop, 5):
        pass
    early = agent.metrics()
    for _ in islice(loop, 500):
        pass
    late = agent.metrics()
    assert early["int_reward_mean"] > 0 and late["int_reward_mean"] < 0.5 * early["int_reward_mean"]
    batch = agent.replay.sample(32, torch.Generator().manual_seed(0))
    stored = batch.int_rewards.gather(1, batch.steps[:, None] - 1).squeeze(1)
    with torch.no_grad():
        today = agent.rnd.bonus(batch.next_obs)
    # what was computed long ago, when it was played, would be many times larger
    assert stored.mean() < 5 * today.mean() + 1e-3


def test_learned_reward_is_scaled_score_plus_weighted_bonus() -> None:
    config = replace(settings(reward_scale=0.01, n_step=2), rnd=RNDSettings(coef=0.5, init_updates=5))
    envs, agent = build(config, probes.DelayedReward)
    for _ in islice(play(envs, agent, 1), 20):
        pass
    batch = agent.replay.sample(32, torch.Generator().manual_seed(0))
    _, errors, _ = agent._q_loss(batch)
    learned = 0.01 * batch.rewards + 0.5 * batch.int_rewards / agent.rnd.reward_rms.std
    with torch.no_grad():
        best = agent.q_network(batch.next_obs).argmax(1, keepdim=True)
        bootstrap = agent.target_network(batch.next_obs).gather(1, best).squeeze(1)
        chosen = agent.q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)
    expected = learned[:, 0] + 0.5 * learned[:, 1] + 0.5**batch.steps * bootstrap * (~batch.terminated) - chosen
    torch.testing.assert_close(errors, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- remembering


@pytest.mark.parametrize("variant", ["rnd", "notebook"])
def test_a_loaded_agent_goes_on_as_the_saved_one(variant: str, tmp_path: Any) -> None:
    base = replace(
        settings(n_step=2, priority_exponent=0.5), rnd=RNDSettings(coef=0.5, variant=variant, init_updates=5)
    )
    envs, agent = build(base, probes.Both)
    for _ in islice(play(envs, agent, 1), 120):
        pass
    torch.save(agent.state_dict(replay=True), tmp_path / "agent.pt")
    _, other = build(replace(base, seed=5), probes.Both)
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    assert (other.global_step, other.episodes, other.num_updates) == (
        agent.global_step, agent.episodes, agent.num_updates,
    )  # fmt: skip
    for one in (agent, other):
        for _ in islice(play(probes.vector_of(probes.Both, 4), one, 9), 60):
            pass
    for a, b in zip(agent.q_network.parameters(), other.q_network.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in (agent.rnd.state_dict() if agent.rnd else {}).items():
        assert torch.equal(value, other.rnd.state_dict()[name]), name


def test_without_its_replay_buffer_a_loaded_agent_waits_until_it_is_as_full_again() -> None:
    envs, agent = build(settings(), probes.Both)
    for _ in islice(play(envs, agent, 1), 120):
        pass
    _, other = build(settings(), probes.Both)
    other.load_state_dict(agent.state_dict())
    assert other.state_dict()["fill"] == agent.replay.fill, "a kill before it is full again forgets nothing"
    updates = other.num_updates
    loop = play(probes.vector_of(probes.Both, 4), other, 2)
    for _ in islice(loop, 115):
        pass
    assert other.num_updates == updates
    for _ in islice(loop, 40):
        pass
    assert 0 < other.num_updates - updates < 25  # and it does not catch up on what it missed
    _, third = build(settings(), probes.Both)
    third.load_state_dict(agent.state_dict())
    for _ in islice(play(probes.vector_of(probes.Both, 4), third, 2), 40):
        pass
    fourth = build(settings(), probes.Both)[1]
    fourth.load_state_dict(third.state_dict(replay=True))  # a third of what it was
    for _ in islice(play(probes.vector_of(probes.Both, 4), fourth, 2), 40):
        pass
    assert fourth.num_updates == updates
    other.load_state_dict(agent.state_dict(replay=True))
    next(play(probes.vector_of(probes.Both, 4), other, 2))
    assert other.num_updates > agent.num_updates, "with its replay buffer it learns on at once"


def test_precision_is_chosen_by_the_device_and_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert choose_precision("auto", CPU) == ("bf16" if native else "fp32")


def test_one_bf16_step_gives_every_parameter_its_gradient() -> None:
    config = replace(settings(n_step=3, max_grad_norm=0.0), rnd=RNDSettings(coef=0.5, update_frequency=1))
    grads = {}
    for precision in ("fp32", "bf16"):
        envs, agent = build(replace(config, precision="fp32"), probes.Remember)
        for _ in islice(play(envs, agent, 1), 20):
            pass
        agent._autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        # Keep the gradients of one step, change nothing.
        agent.optimizer.step = agent.rnd_optimizer.step = lambda: None
        agent.generator.manual_seed(3)
        agent.update_q_network()
        agent.update_predictor()
        modules = {"q": agent.q_network, "rnd": agent.rnd.predictor}
        grads[precision] = {f"{m}.{n}": p.grad for m, module in modules.items() for n, p in module.named_parameters()}
    assert grads["fp32"].keys() == grads["bf16"].keys()
    for name, exact in grads["fp32"].items():
        close = grads["bf16"][name]
        assert exact is not None and close is not None, name
        assert (close - exact).norm() <= 0.1 * exact.norm() + 1e-6, name


def test_bf16_keeps_the_order_of_actions_next_to_a_large_value() -> None:
    torch.manual_seed(0)
    network = DuelingConvQNetwork(4, 18)
    network.value[-1].bias.data += 10.0  # bfloat16 resolves 0.06 there, the actions differ by less
    obs = torch.randint(0, 256, (100, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        exact = network(obs)
        with torch.autocast("cpu", torch.bfloat16):
            fast = network(obs)
    assert fast.dtype == torch.float32
    assert (exact.argmax(1) == fast.argmax(1)).float().mean() >= 0.9
    assert all(len(row.unique()) > 15 for row in fast)
    chosen = exact.gather(1, fast.argmax(1, keepdim=True)).squeeze(1)
    assert (exact.max(1).values - chosen).max() < 0.002


def test_bf16_agrees_with_fp32_within_its_precision() -> None:
    config = settings(n_step=3)
    _, agent = build(config, probes.Remember)
    _, fast = build(replace(config, precision="bf16"), probes.Remember)
    fast.q_network.load_state_dict(agent.q_network.state_dict())
    fast.target_network.load_state_dict(agent.target_network.state_dict())
    for _ in islice(play(probes.vector_of(probes.Remember, 4), agent, 1), 20):
        pass
    batch = agent.replay.sample(32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        slow_loss, slow_errors, _ = agent._q_loss(batch)
        with fast._autocast:
            fast_loss, fast_errors, _ = fast._q_loss(batch)
    torch.testing.assert_close(fast_errors, slow_errors, atol=0.02, rtol=0.02)
    assert fast_loss.item() == pytest.approx(slow_loss.item(), rel=0.05)


RECIPE = {"network": "layer_norm", "policy": "target", "target_network_frequency": 0, "tau": 0.05}


@pytest.mark.parametrize(
    "probe",
    [
        pytest.param(probes.Both, id="vector"),
        pytest.param(probes.RamBoth, id="RAM"),
        pytest.param(probes.Remember, id="picture", marks=pytest.mark.slow),
    ],
)
def test_probes_of_vectors_pictures_and_ram_are_solved_by_the_recipe(probe: type) -> None:
    """What is played and evaluated is the averaged network."""
    config = settings(**RECIPE, gamma=0.9, n_step=2, learning_rate=1e-3, stack_padding="repeat")
    agent = learn(config, probe, 500)
    envs = probes.vector_of(probe, 16)
    spec = spec_of(envs)
    policy = Policy(agent.config, agent.policy, spec, 16, epsilon=0.0, seed=0)
    assert agent.policy is agent.target_network
    assert np.mean(play_games(envs, policy, 64, seed=5)) > 0.95


def test_the_averaged_network_follows_by_tau_at_every_gradient_step() -> None:
    envs, agent = build(settings(**RECIPE), probes.Both)
    for _ in islice(play(envs, agent, 1), 40):
        pass
    before = [p.clone() for p in agent.target_network.parameters()]
    agent.gradient_step()
    for old, ours, online in zip(before, agent.target_network.parameters(), agent.q_network.parameters(), strict=True):
        torch.testing.assert_close(ours, old + 0.05 * (online - old))
    assert any((a != b).any() for a, b in zip(before, agent.target_network.parameters(), strict=True))


def test_a_lagged_network_that_copies_does_not_move_between_its_clock() -> None:
    envs, agent = build(settings(target_network_frequency=10_000), probes.Both)
    for _ in islice(play(envs, agent, 1), 40):
        pass
    before = [p.clone() for p in agent.target_network.parameters()]
    agent.gradient_step()
    for old, ours in zip(before, agent.target_network.parameters(), strict=True):
        torch.testing.assert_close(ours, old, rtol=0, atol=0)


@pytest.mark.parametrize(("policy", "name"), [("target", "target_network"), ("online", "q_network")])
def test_the_network_that_plays_is_the_one_that_is_kept_to_play(policy: Any, name: str) -> None:
    _, agent = build(settings(policy=policy), probes.Both)
    for weights in agent.target_network.parameters():
        weights.data.add_(1)
    for key, value in getattr(agent, name).state_dict().items():
        torch.testing.assert_close(agent.state_dict()["policy"][key], value)
        torch.testing.assert_close(agent.policy_state()[key], value)
    agent._epsilons.zero_()
    agent._obs.normal_()
    agent._select_actions()
    assert agent._actions.tolist() == getattr(agent, name)(agent._obs).argmax(1).tolist()


def test_the_learning_rate_falls_by_the_clock_of_steps() -> None:
    config = settings(learning_rate=1e-3, learning_rate_end=1e-4, learning_rate_decay=400)
    envs, agent = build(config, probes.Both)
    seen = {}
    for _ in islice(play(envs, agent, 1), 150):
        seen[agent.global_step] = agent.optimizer.param_groups[0]["lr"]
    learned = [step for step in seen if step > 100]
    assert len(learned) > 20
    for step in learned:
        assert seen[step] == pytest.approx(1e-3 - 9e-4 * min(step / 400, 1))

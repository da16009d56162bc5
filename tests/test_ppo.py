"""PPO with curiosity and tasks: its networks, what its switches build, probe environments, and what it remembers."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import probes
import pytest
import torch
from ppo_helpers import PICTURE_TASKS, PPO_RND, VECTOR_TASKS, build, learn, settings

from gravitar_dqn.agents.auxiliary_tasks import TASKS
from gravitar_dqn.agents.ppo import PPOAgent
from gravitar_dqn.agents.rollout import Rollout
from gravitar_dqn.config import TaskSettings
from gravitar_dqn.encoders import NatureCNN, RamMLP
from gravitar_dqn.errors import UserError
from gravitar_dqn.loop import play
from gravitar_dqn.networks import ActorCritic, PixelControl, PredictorCNN, PredictorMLP, RewardPrediction
from gravitar_dqn.rnd import RND, make_rnd_networks
from gravitar_dqn.runtime.execution import choose_precision


def values(agent: PPOAgent, *obs: float) -> torch.Tensor:
    with torch.no_grad():
        return agent.policy(torch.tensor(obs).view(-1, 1))[1]


def probabilities(agent: PPOAgent, *obs: float) -> torch.Tensor:
    with torch.no_grad():
        return agent.policy(torch.tensor(obs).view(-1, 1))[0].softmax(dim=1)[:, 1]


# ---------------------------------------------------------------- networks


def test_shapes() -> None:
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    network = ActorCritic(NatureCNN, (4, 84, 84), 18)
    assert [tuple(out.shape) for out in network(obs)] == [(3, 18), (3,), (3,)]
    features = network.trunk(obs)
    assert features.shape == (3, 512)
    head = PixelControl(512, 18)
    x = head.dense(features).relu().view(-1, 32, 8, 8)
    assert head.deconv(x).shape == (3, 32, 10, 10)
    assert head(features).shape == (3, 18, 21, 21)
    q_values = head(features)
    torch.testing.assert_close(q_values.mean(dim=1), head.value(head.deconv(x).relu()).squeeze(1))  # V, whatever A
    assert RewardPrediction(512)(features).shape == (3, 3)


@pytest.mark.parametrize(("make", "shape"), [(PredictorCNN, (1, 84, 84)), (PredictorMLP, (5,))])
def test_the_predictor_has_two_more_layers_and_the_target_never_learns(make: Any, shape: tuple[int, ...]) -> None:
    target, predictor = make(shape, trainable=False), make(shape, trainable=True)
    layers = [sum(isinstance(m, torch.nn.Linear) for m in net.modules()) for net in (target, predictor)]
    assert layers[1] == layers[0] + 2
    assert not any(p.requires_grad for p in target.parameters()) and all(
        p.requires_grad for p in predictor.parameters()
    )
    assert target(torch.randn(2, *shape)).shape == predictor(torch.randn(2, *shape)).shape == (2, target.dense_size)


def test_the_first_policy_is_nearly_uniform() -> None:
    network = ActorCritic(NatureCNN, (4, 84, 84), 6)
    logits, *_ = network(torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8))
    assert (logits.softmax(dim=1) - 1 / 6).abs().max() < 0.05


# ---------------------------------------------------------------- switches


def test_weight_0_builds_nothing_and_does_no_work() -> None:
    for name in TASKS:
        tasks = replace(PICTURE_TASKS, **{other: 0.0 for other in TASKS if other != name})
        _, agent = build(settings(tasks, num_envs=2), probes.Remember)
        assert set(agent.tasks.heads) == {name} - {"value_replay"}
        assert agent.replay.num_rows >= 60
    envs, agent = build(settings(PPO_RND, num_envs=2, rnd=0.0), probes.Remember)
    assert agent.rnd is None and agent.rnd_optimizer is None
    agent.update_normalizers = lambda: pytest.fail("nobody needs statistics of frames")
    agent.tasks.update_pixel_range = lambda frames: agent.update_normalizers()
    for _ in islice(play(envs, agent, 1), 17):
        pass
    assert agent.num_updates == 16
    assert len(agent.tasks.heads) == 0 and agent.tasks.losses() == {}
    assert agent.replay.num_rows == 16 + 1 + 3, "the rollout and its stacks"
    assert sum(p.numel() for p in agent.learners.parameters()) == sum(p.numel() for p in agent.policy.parameters())


def test_pixel_control_of_vectors_is_refused() -> None:
    with pytest.raises(UserError, match="pixel control needs pictures"):
        build(settings(TaskSettings()), probes.Both)


def test_without_curiosity_it_starts_at_once_and_learns() -> None:
    agent = learn(settings(rnd=0.0), probes.ActionMatters, 16 * 12 + 1)
    assert agent.num_updates == 12 * 16
    assert probabilities(agent, 0.0).item() > 0.9
    assert "pixel_control_loss" not in agent.metrics()


# ---------------------------------------------------------------- probes

LEARNERS = {"ppo-rnd": PPO_RND, "randal": VECTOR_TASKS, "randal, gae": replace(VECTOR_TASKS, returns="gae")}


@pytest.fixture(params=LEARNERS.values(), ids=LEARNERS)
def tasks(request: pytest.FixtureRequest) -> TaskSettings:
    result: TaskSettings = request.param
    return result


def test_probe_constant_reward(tasks: TaskSettings) -> None:
    agent = learn(settings(tasks), probes.ConstantReward, 300)
    torch.testing.assert_close(values(agent, 0.0), torch.ones(1), atol=0.05, rtol=0)


def test_probe_reward_tells_the_observation(tasks: TaskSettings) -> None:
    agent = learn(settings(tasks), probes.ObservedReward, 400)
    torch.testing.assert_close(values(agent, 1.0, -1.0), torch.tensor([1.0, -1.0]), atol=0.1, rtol=0)


def test_probe_delayed_reward(tasks: TaskSettings) -> None:
    agent = learn(settings(tasks), probes.DelayedReward, 500)
    torch.testing.assert_close(values(agent, 0.0, 1.0), torch.tensor([0.5, 1.0]), atol=0.1, rtol=0)


def test_probe_action_matters(tasks: TaskSettings) -> None:
    agent = learn(settings(tasks), probes.ActionMatters, 400)
    assert probabilities(agent, 0.0).item() > 0.95


def test_probe_action_and_observation(tasks: TaskSettings) -> None:
    agent = learn(settings(tasks), probes.Both, 500)
    one, other = probabilities(agent, 1.0, -1.0).tolist()
    assert one > 0.95 and other < 0.05


def test_probe_time_out_bootstraps(tasks: TaskSettings) -> None:
    agent = learn(settings(tasks), probes.TimeLimit, 500)
    torch.testing.assert_close(values(agent, 0.0), torch.full((1,), 2.0), atol=0.2, rtol=0)


@pytest.mark.parametrize(("optimizer", "kind"), [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)])
def test_both_optimizers_learn(optimizer: str, kind: type) -> None:
    agent = learn(settings(optimizer=optimizer), probes.ActionMatters, 300)
    assert type(agent.optimizer) is kind and type(agent.rnd_optimizer) is kind
    assert probabilities(agent, 0.0).item() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [PPO_RND, PICTURE_TASKS], ids=["ppo-rnd", "randal"])
def test_probe_remember_needs_the_stack(tasks: TaskSettings) -> None:
    changes: dict[str, Any] = {"num_steps": 12, "num_minibatches": 2, "learning_rate": 5e-4, "gamma": 0.9}
    config = settings(tasks, num_envs=16, ent_coef=0.01, **changes)
    envs, agent = build(config, probes.Remember)
    stacks = torch.full((2, 4, 84, 84), 128, dtype=torch.uint8)
    stacks[:, 0] = 0  # before the game
    stacks[0, 1], stacks[1, 1] = 255, 60
    for _ in islice(play(envs, agent, 1), 5 + 12 * 15):
        pass
    with torch.no_grad():
        bright, dark = agent.policy(stacks)[0].softmax(dim=1)[:, 1].tolist()
    assert bright > 0.8 and dark < 0.2


# ---------------------------------------------------------------- the parts of an update, in numbers


@pytest.mark.parametrize("rnd", [0.0, 0.1], ids=["ppo", "ppo-rnd"])
def test_ppo_learns_from_ram_with_normalized_advantages(rnd: float) -> None:
    """Two actions, and the one that fits a bit of RAM earns 1; the policy is DQN's encoder with heads of its own."""
    config = settings(rnd=rnd, normalize_advantages=True, learning_rate=3e-4)
    agent = learn(replace(config, env=replace(config.env, obs_type="ram")), probes.RamBoth, 500)
    assert isinstance(agent.policy.trunk, RamMLP) and agent.replay.padding == "repeat"
    ram = torch.zeros(2, 2, 128, dtype=torch.uint8)
    ram[0, :, 7], ram[1, :, 7] = 0x2C, 0x24
    one, other = agent.policy(ram)[0].softmax(dim=1)[:, 1].tolist()
    assert one > 0.9 and other < 0.1


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_of_the_steps_that_were_played_are_normalized(normalize: bool) -> None:
    agent = filled(PPO_RND, normalize_advantages=normalize)
    rollout = agent.rollout
    rollout.valid.fill_(0.5)  # of the rollout before: stale
    rollout.indices.copy_(agent.replay.rollout(16))
    agent.compute_advantages()
    played = rollout.advantages[rollout.valid == 1]
    assert 0 < len(played) < rollout.advantages.numel(), "no game ended in the rollout"
    mean, std = played.mean().item(), played.std(correction=0).item()
    assert (mean == pytest.approx(0, abs=1e-5) and std == pytest.approx(1, abs=1e-4)) == normalize


def filled(tasks: TaskSettings = VECTOR_TASKS, probe: type = probes.DelayedReward, **changes: Any) -> PPOAgent:
    """An agent with a whole rollout that has not learned yet."""
    envs, agent = build(settings(tasks, **changes), probe)
    agent.update_policy = lambda: None
    for _ in islice(play(envs, agent, 1), 5 + 16):
        pass
    return agent


def with_clip(agent: PPOAgent, max_grad_norm: float) -> PPOAgent:
    """The agent with another setting, about to learn from the first rows of its rollout."""
    agent.config = replace(agent.config, agent=replace(agent.config.agent, max_grad_norm=max_grad_norm))
    agent._minibatch.copy_(torch.arange(len(agent._minibatch)))
    return agent


def curiosity(init_updates: int = 0) -> RND:
    spec = probes.spec_of_shape((1,))
    return RND(*make_rnd_networks(spec), spec, 3, gamma=0.9, init_updates=init_updates)


def test_the_bonus_is_divided_by_the_std_of_its_discounted_sums_along_time() -> None:
    rnd = curiosity()
    rollouts = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    sums, running = [], np.zeros(3)
    for bonus in rollouts:
        for step in bonus.numpy():
            running = 0.9 * running + step
            sums.append(running.copy())
        expected = bonus / np.std(sums)
        torch.testing.assert_close(rnd.rollout_rewards(bonus), expected.float(), rtol=1e-3, atol=1e-4)


def test_there_is_no_bonus_and_no_scale_until_the_predictor_has_learned() -> None:
    rnd = curiosity(init_updates=2)
    bonus, generator = torch.rand(5, 3) + 1, torch.Generator().manual_seed(0)
    for _ in range(2):
        assert not rnd.rollout_rewards(bonus).any()
        assert not rnd.forward_filter.returns.any() and rnd.reward_rms.count < 1
        rnd.predictor_loss(torch.ones(4), generator)
    assert (rnd.rollout_rewards(bonus) > 0).all() and rnd.reward_rms.count > 14


def test_the_statistics_take_in_a_rollout_after_all_that_used_the_old_ones() -> None:
    envs, agent = build(settings(), probes.DelayedReward)
    counts: dict[str, float] = {}

    def watched(name: str) -> Callable[[], None]:
        inner = getattr(agent, name)

        def call() -> None:
            counts.setdefault(name, agent.rnd.obs_rms.count.item())
            inner()

        return call

    names = ("compute_advantages", "update_policy", "update_normalizers")
    for name in names:
        setattr(agent, name, watched(name))
    for _ in islice(play(envs, agent, 1), 5 + 16):
        pass
    assert [round(counts[name]) for name in names] == [8 * 5] * 3
    assert round(agent.rnd.obs_rms.count.item()) == 8 * (5 + 16)


@pytest.mark.parametrize(("clip", "scale", "learned"), [(False, 1.0, 250.0), (True, 1.0, 1.0), (True, 0.1, 0.1)])
def test_rewards_are_learned_clipped_and_scaled(clip: bool, scale: float, learned: float) -> None:
    class Rich(probes.Probe):
        def reward(self, action: int) -> float:
            return 250.0

    agent = filled(replace(VECTOR_TASKS, reward_prediction=0.0), Rich, clip_rewards=clip, reward_scale=scale)
    returns = agent.rollout.returns_ext[agent.rollout.valid.bool()]
    torch.testing.assert_close(returns, torch.full_like(returns, learned))  # games of a step
    assert len(returns) > 0
    agent.policy.heads = lambda features: (None, torch.zeros(len(features)), None)
    assert agent.tasks.value_replay_loss().item() == pytest.approx(learned**2)
    assert agent.replay.rewards.max() == 250, "what is stored stays raw"


def test_the_weights_of_the_tasks_weight_their_gradients() -> None:
    gradients = {}
    for weight in (1.0, 3.0):
        agent = with_clip(filled(replace(VECTOR_TASKS, reward_prediction=weight, value_replay=0.0)), 0.0)
        agent._update_policy()
        head = agent.tasks.heads["reward_prediction"]
        gradients[weight] = torch.cat([p.grad.flatten() for p in head.parameters()])
    torch.testing.assert_close(gradients[3.0], 3 * gradients[1.0], rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_for_policy_and_predictor_each() -> None:
    agent = with_clip(filled(PPO_RND), 1e-3)
    agent._update_policy()
    for network in (agent.learners, agent.rnd.predictor):
        norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_every_task_is_clipped_alone_and_then_weighed() -> None:
    agent = with_clip(filled(replace(VECTOR_TASKS, reward_prediction=0.1, value_replay=0.0)), 1e-3)

    def gradients(weight: float) -> list[torch.Tensor]:
        state = agent.generator.get_state()
        agent.tasks.weights["reward_prediction"] = weight
        for optimizer in (agent.optimizer, agent.rnd_optimizer):
            optimizer.param_groups[0]["lr"] = 0.0  # the same network again
        agent._update_policy()
        agent.generator.set_state(state)
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in agent.learners.parameters()]

    without, some = gradients(1e-9), gradients(0.1)  # a weight of 0 would be another agent, without the task
    share = torch.stack([(b - a).norm() for a, b in zip(without, some, strict=True)]).norm().item()
    assert share == pytest.approx(0.1 * 1e-3, rel=0.02), (
        "the clip leaves the task its own 1e-3, of which it gets a tenth"
    )


def test_tasks_without_curiosity_start_with_sane_pixel_changes() -> None:
    agent = learn(settings(PICTURE_TASKS, num_envs=2, rnd=0.0), probes.Remember, 3 + 16 + 1)
    told = agent.metrics()
    assert agent.num_updates == 16 and told["pixel_control_loss"] < 5
    silent = {"rnd_loss", "int_reward_mean", "int_reward_max", "value_loss_int", "explained_variance_int"}
    assert not silent & set(told)


# ---------------------------------------------------------------- the run


def test_clocks_random_start_and_rollouts() -> None:
    envs, agent = build(settings(VECTOR_TASKS), probes.DelayedReward)
    epsilons, updates = [], []
    for _ in islice(play(envs, agent, 1), 5 + 16 + 16):
        epsilons.append(agent.epsilon)
        updates.append(agent.num_updates)
    assert epsilons == [1.0] * 4 + [0.0] * 33
    assert updates == [0] * 20 + [16] * 16 + [32]  # a rollout of 16 behind 5 random steps; a window is 3
    assert agent.rnd is not None and agent.rnd.obs_rms.count.item() == pytest.approx(8 * 37, abs=1)
    assert agent.batch_size == 16 * 8 // 4


def test_the_learning_rate_falls_to_its_end() -> None:
    config = settings(learning_rate=1e-3, learning_rate_end=1e-4, learning_rate_decay=1_000)
    envs, agent = build(config, probes.TimeLimit)
    rates = []
    for _ in islice(play(envs, agent, 1), 400):
        rates.append(agent.optimizer.param_groups[0]["lr"])
        assert agent.rnd_optimizer is not None and agent.rnd_optimizer.param_groups[0]["lr"] == rates[-1]
    steps = 8 * 11  # 21 steps of the vector environment, of which every second is a reset
    assert rates[0] == 1e-3 and rates[20] == pytest.approx(1e-3 - 0.9e-3 * steps / 1_000)
    assert rates[-1] == pytest.approx(1e-4)


def test_the_same_seed_gives_the_same_run() -> None:
    agents = [learn(settings(VECTOR_TASKS), probes.Both, 60) for _ in range(2)]
    one, two = (torch.cat([p.flatten() for p in agent.policy.parameters()]) for agent in agents)
    assert torch.equal(one, two)


def test_metrics_are_means_and_start_anew() -> None:
    agent = learn(settings(VECTOR_TASKS), probes.Both, 60)
    told = agent.metrics()
    assert set(agent.metric_names) - {"pixel_control_loss"} == set(told)
    assert all(np.isfinite(value) for value in told.values())
    curious = {"value_loss_int", "rnd_loss", "int_reward_mean", "int_return_mean", "explained_variance_int"}
    assert curious | {"policy_loss", "value_loss_ext", "clip_fraction", "explained_variance_ext"} <= set(told)
    assert {name for name in told if name.removesuffix("_loss") in TASKS} == {
        "reward_prediction_loss",
        "value_replay_loss",
    }, "pixel control has no weight"
    assert 0 < told["entropy"] <= np.log(2) + 1e-6 and told["approx_kl"] >= 0
    assert set(agent.metrics()) == {"buffer_fill", "learning_rate"}, "nothing was learned since"


def test_a_resumed_agent_fills_its_replay_before_it_learns() -> None:
    agent = learn(settings(VECTOR_TASKS), probes.Both, 60)
    state = copy.deepcopy(agent.state_dict())
    envs, twin = build(settings(VECTOR_TASKS), probes.Both)
    twin.load_state_dict(state)
    loop = play(envs, twin, 2)
    before = twin.num_updates
    for _ in islice(loop, 3 + 15):  # a window, and all but one step of a rollout
        pass
    assert twin.num_updates == before
    for _ in islice(loop, 2):
        pass
    assert twin.num_updates == before + 16


def test_with_its_replay_it_goes_on_at_once() -> None:
    agent = learn(settings(VECTOR_TASKS), probes.Both, 60)
    envs, twin = build(settings(VECTOR_TASKS), probes.Both)
    twin.load_state_dict(copy.deepcopy(agent.state_dict(replay=True)))
    before = twin.num_updates
    for _ in islice(play(envs, twin, 2), 16):
        pass
    assert twin.num_updates == before + 16


def test_bf16_agrees_with_fp32_within_its_precision() -> None:
    config = settings(PICTURE_TASKS, num_envs=4)
    envs, agent = build(config, probes.Remember)
    agent.update_policy = lambda: None
    for _ in islice(play(envs, agent, 1), 21):
        pass
    _, fast = build(replace(config, precision="bf16"), probes.Remember)
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    fast.load_state_dict(agent.state_dict(replay=True))
    for field in fields(Rollout):
        getattr(fast.rollout, field.name).copy_(getattr(agent.rollout, field.name))
    rows = torch.arange(64)

    def rnd_loss(learner: PPOAgent) -> float:
        frames, features = learner._frames(learner.rollout.after[rows]), learner.rollout.features[rows]
        errors = learner.rnd.errors_against(frames, features)
        return learner.rnd.predictor_loss(errors, learner.generator).item()

    with torch.no_grad():
        slow_loss, slow_told = agent._policy_loss(rows)
        with fast._autocast:
            fast_loss, fast_told = fast._policy_loss(rows)
            fast_rnd = rnd_loss(fast)
        assert fast_rnd == pytest.approx(rnd_loss(agent), rel=0.05)
    assert fast_loss.item() == pytest.approx(slow_loss.item(), rel=0.02, abs=0.02)
    assert fast_told.keys() == slow_told.keys() and len(slow_told) == 6
    fast_values, slow_values = torch.stack([*fast_told.values()]), torch.stack([*slow_told.values()])
    torch.testing.assert_close(fast_values, slow_values, rtol=0.05, atol=0.02)

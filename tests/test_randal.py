"""RANDAL: its networks, what its switches build, probe environments, auxiliary tasks alone, and what it remembers."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import probes
import pytest
import torch
from randal_helpers import PICTURE_TASKS, PPO_RND, VECTOR_TASKS, build, learn, ring_of, settings

import gravitar_dqn
from gravitar_dqn import RANDAL, NatureCNN, PPOConfig, PPOIntrinsic, PredictorCNN, PredictorMLP
from gravitar_dqn.config import TasksConfig, UserError
from gravitar_dqn.envs import EnvSpec
from gravitar_dqn.execution import choose_precision
from gravitar_dqn.randal.curiosity import Curiosity
from gravitar_dqn.randal.networks import MLP, PixelControl, RamMLP, RewardPrediction
from gravitar_dqn.randal.tasks import TASKS, AuxiliaryTasks
from gravitar_dqn.training import play


def values(agent: RANDAL, *obs: float) -> torch.Tensor:
    with torch.no_grad():
        return agent.policy(torch.tensor(obs).view(-1, 1))[1]


def probabilities(agent: RANDAL, *obs: float) -> torch.Tensor:
    with torch.no_grad():
        return agent.policy(torch.tensor(obs).view(-1, 1))[0].softmax(dim=1)[:, 1]


# ---------------------------------------------------------------- names and networks


def test_the_published_names_can_be_imported() -> None:
    for name in (
        "RANDAL PPOIntrinsic PPOConfig PredictorCNN PredictorMLP RANDALTrainer RANDALTrainerConfig RunningMeanStd "
        "RewardForwardFilter"
    ).split():
        assert getattr(gravitar_dqn, name).__name__ == name
        assert name in dir(gravitar_dqn)
    with pytest.raises(AttributeError, match="Randal"):
        _ = gravitar_dqn.Randal


def test_shapes() -> None:
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    network = PPOIntrinsic(NatureCNN, (4, 84, 84), 18)
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
    network = PPOIntrinsic(NatureCNN, (4, 84, 84), 6)
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
    assert agent.curiosity is None and agent.rnd_optimizer is None
    agent.tasks.see = agent.look = lambda *_: pytest.fail("nobody needs statistics of frames")
    for _ in islice(play(envs, agent, 1), 17):
        pass
    assert agent.num_updates == 16
    assert len(agent.tasks.heads) == 0 and agent.tasks.losses() == {}
    assert agent.replay.num_rows == 16 + 1 + 3, "the rollout and its stacks"
    assert sum(p.numel() for p in agent.learners.parameters()) == sum(p.numel() for p in agent.policy.parameters())


def test_pixel_control_of_vectors_is_refused() -> None:
    with pytest.raises(UserError, match="pixel control needs pictures"):
        build(settings(TasksConfig()), probes.Both)


def test_without_curiosity_it_starts_at_once_and_learns() -> None:
    agent = learn(settings(rnd=0.0), probes.ActionMatters, 16 * 12 + 1)
    assert agent.num_updates == 12 * 16
    assert probabilities(agent, 0.0).item() > 0.9
    assert np.isnan(agent.metrics()["pixel_control_loss"])


# ---------------------------------------------------------------- probes

LEARNERS = {"ppo-rnd": PPO_RND, "randal": VECTOR_TASKS, "randal, gae": replace(VECTOR_TASKS, returns="gae")}


@pytest.fixture(params=LEARNERS.values(), ids=LEARNERS)
def tasks(request: pytest.FixtureRequest) -> TasksConfig:
    result: TasksConfig = request.param
    return result


def test_probe_constant_reward(tasks: TasksConfig) -> None:
    agent = learn(settings(tasks), probes.ConstantReward, 300)
    torch.testing.assert_close(values(agent, 0.0), torch.ones(1), atol=0.05, rtol=0)


def test_probe_reward_tells_the_observation(tasks: TasksConfig) -> None:
    agent = learn(settings(tasks), probes.ObservedReward, 400)
    torch.testing.assert_close(values(agent, 1.0, -1.0), torch.tensor([1.0, -1.0]), atol=0.1, rtol=0)


def test_probe_delayed_reward(tasks: TasksConfig) -> None:
    agent = learn(settings(tasks), probes.DelayedReward, 500)
    torch.testing.assert_close(values(agent, 0.0, 1.0), torch.tensor([0.5, 1.0]), atol=0.1, rtol=0)


def test_probe_action_matters(tasks: TasksConfig) -> None:
    agent = learn(settings(tasks), probes.ActionMatters, 400)
    assert probabilities(agent, 0.0).item() > 0.95


def test_probe_action_and_observation(tasks: TasksConfig) -> None:
    agent = learn(settings(tasks), probes.Both, 500)
    one, other = probabilities(agent, 1.0, -1.0).tolist()
    assert one > 0.95 and other < 0.05


def test_probe_time_out_bootstraps(tasks: TasksConfig) -> None:
    agent = learn(settings(tasks), probes.TimeLimit, 500)
    torch.testing.assert_close(values(agent, 0.0), torch.full((1,), 2.0), atol=0.2, rtol=0)


@pytest.mark.parametrize(("optimizer", "kind"), [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)])
def test_both_optimizers_learn(optimizer: str, kind: type) -> None:
    agent = learn(settings(optimizer=optimizer), probes.ActionMatters, 300)
    assert type(agent.optimizer) is kind and type(agent.rnd_optimizer) is kind
    assert probabilities(agent, 0.0).item() > 0.9


@pytest.mark.parametrize(
    "tasks", [PPO_RND, pytest.param(PICTURE_TASKS, marks=pytest.mark.slow)], ids=["ppo-rnd", "randal"]
)
def test_probe_remember_needs_the_stack(tasks: TasksConfig) -> None:
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
    agent._played.fill_(0.5)  # of the rollout before: stale
    agent._positions.copy_(agent.replay.rollout(16))
    agent.finish()
    played = agent._advantages[agent._played == 1]
    assert 0 < len(played) < agent._advantages.numel(), "no game ended in the rollout"
    mean, std = played.mean().item(), played.std(correction=0).item()
    assert (mean == pytest.approx(0, abs=1e-5) and std == pytest.approx(1, abs=1e-4)) == normalize


def filled(tasks: TasksConfig = VECTOR_TASKS, probe: type = probes.DelayedReward, **changes: Any) -> RANDAL:
    """An agent with a whole rollout that has not learned yet."""
    envs, agent = build(settings(tasks, **changes), probe)
    agent.learn = lambda: None
    for _ in islice(play(envs, agent, 1), 5 + 16):
        pass
    return agent


def test_the_bonus_is_divided_by_the_std_of_its_discounted_sums_along_time() -> None:
    curiosity = Curiosity(PredictorMLP, (1,))
    curiosity.attach(num_envs=3, gamma=0.9)
    rollouts = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    sums, running = [], np.zeros(3)
    for bonus in rollouts:
        for step in bonus.numpy():
            running = 0.9 * running + step
            sums.append(running.copy())
        expected = bonus / np.std(sums)
        torch.testing.assert_close(curiosity.rewards(bonus), expected.float(), rtol=1e-3, atol=1e-4)


def test_there_is_no_bonus_and_no_scale_until_the_predictor_has_learned() -> None:
    curiosity = Curiosity(PredictorMLP, (1,))
    curiosity.attach(num_envs=3, gamma=0.9, init_updates=2)
    bonus, generator = torch.rand(5, 3) + 1, torch.Generator().manual_seed(0)
    for _ in range(2):
        assert not curiosity.rewards(bonus).any()
        assert not curiosity.forward_filter.returns.any() and curiosity.reward_rms.count < 1
        curiosity.loss(torch.ones(4), generator)
    assert (curiosity.rewards(bonus) > 0).all() and curiosity.reward_rms.count > 14


def test_the_statistics_take_in_a_rollout_after_all_that_used_the_old_ones() -> None:
    envs, agent = build(settings(), probes.DelayedReward)
    counts: dict[str, float] = {}

    def watched(name: str) -> Callable[[], None]:
        inner = getattr(agent, name)

        def call() -> None:
            counts.setdefault(name, agent.curiosity.obs_rms.count.item())
            inner()

        return call

    agent.finish, agent.learn, agent.look = watched("finish"), watched("learn"), watched("look")
    for _ in islice(play(envs, agent, 1), 5 + 16):
        pass
    assert [round(counts[name]) for name in ("finish", "learn", "look")] == [8 * 5] * 3
    assert round(agent.curiosity.obs_rms.count.item()) == 8 * (5 + 16)


@pytest.mark.parametrize(("clip", "scale", "learned"), [(False, 1.0, 250.0), (True, 1.0, 1.0), (True, 0.1, 0.1)])
def test_rewards_are_learned_clipped_and_scaled(clip: bool, scale: float, learned: float) -> None:
    class Rich(probes.Probe):
        def reward(self, action: int) -> float:
            return 250.0

    agent = filled(replace(VECTOR_TASKS, reward_prediction=0.0), Rich, clip_rewards=clip, reward_scale=scale)
    played = agent._played.bool()
    torch.testing.assert_close(agent._returns[0][played], torch.full((int(played.sum()),), learned))  # games of a step
    agent.policy.heads = lambda features: (None, torch.zeros(len(features)), None)
    assert agent.tasks.value_replay_loss().item() == pytest.approx(learned**2)
    assert agent.replay.rewards.max() == 250, "what is stored stays raw"


def test_the_weights_of_the_tasks_weight_their_gradients() -> None:
    gradients = {}
    for weight in (1.0, 3.0):
        agent = filled(replace(VECTOR_TASKS, reward_prediction=weight, value_replay=0.0))
        agent.ppo = replace(agent.ppo, grad_clip=0.0)
        agent._rows.copy_(torch.arange(len(agent._rows)))
        agent._learn()
        head = agent.tasks.heads["reward_prediction"]
        gradients[weight] = torch.cat([p.grad.flatten() for p in head.parameters()])
    torch.testing.assert_close(gradients[3.0], 3 * gradients[1.0], rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_for_policy_and_predictor_each() -> None:
    agent = filled(PPO_RND)
    agent.ppo = replace(agent.ppo, grad_clip=1e-3)
    agent._rows.copy_(torch.arange(len(agent._rows)))
    agent._learn()
    for network in (agent.learners, agent.curiosity.predictor):
        norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_every_task_is_clipped_alone_and_then_weighed() -> None:
    agent = filled(replace(VECTOR_TASKS, reward_prediction=0.1, value_replay=0.0))
    agent.ppo = replace(agent.ppo, grad_clip=1e-3)
    agent._rows.copy_(torch.arange(len(agent._rows)))

    def gradients(weight: float) -> list[torch.Tensor]:
        state = agent.generator.get_state()
        agent.tasks.weights["reward_prediction"] = weight
        agent.optimizer.param_groups[0]["lr"] = agent.rnd_optimizer.param_groups[0]["lr"] = (
            0.0  # the same network again
        )
        agent._learn()
        agent.generator.set_state(state)
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in agent.learners.parameters()]

    without, some = gradients(0.0), gradients(0.1)
    share = torch.stack([(b - a).norm() for a, b in zip(without, some, strict=True)]).norm().item()
    assert share == pytest.approx(0.1 * 1e-3, rel=0.02), (
        "the clip leaves the task its own 1e-3, of which it gets a tenth"
    )


def test_the_pixel_range_is_0_to_255_until_something_was_seen() -> None:
    tasks = AuxiliaryTasks(dict.fromkeys(TASKS, 1.0), PPOIntrinsic(NatureCNN, (4, 84, 84), 2), 2)
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(tasks.norm_obs(pixels), torch.tensor([0.0, 0.2, 1.0]))
    tasks.see(torch.tensor([51, 102], dtype=torch.uint8))
    torch.testing.assert_close(tasks.norm_obs(pixels), torch.tensor([-1.0, 0.0, 4.0]))


def test_tasks_without_curiosity_start_with_sane_pixel_changes() -> None:
    agent = learn(settings(PICTURE_TASKS, num_envs=2, rnd=0.0), probes.Remember, 3 + 16 + 1)
    told = agent.metrics()
    assert agent.num_updates == 16 and told["pixel_control_loss"] < 5
    silent = ("rnd_loss", "int_reward_mean", "int_reward_max", "value_loss_int", "explained_variance_int")
    assert all(np.isnan(told[name]) for name in silent)


def test_choosing_is_even_and_only_among_what_can_be_sampled() -> None:
    ends = np.zeros((30, 2), dtype=bool)
    ends[[4, 11, 17], 0] = True
    frames = np.zeros((31, 2, 3), dtype=np.float32)
    ring = ring_of(frames, np.zeros((30, 2), dtype=np.int64), np.zeros((30, 2)), ends, stack=1, n_step=3)
    eligible = torch.zeros_like(ring.playable)
    eligible[:, 0] = True
    positions, found = ring.choose(eligible, 6_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(positions, minlength=ring.playable.numel()).view_as(ring.playable)
    allowed = (ring.weights > 0) & eligible
    assert bool(found) and not counts[~allowed].any(), "dummy rows, rows at the cursor, or another environment's"
    assert allowed.sum() == 27 - 3 + 1  # rows 5 and 12 are dummies, and 18
    assert counts[allowed].float().std() < 0.15 * counts[allowed].float().mean()


# ---------------------------------------------------------------- each auxiliary task alone


def falls(tasks: AuxiliaryTasks, loss: Callable[[], torch.Tensor], steps: int, rate: float) -> tuple[float, float]:
    """The loss before and after so many gradient steps of the task alone."""
    network = torch.nn.ModuleList([tasks.policy, tasks])
    optimizer = torch.optim.Adam(network.parameters(), rate)
    history = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    return float(np.mean(history[:3])), float(np.mean(history[-5:]))


def task_alone(name: str, ring: Any, policy: PPOIntrinsic, num_actions: int, **changes: Any) -> AuxiliaryTasks:
    weights = {task: float(task == name) for task in TASKS}
    tasks = AuxiliaryTasks(weights, policy, num_actions)
    tasks.attach(settings(replace(PICTURE_TASKS, **changes)), ring, torch.Generator().manual_seed(0))
    return tasks


def test_pixel_control_learns_which_action_changes_which_cell() -> None:
    """Action 1 inverts the upper left corner, action 0 nothing; with discount 0 every target can be known."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    actions = random.integers(0, 2, (40, 2))
    frames = np.zeros((41, 2, 84, 84), dtype=np.uint8)
    for t in range(40):
        frames[t + 1] = frames[t]
        frames[t + 1, actions[t] == 1, :40, :40] = 255 - frames[t, actions[t] == 1, :40, :40]
    ring = ring_of(frames, actions, np.zeros((40, 2)), n_step=3)
    policy = PPOIntrinsic(NatureCNN, (4, 84, 84), 2)
    tasks = task_alone("pixel_control", ring, policy, 2, pixel_gamma=0.0)
    tasks.see(ring.frames[:-1])
    before, after = falls(tasks, tasks.pixel_control_loss, 80, 3e-4)
    assert before > 0.03 and after < 0.05 * before
    with torch.no_grad():
        cells = tasks.heads["pixel_control"](policy.trunk(ring.latest()))[0]
    assert (
        cells[1, :9, :9].mean() > 0.8 and cells[0, :9, :9].abs().mean() < 0.2 and cells[1, 12:, 12:].abs().mean() < 0.2
    )


def test_reward_prediction_learns_what_comes_before_a_reward() -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    kinds = random.choice([0, 1, 2], (60, 2), p=[0.7, 0.2, 0.1])
    frames = np.zeros((61, 2, 3), dtype=np.float32)
    frames[:-1] = np.eye(3, dtype=np.float32)[kinds]
    ring = ring_of(frames, np.zeros((60, 2), dtype=np.int64), np.array([0.0, 250.0, -1.0])[kinds], stack=1, n_step=3)
    tasks = task_alone("reward_prediction", ring, PPOIntrinsic(MLP, (3,), 2), 2, reward_batch=32)
    before, after = falls(tasks, tasks.reward_prediction_loss, 150, 3e-3)
    assert before > 0.5 and after < 0.02


def test_nothing_rewarded_yet_is_no_error() -> None:
    ring = ring_of(
        np.zeros((11, 2, 3), dtype=np.float32), np.zeros((10, 2), dtype=np.int64), np.zeros((10, 2)), stack=1
    )
    tasks = task_alone("reward_prediction", ring, PPOIntrinsic(MLP, (3,), 2), 2)
    loss = tasks.reward_prediction_loss()
    loss.backward()
    assert torch.isfinite(loss)


def test_value_replay_learns_returns_that_the_policy_never_saw() -> None:
    """Games of one step whose score is what was seen."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    frames = random.choice([-1.0, 0.0, 1.0], (61, 2, 1)).astype(np.float32)
    ends = np.ones((60, 2), dtype=bool)
    ring = ring_of(frames, np.zeros((60, 2), dtype=np.int64), frames[:-1, :, 0], ends, stack=1, n_step=3)
    policy = PPOIntrinsic(MLP, (1,), 2)
    tasks = task_alone("value_replay", ring, policy, 2, num_windows=16)
    before, after = falls(tasks, tasks.value_replay_loss, 200, 3e-3)
    assert before > 0.1 and after < 0.01
    seen = torch.tensor([[-1.0], [0.0], [1.0]])
    torch.testing.assert_close(policy(seen)[1], seen[:, 0], atol=0.1, rtol=0)


# ---------------------------------------------------------------- the run


def test_clocks_random_start_and_rollouts() -> None:
    envs, agent = build(settings(VECTOR_TASKS), probes.DelayedReward)
    epsilons, updates = [], []
    for _ in islice(play(envs, agent, 1), 5 + 16 + 16):
        epsilons.append(agent.epsilon)
        updates.append(agent.num_updates)
    assert epsilons == [1.0] * 4 + [0.0] * 33
    assert updates == [0] * 20 + [16] * 16 + [32]  # a rollout of 16 behind 5 random steps; a window is 3
    assert agent.curiosity is not None and agent.curiosity.obs_rms.count.item() == pytest.approx(8 * 37, abs=1)
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
    assert set(agent.metric_names) <= set(told)
    finite = {name for name, value in told.items() if np.isfinite(value)}
    assert set(told) - finite == {"epsilon", "td_loss", "q_mean", "pixel_control_loss"}
    assert 0 < told["entropy"] <= np.log(2) + 1e-6 and told["approx_kl"] >= 0
    assert np.isnan(agent.metrics()["entropy"]) and np.isnan(agent.metrics()["int_reward_max"])


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
    agent.learn = lambda: None
    for _ in islice(play(envs, agent, 1), 21):
        pass
    _, fast = build(replace(config, precision="bf16"), probes.Remember)
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    fast.load_state_dict(agent.state_dict(replay=True))
    for name in ("_positions", "_kept", "_advantages", "_returns", "_played", "_features"):
        getattr(fast, name).copy_(getattr(agent, name))
    rows = torch.arange(64)
    with torch.no_grad():
        slow_loss, slow_told = agent._policy_loss(rows)
        with fast._autocast:
            fast_loss, fast_told = fast._policy_loss(rows)
            rnd = fast._rnd_loss(rows).item()
        assert rnd == pytest.approx(agent._rnd_loss(rows).item(), rel=0.05)
    assert fast_loss.item() == pytest.approx(slow_loss.item(), rel=0.02, abs=0.02)
    torch.testing.assert_close(torch.stack(fast_told), torch.stack(slow_told), rtol=0.05, atol=0.02)


def test_the_predictors_loss_and_pixel_range_by_their_public_names() -> None:
    torch.manual_seed(0)
    agent = RANDAL(NatureCNN, PredictorCNN, (4, 84, 84), 6, PPOConfig(device="cpu"), intr_coeff=1.0)
    agent.attach(settings(PICTURE_TASKS, num_envs=2), EnvSpec((84, 84), torch.uint8, 6))
    frames = torch.randint(10, 200, (8, 1, 84, 84), dtype=torch.uint8)
    frames[0, 0, 0, :2] = torch.tensor([10, 199], dtype=torch.uint8)
    agent.tasks.see(frames)
    scaled = agent.norm_obs(frames)
    torch.testing.assert_close(scaled, (frames.float() - 10) / 189)
    mean, std = frames.float().mean(dim=0), torch.full((1, 84, 84), 50.0)
    z = ((frames.float() - mean) / std).clamp(-5, 5)
    with torch.no_grad():
        expected = (agent.curiosity.predictor(z) - agent.curiosity.target(z)).square().mean()
    torch.testing.assert_close(agent.predictor_loss(frames, mean, std), expected)  # 2 environments: all rows count
    q_values, targets = torch.randn(3, 6, 21, 21), torch.randn(3, 21, 21)
    chosen = torch.stack([q_values[0, 5], q_values[1, 0], q_values[2, 2]])
    torch.testing.assert_close(
        agent.pixel_loss(q_values, torch.tensor([5, 0, 2]), targets), 0.5 * (chosen - targets).square().mean()
    )

"""Each fault of the reference, its form failing the check that ours passes: see gravitar_dqn/agents/README.md."""

from itertools import islice
from pathlib import Path

import numpy as np
import probes
import pytest
import torch
import torch.nn.functional as F
from ppo_helpers import PICTURE_TASKS, VECTOR_TASKS, build, learn, ring_of, settings, task_alone
from replay_helpers import nbytes

from gravitar_dqn import losses
from gravitar_dqn.cli import commands
from gravitar_dqn.encoders import MLP
from gravitar_dqn.loop import play
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.rnd import RND, RewardForwardFilter, RunningMeanStd, make_rnd_networks


def test_the_intrinsic_value_has_a_head_of_its_own() -> None:
    network = ActorCritic(MLP, (3,), 2)
    for head, other in ((network.value_int, network.value_ext), (network.value_ext, network.value_int)):
        _, value_ext, value_int = network(torch.randn(4, 3))
        value = value_int if head is network.value_int else value_ext
        network.zero_grad()
        losses.value_loss(value, torch.ones(4), torch.ones(4)).backward()
        assert head[0].weight.grad is not None and head[0].weight.grad.abs().sum() > 0
        assert other[0].weight.grad is None, "the fault: one head learns both returns"


def test_coefficients_weight_advantages_and_not_value_losses() -> None:
    config = settings(rnd=0.25, ext_coef=4.0)
    envs, agent = build(config, probes.DelayedReward)
    agent.update_policy = lambda: None
    bonuses: list[torch.Tensor] = []
    int_rewards = agent._int_rewards
    agent._int_rewards = lambda rnd: bonuses.append(int_rewards(rnd)) or bonuses[-1]  # type: ignore[func-returns-value]
    for _ in islice(play(envs, agent, 1), 5 + 16):
        pass
    rollout = agent.rollout
    adv_ext = rollout.returns_ext.view(16, 8) - rollout.values_ext[:-1]
    adv_int = rollout.returns_int.view(16, 8) - rollout.values_int[:-1]
    never = torch.zeros(16, 8, dtype=torch.bool)
    weighed = losses.gae(0.25 * bonuses[0], rollout.values_int, config.rnd.gamma, 0.95, never, never)
    torch.testing.assert_close(adv_int, weighed)
    torch.testing.assert_close(rollout.advantages.view(16, 8), 4.0 * adv_ext + adv_int)
    assert adv_ext.abs().max() > 0.1 and bonuses[0].abs().max() > 0.1
    # The reference: the sum unweighted, coefficients before the value losses.
    assert not torch.allclose(rollout.advantages.view(16, 8), adv_ext + adv_int, atol=1e-3)
    loss, told = agent._policy_loss(torch.arange(128))
    values = told["value_loss_ext"] + told["value_loss_int"]
    torch.testing.assert_close(loss, told["policy_loss"] - config.agent.ent_coef * told["entropy"] + values)


def test_no_games_end_cuts_the_intrinsic_returns() -> None:
    config = settings(rnd=1.0)
    envs, agent = build(config, probes.ConstantReward)  # a game a step
    agent.update_policy = lambda: None
    for _ in islice(play(envs, agent, 1), 5 + 16):
        pass
    bonus = torch.ones(16, 8)  # whatever it was: recompute both forms from the same numbers
    values = agent.rollout.values_int
    ends = agent.replay.terminations.view(-1)[agent.rollout.indices[:-1]]
    assert ends.any()
    never = torch.zeros_like(ends)
    ours = losses.gae(bonus, values, 0.99, 0.95, never, never)
    cut = losses.gae(bonus, values, 0.99, 0.95, ends, ends)
    assert (ours[0] > 4 * cut[0]).all(), "uncut sums grow with the rollout"
    # What the agent holds is the uncut form, of its own bonuses.
    agent.rnd.rollout_rewards = lambda _: bonus
    agent._compute_advantages()
    torch.testing.assert_close(agent.rollout.returns_int.view(16, 8), ours + values[:-1])


def picture_rnd(**options: float) -> RND:
    spec = probes.spec_of_shape((4, 84, 84))
    return RND(*make_rnd_networks(spec), spec, 8, gamma=0.99, init_updates=0, **options)


def test_what_curiosity_sees_is_not_divided_by_255() -> None:
    rnd = picture_rnd()
    frames = torch.randint(0, 200, (64, 1, 84, 84), dtype=torch.uint8)
    rnd.obs_rms.update(frames)
    z = rnd.normalized(frames)
    expected = (frames.double() - frames.double().mean(dim=0)) / frames.double().std(dim=0, correction=0)
    torch.testing.assert_close(z, expected.float(), rtol=1e-3, atol=1e-3)
    assert z.std() == pytest.approx(1, abs=0.01)
    assert (z / 255).std() < 0.01, "the fault: every frame looks the same"
    frames[:] = 255
    assert rnd.normalized(frames).max() < 5 and rnd.normalized(frames * 0 + 255).min() > 0.5


def test_every_row_trains_the_predictor_and_an_empty_mask_is_no_nan() -> None:
    rnd = build(settings(num_envs=128), probes.Both)[1].rnd
    generator = torch.Generator().manual_seed(0)
    used = torch.zeros(64)
    for _ in range(60):
        errors = torch.ones(64, requires_grad=True)
        rnd.predictor_loss(errors, generator).backward()
        used += errors.grad > 0
    assert (used > 0).all(), "the fault: only the first rows"
    assert 0.2 < used.mean() / 60 < 0.3
    empty = picture_rnd(trained_envs=0).predictor_loss(torch.ones(8), generator)
    assert empty.item() == 0.0
    assert torch.isnan((torch.ones(8) * 0).sum() / torch.zeros(8).sum()), "the fault"


def test_value_replay_compares_equal_shapes() -> None:
    values, targets = torch.tensor([0.0, 10.0]), torch.tensor([0.0, 10.0])
    assert losses.value_loss(values, targets, torch.ones(2)).item() == 0.0
    assert F.mse_loss(values.unsqueeze(1).expand(2, 2), targets.expand(2, 2)).item() == 50.0, "the fault: broadcast"
    agent = learn(settings(VECTOR_TASKS), probes.ObservedReward, 5 + 17)
    seen = []
    agent.policy.trunk.forward = lambda obs: seen.append(obs.squeeze(1)) or obs
    agent.policy.heads = lambda features: (None, features.squeeze(1), None)  # values that are right: what is seen
    assert agent.tasks.value_replay_loss().item() == pytest.approx(0.0, abs=1e-10)
    assert set(seen[0].tolist()) == {1.0, -1.0}, "each value pulled to the mean return would have an error of 1"


def test_one_lit_block_lights_one_cell() -> None:
    frames = torch.zeros(1, 2, 84, 84)
    frames[0, 1, 8:12, 16:20] = 1.0
    changes = losses.pixel_changes(frames)[0, 0]
    assert changes[2, 4].item() == 1.0 and changes.sum().item() == 1.0
    reshaped = (frames[:, 1] - frames[:, 0]).abs().reshape(-1, 4, 4, 21, 21).mean(dim=(1, 2))
    assert (reshaped > 0).sum() > 1, "the fault: pixels from all over"


def test_the_pixel_return_has_the_last_reward_and_each_steps_own_end() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]).view(2, 3, 1, 1)
    best = torch.full((2, 3, 1, 1), 10.0)
    ours = losses.window_returns(rewards, best, torch.tensor([3, 2]), torch.tensor([False, True]), 0.5)
    assert ours[0].flatten().tolist() == [1 + 0.5 * (2 + 0.5 * (4 + 5.0)), 2 + 0.5 * (4 + 5.0), 4 + 5.0]
    assert ours[1, :2].flatten().tolist() == [1 + 0.5 * 2, 2.0]  # dead after the second step
    dropped = 1 + 0.5 * (2 + 0.5 * 10.0)  # the fault: bootstraps in place of the last reward
    assert ours[0, 0].item() != dropped


def test_a_pixel_change_belongs_to_the_action_that_made_it() -> None:
    steps = 12
    random = np.random.default_rng(0)
    actions = random.integers(0, 2, (steps, 1))
    frames = np.zeros((steps + 1, 1, 84, 84), dtype=np.uint8)
    for t in range(steps):  # action 1 inverts the corner
        frames[t + 1] = frames[t]
        if actions[t, 0]:
            frames[t + 1, :, :4, :4] = 255 - frames[t, :, :4, :4]
    ring = ring_of(frames, actions, np.zeros((steps, 1)), n_step=3)
    tasks = task_alone("value_replay", ring, ActorCritic(MLP, (3,), 2))
    tasks.update_pixel_range(ring.frames[:-1])
    windows = ring.windows(64, tasks.generator)
    changed = tasks.pixel_rewards(windows)[:, :, 0, 0]
    did = ring.actions.view(-1)[windows.indices[:, :-1]].float()
    torch.testing.assert_close(changed, did)
    assert not torch.allclose(changed[:, 1:], did[:, :-1]), "the fault: the action before"


def test_statistics_do_not_overflow() -> None:
    frames = torch.full((300, 1, 84, 84), 200, dtype=torch.uint8)
    frames[:100] = 50
    statistics = RunningMeanStd((1, 84, 84))
    for chunk in frames.split(30):
        statistics.update(chunk)
    assert statistics.mean.dtype == torch.float64 and statistics.mean.shape == (1, 84, 84)
    torch.testing.assert_close(statistics.mean, torch.full((1, 84, 84), 150.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.std, torch.full((1, 84, 84), 5000.0).sqrt(), rtol=1e-4, atol=0)
    assert (frames.sum(dim=0, dtype=torch.uint8).float() / 300).max() < 1, "the fault"


def test_the_predicted_reward_is_the_sampled_pairs_own() -> None:
    steps, num_envs = 20, 4
    random = np.random.default_rng(0)
    rewards = random.choice([0.0, 1.0, -1.0], (steps, num_envs), p=[0.6, 0.2, 0.2])
    frames = np.zeros((steps + 1, num_envs, 2), dtype=np.float32)
    frames[:-1, :, 0], frames[:-1, :, 1] = rewards, np.arange(num_envs)  # a frame tells its step's reward
    ring = ring_of(frames, np.zeros((steps, num_envs), dtype=np.int64), rewards, stack=1, n_step=2)
    indices, found = ring.sample_where(ring.rewards != 0, 200, torch.Generator().manual_seed(0))
    assert bool(found)
    labels = losses.reward_classes(ring.rewards.view(-1)[indices])
    seen = ring.stacks(indices)[:, 0]
    assert torch.equal(labels, losses.reward_classes(seen)) and (labels > 0).all()
    assert set(ring.stacks(indices)[:, 1].tolist()) == {0.0, 1.0, 2.0, 3.0}, "every environment is drawn from"
    # As the loss sees it: a head that reads the label off its own frame has no error.
    tasks = task_alone("reward_prediction", ring, ActorCritic(MLP, (2,), 2))
    tasks.policy.trunk.forward = lambda obs: obs
    tasks.heads["reward_prediction"].forward = lambda obs: 50 * F.one_hot(losses.reward_classes(obs[:, 0]), 3).float()
    assert tasks.reward_prediction_loss().item() == pytest.approx(0.0, abs=1e-6)
    neighbours = ring.rewards.view(-1)[(indices + 1) % ring.rewards.numel()]
    assert not torch.equal(labels, losses.reward_classes(neighbours)), "the fault: another environment's"


def test_certain_predictions_have_a_finite_loss() -> None:
    logits, label = torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([1])
    assert F.cross_entropy(logits, label).item() == pytest.approx(400.0)
    assert torch.isinf(-logits.softmax(dim=1).log()[0, 1]), "the fault: softmax, then log"
    agent = learn(settings(VECTOR_TASKS), probes.ObservedReward, 5 + 17)
    for parameter in agent.tasks.heads["reward_prediction"].parameters():
        parameter.data *= 1e4
    assert torch.isfinite(agent.tasks.reward_prediction_loss())


def test_a_time_out_bootstraps() -> None:
    value = torch.tensor([[0.0], [2.0]])
    reward, yes, no = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    assert losses.gae(reward, value, 0.5, 0.95, no, yes).item() == 2.0
    assert losses.gae(reward, value, 0.5, 0.95, yes, yes).item() == 1.0, "the fault"
    agent = learn(settings(VECTOR_TASKS), probes.TimeLimit, 500)  # every step ends in a time-out: 1 / (1 - 0.5)
    value_ext = agent.policy(torch.zeros(1, 1))[1].item()
    assert value_ext == pytest.approx(2.0, abs=0.25)


def test_the_replay_holds_single_frames() -> None:
    replay = build(settings(PICTURE_TASKS, num_envs=2), probes.Remember)[1].replay
    assert replay.frames.shape == (2 * (60 + 3 + 3) + 1, 84, 84), "60 steps, a window and a stack around the cursor"
    beside = (nbytes(replay) - replay.frames.nbytes) / (2 * replay.num_rows)
    whole = 2000 * 32 * (84 * 84 + beside)  # as published
    assert whole < 0.43 * 2**30 < 1.68 * 2**30 < 4 * whole, "the fault: 1.7 GiB of stacks"


def test_a_checkpoint_holds_every_statistic() -> None:
    agent = learn(settings(VECTOR_TASKS, rnd=0.5), probes.Both, 60)
    state = agent.state_dict()
    twin = build(settings(VECTOR_TASKS, rnd=0.5), probes.Both)[1]
    twin.load_state_dict(state)
    assert isinstance(twin.rnd.forward_filter, RewardForwardFilter)
    assert agent.rnd.forward_filter.returns.abs().sum() > 0
    flat, again = (torch.cat([v.double().flatten() for v in a.rnd.state_dict().values()]) for a in (agent, twin))
    assert torch.equal(flat, again)
    for mine, theirs in ((agent.optimizer, twin.optimizer), (agent.rnd_optimizer, twin.rnd_optimizer)):
        one, two = mine.state_dict()["state"], theirs.state_dict()["state"]
        assert len(one) > 4 and all(torch.equal(one[k]["exp_avg"], two[k]["exp_avg"]) for k in one)
    assert torch.equal(agent.tasks.pixel_range, twin.tasks.pixel_range)
    assert torch.equal(agent.generator.get_state(), twin.generator.get_state())
    assert twin._random_left == 0 and twin.global_step == agent.global_step


def test_it_can_be_built_for_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "randal-cartpole --rnd.init-steps 10 --total-steps 2000 --device cpu --dashboard off --video-every 0"
    argv = [*words.split(), "--run-dir", str(tmp_path / "run")]
    assert commands.run(commands.train_command, argv, "train.py") == 0
    assert "done: 20" in capsys.readouterr().err

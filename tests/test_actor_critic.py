"""The mathematics of actor-critics and auxiliary tasks against slow loops and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gravitar_dqn import losses

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0], [2.0], [3.0]])
    values = torch.tensor([[0.5], [1.0], [1.5], [2.0]])
    no = torch.zeros(3, 1, dtype=torch.bool)
    # deltas: 1 + .9 - .5... with gamma 0.9: 1.4, 2.35, 3.3; gamma lambda 0.45
    expected = torch.tensor([[1.4 + 0.45 * (2.35 + 0.45 * 3.3)], [2.35 + 0.45 * 3.3], [3.3]])
    torch.testing.assert_close(losses.gae(rewards, values, 0.9, 0.5, no, no), expected, **EXACT)
    ended = torch.tensor([[False], [True], [False]])
    dead = losses.gae(rewards, values, 0.9, 0.5, ended, ended)
    torch.testing.assert_close(dead, torch.tensor([[1.4 + 0.45 * 1.0], [1.0], [3.3]]), **EXACT)
    timed_out = losses.gae(rewards, values, 0.9, 0.5, no, ended)
    torch.testing.assert_close(timed_out, torch.tensor([[1.4 + 0.45 * 2.35], [2.35], [3.3]]), **EXACT)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 10_000))
def test_gae_against_its_definition(steps: int, num_envs: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(steps, num_envs, generator=g), torch.randn(steps + 1, num_envs, generator=g)
    terminations = torch.rand(steps, num_envs, generator=g) < 0.2
    dones = terminations | (torch.rand(steps, num_envs, generator=g) < 0.2)
    gamma, lam = 0.9, 0.7
    expected = torch.zeros(steps, num_envs)
    for t in range(steps):
        for i in range(num_envs):
            for k in range(t, steps):
                following = 0.0 if terminations[k, i] else values[k + 1, i]
                delta = rewards[k, i] + gamma * following - values[k, i]
                expected[t, i] += (gamma * lam) ** (k - t) * delta
                if dones[k, i]:
                    break
    torch.testing.assert_close(losses.gae(rewards, values, gamma, lam, terminations, dones), expected, **EXACT)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([1.0, 0.6, 0.0]))
def test_window_returns_against_a_loop(steps: int, batch: int, seed: int, lambda_: float) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(batch, steps, 2, 3, generator=g) for _ in range(2))
    lengths = torch.randint(1, steps + 1, (batch,), generator=g)
    terminated = torch.rand(batch, generator=g) < 0.5
    found = losses.window_returns(rewards, values, lengths, terminated, 0.9, lambda_)
    for b in range(batch):
        last = int(lengths[b]) - 1
        expected = rewards[b, last] + 0.9 * (torch.zeros(2, 3) if terminated[b] else values[b, last])
        torch.testing.assert_close(found[b, last], expected, **EXACT)
        for k in reversed(range(last)):
            expected = rewards[b, k] + 0.9 * ((1 - lambda_) * values[b, k] + lambda_ * expected)
            torch.testing.assert_close(found[b, k], expected, **EXACT)


def test_ppo_loss_by_hand() -> None:
    # ratios 1.5, 0.5, 1.05, and one that does not count
    old = torch.zeros(4)
    new = torch.tensor([1.5, 0.5, 1.05, 9.0]).log()
    advantages = torch.tensor([2.0, -1.0, 3.0, 100.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, kl, clipped = losses.ppo_loss(new, old, advantages, mask, 0.1)
    # 1.1 * 2 (clipped from above), 0.9 * -1 (clipped: the smaller), 1.05 * 3
    assert loss.item() == pytest.approx(-(2.2 - 0.9 + 3.15) / 3, abs=1e-5)
    assert kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.05)) / 3, abs=1e-5)
    assert clipped.item() == pytest.approx(2 / 3, abs=1e-5)


def test_log_probs_and_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    torch.testing.assert_close(losses.log_probs(logits, torch.tensor([1, 0])), torch.tensor([0.75, 0.5]).log(), **EXACT)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(losses.entropy(logits), torch.tensor([quarter, math.log(2)]), **EXACT)


def test_value_loss_by_hand_and_its_shapes() -> None:
    values, targets = torch.tensor([1.0, 2.0, 7.0]), torch.tensor([3.0, 2.0, 0.0])
    assert losses.value_loss(values, targets, torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        losses.value_loss(values.unsqueeze(1), targets, torch.ones(3))


def test_explained_variance_by_hand() -> None:
    targets = torch.tensor([0.0, 2.0, 4.0, 99.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert losses.explained_variance(targets, targets, mask).item() == pytest.approx(1.0)
    assert losses.explained_variance(torch.zeros(4), targets, mask).item() == pytest.approx(0.0, abs=1e-6)
    halves = losses.explained_variance(targets / 2, targets, mask)
    assert halves.item() == pytest.approx(0.75, abs=1e-6)
    constant = losses.explained_variance(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 7.0), mask)
    assert torch.isfinite(constant), "returns that are all alike"


def test_sampled_scores_follow_the_policy() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(60_000, 3)
    chosen = losses.gumbel_scores(logits, torch.Generator().manual_seed(0)).argmax(dim=1)
    shares = torch.bincount(chosen, minlength=3) / 60_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0)


def test_advantages_are_normalized_over_the_steps_that_were_played() -> None:
    values, mask = torch.tensor([3.0, 5.0, 100.0, 10.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    mean, std = 6.0, ((9 + 1 + 16) / 3) ** 0.5
    expected = (values - mean) / std
    torch.testing.assert_close(losses.normalized(values, mask), expected, **EXACT)
    assert torch.isfinite(losses.normalized(torch.ones(3), torch.ones(3))).all()


def test_pixel_changes_against_a_loop() -> None:
    frames = torch.rand(2, 3, 84, 84)
    changes = losses.pixel_changes(frames)
    assert changes.shape == (2, 2, 21, 21)
    for b, t, i, j in ((0, 0, 0, 0), (1, 1, 20, 3), (0, 1, 7, 19)):
        block = (slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
        expected = (frames[b, t + 1][block] - frames[b, t][block]).abs().mean()
        torch.testing.assert_close(changes[b, t, i, j], expected, **EXACT)


def test_pixel_control_loss_against_a_loop() -> None:
    g = torch.Generator().manual_seed(3)
    q_values, targets = torch.randn(5, 4, 21, 21, generator=g), torch.randn(5, 21, 21, generator=g)
    actions, mask = torch.tensor([0, 3, 1, 2, 3]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    errors = [(q_values[n, actions[n]] - targets[n]).square().mean().item() for n in range(5)]
    loss = losses.pixel_control_loss(q_values, actions, targets)
    assert loss.item() == pytest.approx(0.5 * sum(errors) / 5, abs=1e-5)
    masked = losses.pixel_control_loss(q_values, actions, targets, mask)
    assert masked.item() == pytest.approx(0.5 * (errors[0] + errors[2] + errors[3]) / 3, abs=1e-5)


def test_reward_classes_and_learned_rewards() -> None:
    rewards = torch.tensor([0.0, 250.0, -3.0, 0.5])
    assert losses.reward_classes(rewards).tolist() == [0, 1, 2, 1]
    assert losses.learned_rewards(rewards, True, 0.5).tolist() == [0.0, 0.5, -0.5, 0.25]
    assert losses.learned_rewards(rewards, False, 1.0).tolist() == rewards.tolist()

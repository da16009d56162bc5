"""Every return, target and loss against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gravitar_dqn import losses


def test_window_is_cut_at_the_first_done() -> None:
    dones = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    assert losses.window_steps(dones).tolist() == [3, 1, 2, 3]


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_window_steps_agree_with_a_loop(dones: list[bool]) -> None:
    expected = next((i + 1 for i, done in enumerate(dones) if done), len(dones))
    assert losses.window_steps(torch.tensor([dones])).item() == expected


def test_n_step_return() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]])
    # 1 + 0.5 * 2 + 0.25 * 4 = 3
    assert losses.n_step_returns(rewards, 0.5).tolist() == [3.0, 8.0]


def test_targets_bootstrap_unless_terminated() -> None:
    targets = losses.td_targets(
        returns=torch.tensor([1.0, 1.0]),
        steps=torch.tensor([2, 1]),
        terminated=torch.tensor([False, True]),
        next_q=torch.tensor([[3.0, 5.0], [3.0, 5.0]]),
        gamma=0.5,
    )
    # 1 + 0.5^2 * max(3, 5) = 2.25; after a termination only the reward
    assert targets.tolist() == [2.25, 1.0]


def test_double_q_values_the_online_choice_with_the_target_network() -> None:
    targets = losses.td_targets(
        returns=torch.tensor([0.0]),
        steps=torch.tensor([1]),
        terminated=torch.tensor([False]),
        next_q=torch.tensor([[3.0, 5.0]]),
        gamma=0.5,
        next_q_online=torch.tensor([[2.0, 1.0]]),
    )
    assert targets.tolist() == [1.5]  # 0.5 * 3, though the target network's own maximum is 5


def test_td_loss_is_hubers_weighted() -> None:
    q_values = torch.tensor([[0.0, 1.0], [4.0, 0.0]], requires_grad=True)
    loss, errors = losses.td_loss(q_values, torch.tensor([1, 0]), torch.tensor([1.5, 1.0]), torch.tensor([1.0, 0.5]))
    # errors 0.5 and -3: 0.5 * 0.25 = 0.125, and 0.5 * (3 - 0.5) = 1.25; the mean is 0.6875
    assert loss.item() == pytest.approx(0.6875)
    assert errors.tolist() == [0.5, -3.0]
    assert not errors.requires_grad
    loss.backward()
    # d/dq = weight * clip(q - target, -1, 1) / B, and nothing for the action not taken
    torch.testing.assert_close(q_values.grad, torch.tensor([[0.0, -0.25], [0.25, 0.0]]))


def test_a_tasks_gradient_is_clipped_alone_and_weighed() -> None:
    a, b, c = (torch.nn.Parameter(torch.tensor(value)) for value in (3.0, 4.0, 5.0))
    loss = 0.5 * (a**2 + b**2)  # its gradient is (3, 4), of length 5
    (first, a_part), (second, b_part) = losses.task_gradients(
        losses.gradients(loss, [a, b, c]), max_norm=1.0, weight=0.5
    ).items()
    assert first is a and second is b, "c has none"
    assert (a_part.item(), b_part.item()) == (pytest.approx(0.5 * 3 / 5), pytest.approx(0.5 * 4 / 5))
    ((only, whole),) = losses.task_gradients(losses.gradients(0.5 * b**2, [a, b, c]), max_norm=0.0, weight=2.0).items()
    assert only is b and whole.item() == pytest.approx(2 * 4)
    ((_, nothing),) = losses.task_gradients(losses.gradients(0.0 * b, [b]), max_norm=1.0, weight=0.5).items()
    assert nothing.item() == 0, "no gradient is no reason for a NaN"
    assert a.grad is None and b.grad is None


def test_pixels_of_one_brightness_are_scaled_to_zero() -> None:
    """As on a screen that has been black so far."""
    frames = torch.full((2, 3), 7, dtype=torch.uint8)
    assert torch.equal(losses.scale_between(frames, torch.tensor([7.0, 7.0])), torch.zeros(2, 3))


def test_importance_weights() -> None:
    weights = losses.importance_weights(torch.tensor([0.1, 0.4]).double(), 0.5)
    # 0.1^-0.5 = 3.1623 is the largest; 0.4^-0.5 = 1.5811
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5]))


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.tensor([2.0, 4.0])
    assert losses.masked_mean(values, torch.tensor([1.0, 0.0])).item() == 2.0
    assert losses.masked_mean(values, torch.zeros(2)).item() == 0.0


def test_epsilon_of_the_notebook() -> None:
    end = torch.tensor(0.02, dtype=torch.float64)
    epsilon = [losses.linear_schedule(0.5, end, 960, episode).item() for episode in (0, 1, 5, 960, 5000)]
    assert epsilon == pytest.approx([0.5, 0.4995, 0.4975, 0.02, 0.02])


def test_a_schedule_of_no_duration_stays_at_its_start() -> None:
    assert losses.linear_schedule(0.5, 0.25, 0, 7) == 0.5
    assert losses.linear_schedule(0.5, 0.25, 4, 2) == 0.375


def test_ladder_of_epsilons() -> None:
    # Horgan 2018: 0.4 ^ (1 + 7 * i / (N - 1))
    ladder = losses.epsilon_ladder(0.4, 3, 7.0)
    torch.testing.assert_close(ladder, torch.tensor([0.4, 0.4**4.5, 0.4**8]).double())
    torch.testing.assert_close(losses.epsilon_ladder(0.1, 1, 7.0), torch.tensor([0.1]).double())
    torch.testing.assert_close(losses.epsilon_ladder(0.1, 4, 0.0), torch.full((4,), 0.1).double())


def test_epsilon_greedy_explores_each_environment_at_its_own_rate() -> None:
    num, epsilon = 3, torch.tensor([0.0, 0.5, 1.0])
    generator = torch.Generator().manual_seed(0)
    q_values = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(num, -1)
    actions = torch.stack([losses.epsilon_greedy(q_values, epsilon, generator) for _ in range(4000)])
    greedy = (actions == 2).float().mean(0).tolist()
    assert greedy[0] == 1.0
    # 1 - epsilon * 3/4; four standard deviations of 4000 draws are below 0.03
    assert greedy[1:] == pytest.approx([0.625, 0.25], abs=0.03)
    counts = np.bincount(actions[:, 2], minlength=4) / 4000
    assert counts == pytest.approx([0.25] * 4, abs=0.03)
    assert math.isclose(counts.sum(), 1.0)

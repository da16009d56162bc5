"""The auxiliary tasks, each alone: what they sample, what they learn, and what they take for granted."""

from collections.abc import Callable

import numpy as np
import torch
from ppo_helpers import ring_of, task_alone

from gravitar_dqn.agents.auxiliary_tasks import AuxiliaryTasks
from gravitar_dqn.encoders import MLP, NatureCNN
from gravitar_dqn.networks import ActorCritic


def test_the_pixel_range_is_0_to_255_until_something_was_seen() -> None:
    ring = ring_of(np.zeros((11, 2, 84, 84), dtype=np.uint8), np.zeros((10, 2), dtype=np.int64), np.zeros((10, 2)))
    tasks = task_alone("pixel_control", ring, ActorCritic(NatureCNN, (4, 84, 84), 2))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(tasks.norm_obs(pixels), torch.tensor([0.0, 0.2, 1.0]))
    tasks.update_pixel_range(torch.tensor([51, 102], dtype=torch.uint8))
    torch.testing.assert_close(tasks.norm_obs(pixels), torch.tensor([-1.0, 0.0, 4.0]))


def test_choosing_is_even_and_only_among_what_can_be_sampled() -> None:
    ends = np.zeros((30, 2), dtype=bool)
    ends[[4, 11, 17], 0] = True
    frames = np.zeros((31, 2, 3), dtype=np.float32)
    ring = ring_of(frames, np.zeros((30, 2), dtype=np.int64), np.zeros((30, 2)), ends, stack=1, n_step=3)
    eligible = torch.zeros_like(ring.valid)
    eligible[:, 0] = True
    indices, found = ring.sample_where(eligible, 6_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(indices, minlength=ring.valid.numel()).view_as(ring.valid)
    allowed = (ring.sampling_weights > 0) & eligible
    assert bool(found) and not counts[~allowed].any(), "dummy rows, rows at the cursor, or another environment's"
    assert allowed.sum() == 27 - 3 + 1  # rows 5 and 12 are dummies, and 18
    assert counts[allowed].float().std() < 0.15 * counts[allowed].float().mean()


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
    policy = ActorCritic(NatureCNN, (4, 84, 84), 2)
    tasks = task_alone("pixel_control", ring, policy, pixel_gamma=0.0)
    tasks.update_pixel_range(ring.frames[:-1])
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
    tasks = task_alone("reward_prediction", ring, ActorCritic(MLP, (3,), 2), reward_batch=32)
    before, after = falls(tasks, tasks.reward_prediction_loss, 150, 3e-3)
    assert before > 0.5 and after < 0.02


def test_nothing_rewarded_yet_is_no_error() -> None:
    ring = ring_of(
        np.zeros((11, 2, 3), dtype=np.float32), np.zeros((10, 2), dtype=np.int64), np.zeros((10, 2)), stack=1
    )
    tasks = task_alone("reward_prediction", ring, ActorCritic(MLP, (3,), 2))
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
    policy = ActorCritic(MLP, (1,), 2)
    tasks = task_alone("value_replay", ring, policy, num_windows=16)
    before, after = falls(tasks, tasks.value_replay_loss, 200, 3e-3)
    assert before > 0.1 and after < 0.01
    seen = torch.tensor([[-1.0], [0.0], [1.0]])
    torch.testing.assert_close(policy(seen)[1], seen[:, 0], atol=0.1, rtol=0)

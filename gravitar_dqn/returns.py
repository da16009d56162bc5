"""The mathematics of returns, targets, losses and exploration: pure functions, tensors in, tensors out.

Shapes: B rows of a batch, n steps of a window, A actions, N environments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_steps(dones: Tensor) -> Tensor:
    """Length of each n-step window, cut at its first done. `dones` (B, n) bool -> (B,) int64 in 1..n."""
    open_until = torch.cumprod(~dones, dim=1, dtype=torch.int64)[:, :-1]  # 1 where the game still goes on
    return 1 + open_until.sum(dim=1)


def n_step_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Discounted sum of a window's rewards, sum_k gamma^k r_k.

    `rewards` (B, n) float32, zero past the end of the window -> (B,).
    """
    powers = gamma ** torch.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)
    return (rewards * powers).sum(dim=1)


def td_targets(
    returns: Tensor,
    steps: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    gamma: float,
    next_q_online: Tensor | None = None,
) -> Tensor:
    """R + gamma^m * Q_target(s', a*) * (1 - terminated), the bootstrapped n-step target.

    a* maximizes `next_q_online` (double Q, van Hasselt 2016) or, without it, `next_q` itself (Mnih 2015).
    returns, steps (m) and terminated: (B,); next_q and next_q_online: (B, A). Only a termination cuts the bootstrap.
    """
    choice = next_q if next_q_online is None else next_q_online
    next_value = next_q.gather(1, choice.argmax(dim=1, keepdim=True)).squeeze(1)
    return returns + gamma**steps * next_value * (~terminated)


def td_loss(q_values: Tensor, actions: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted Huber loss of the chosen actions' values.

    q_values (B, A); actions (B,) int64; targets and weights (B,) -> scalar loss, TD errors (B,) without gradient.
    """
    chosen = q_values.gather(1, actions.unsqueeze(1)).squeeze(1)
    loss = (weights * F.smooth_l1_loss(chosen, targets, reduction="none")).mean()
    return loss, (targets - chosen).detach()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B,) where `mask` (B,) is 1; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def importance_weights(probabilities: Tensor, exponent: float) -> Tensor:
    """(N * P)^-exponent, divided by the largest (Schaul 2015, section 3.4): N cancels. (B,) -> (B,) float32."""
    weights = probabilities**-exponent
    return (weights / weights.max()).float()


def linear_schedule(start: float, end: Tensor, duration: int, now: int) -> Tensor:
    """From `start` to `end`, any shape, over `duration` units of the caller's clock, then `end`."""
    return start + (end - start) * min(now / duration, 1.0)


def epsilon_ladder(epsilon: float, num_envs: int, ladder: float) -> Tensor:
    """Epsilons epsilon ** (1 + ladder * i / (N - 1)) over N environments (Horgan 2018, eq. 1): (N,) float64."""
    return epsilon ** (1 + ladder * torch.arange(num_envs, dtype=torch.float64) / max(num_envs - 1, 1))


def epsilon_greedy(q_values: Tensor, epsilon: Tensor, generator: torch.Generator) -> Tensor:
    """Actions (N,) int64: random with probability `epsilon`, (N,) or scalar, else greedy in q_values (N, A)."""
    num_envs, num_actions = q_values.shape
    device = q_values.device
    explore = torch.rand(num_envs, device=device, generator=generator) < epsilon
    random = torch.randint(num_actions, (num_envs,), device=device, generator=generator)
    return torch.where(explore, random, q_values.argmax(dim=1))

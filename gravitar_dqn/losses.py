"""The mathematics of returns, targets, losses and exploration: pure functions, tensors in, tensors out.

Shapes: B rows of a batch, n steps of a window, T steps of a rollout, A actions, N environments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Value = TypeVar("Value", float, Tensor)


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


def normalized(values: Tensor, mask: Tensor, mean: Callable[[Tensor, Tensor], Tensor] = masked_mean) -> Tensor:
    """Values (B,) shifted and scaled to mean 0 and standard deviation 1 where `mask` (B,) is 1.

    `mean` may be one over more rows than these.
    """
    centred = values - mean(values, mask)
    return centred / (mean(centred.square(), mask).sqrt() + 1e-8)


def importance_weights(
    probabilities: Tensor, exponent: float, largest: Callable[[Tensor], Tensor] = torch.max
) -> Tensor:
    """(N * P)^-exponent, divided by the largest (Schaul 2015, section 3.4): N cancels. (B,) -> (B,) float32.

    `largest` may look at more rows than these.
    """
    weights = probabilities**-exponent
    return (weights / largest(weights)).float()


def linear_schedule(start: float, end: Value, duration: int, now: int) -> Value:
    """From `start` to `end`, a number or a tensor of them, over `duration`; a duration of 0 stays at the start."""
    done = min(now / duration, 1.0) if duration > 0 else 0.0
    return start + done * (end - start)


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


def gumbel_scores(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Scores (N, A) whose largest is action a with probability softmax(logits)_a (the Gumbel-max trick)."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return logits - noise.log()


# ---------------------------------------------------------------- actor-critic


def log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """log softmax(logits) of the actions: (N, A), (N,) int64 -> (N,)."""
    return logits.log_softmax(dim=1).gather(1, actions.unsqueeze(1)).squeeze(1)


def gae(
    rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float, terminations: Tensor, dones: Tensor
) -> Tensor:
    """Generalized advantage estimation (Schulman 2016, eq. 16): advantages (T, N).

    rewards, terminations, dones (T, N); values (T + 1, N), the last of them after the rollout. A termination cuts the
    bootstrap, a done (a termination or a time-out) the sum. A stream that nothing ends takes both all false.
    """
    deltas = rewards + gamma * values[1:] * ~terminations - values[:-1]
    fades = gamma * gae_lambda * ~dones
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + fades[t] * running
        advantages[t] = running
    return advantages


def window_returns(
    rewards: Tensor, next_values: Tensor, steps: Tensor, terminated: Tensor, gamma: float, lambda_: float = 1.0
) -> Tensor:
    """Returns of every step of windows that end after `steps` steps: R_k = r_k + gamma ((1 - l) V_(k+1) + l R_(k+1)).

    rewards and next_values (B, n, ...), the value after each step; steps (B,) in 1..n; terminated (B,) -> (B, n, ...).
    The last step bootstraps from its next value, or 0 after a termination. Entries past a window's end mean nothing.
    """
    shape = (-1, *[1] * (rewards.dim() - 2))
    steps, alive = steps.view(shape), (~terminated).view(shape)
    returns = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for k in reversed(range(rewards.shape[1])):
        inner = (1 - lambda_) * next_values[:, k] + lambda_ * running
        running = rewards[:, k] + gamma * torch.where(steps == k + 1, next_values[:, k] * alive, inner)
        returns[:, k] = running
    return returns


def learned_rewards(rewards: Tensor, clip: bool, scale: float) -> Tensor:
    """Raw rewards as actor and critic learn them: clipped to [-1, 1] or not, then scaled."""
    return scale * (rewards.clamp(-1, 1) if clip else rewards)


def ppo_loss(
    new_log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate loss (Schulman 2017, eq. 7), approximate KL divergence and share of clipped ratios.

    All (B,); rows where `mask` is 0 count nowhere.
    """
    log_ratios = new_log_probs - old_log_probs
    ratios = log_ratios.exp()
    clipped = ratios.clamp(1 - clip_coef, 1 + clip_coef)
    loss = masked_mean(-torch.minimum(ratios * advantages, clipped * advantages), mask)
    with torch.no_grad():
        approx_kl = masked_mean(ratios - 1 - log_ratios, mask)
        clip_fraction = masked_mean(((ratios - 1).abs() > clip_coef).float(), mask)
    return loss, approx_kl, clip_fraction


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared error, all (B,), where `mask` is 1. Any other shape would be broadcast: refused."""
    if not values.shape == returns.shape == mask.shape:
        raise ValueError(f"values {tuple(values.shape)}, returns {tuple(returns.shape)}, mask {tuple(mask.shape)}")
    return 0.5 * masked_mean((values - returns).square(), mask)


def entropy(logits: Tensor) -> Tensor:
    """Of the categorical distributions softmax(logits): (B, A) -> (B,)."""
    each = logits.log_softmax(dim=1)
    return -(each.exp() * each).sum(dim=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) where `mask` is 1: 1 is perfect, 0 no better than the mean. All (B,)."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


# ---------------------------------------------------------------- auxiliary tasks


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The gradient of `loss` for each parameter that has one."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {parameter: gradient for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None}


def task_gradients(found: Mapping[nn.Parameter, Tensor], max_norm: float, weight: float) -> dict[nn.Parameter, Tensor]:
    """`weight` times a loss's gradients, clipped alone to `max_norm` (0: never)."""
    scale = torch.full((), weight, device=next(iter(found.values())).device)
    if max_norm > 0:
        norm = nn.utils.get_total_norm(list(found.values()))
        scale = weight * (max_norm / (norm + 1e-6)).clamp(max=1)
    return {parameter: gradient * scale for parameter, gradient in found.items()}


def scale_between(frames: Tensor, pixel_range: Tensor) -> Tensor:
    """Frames scaled to [0, 1] between the darkest and the brightest pixel, `pixel_range` (2,), of the whole frame.

    While nothing was seen, which is where the first is above the second, those are 0 and 255.
    """
    nothing_seen = pixel_range[0] > pixel_range[1]
    low, high = torch.where(nothing_seen, pixel_range.flip(0), pixel_range)
    scaled: Tensor = (frames.float() - low) / (high - low).clamp(min=1)
    return scaled


def pixel_changes(frames: Tensor) -> Tensor:
    """What each step changed in the picture: mean of |x_(t+1) - x_t| over cells of 4x4 pixels.

    frames (B, n + 1, 84, 84) float -> (B, n, 21, 21).
    """
    changes = (frames[:, 1:] - frames[:, :-1]).abs()
    return F.avg_pool2d(changes, 4)


def pixel_control_loss(q_values: Tensor, actions: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half the mean squared error, over batch and cells, of the chosen actions' cell values (Jaderberg 2016, eq. 2).

    q_values (B, A, 21, 21); actions (B,) int64; targets (B, 21, 21); mask (B,).
    """
    chosen = q_values[torch.arange(len(actions), device=actions.device), actions]
    errors = (chosen - targets).square().mean(dim=(1, 2))
    return 0.5 * (errors.mean() if mask is None else masked_mean(errors, mask))


def reward_classes(rewards: Tensor) -> Tensor:
    """0 for no reward, 1 for a positive one, 2 for a negative one: int64 of the same shape."""
    return (rewards > 0).long() + 2 * (rewards < 0).long()

"""The replay buffer: a ring of single frames on the device.

One row per step of the vector environment; row t holds the frame that was seen, the action taken on it, what
that action earned, and whether it ended the game. Stacks and n-step windows are index arithmetic over rows.

    row            ...   t-1      t      t+1     t+2   ...
    frame               s_t-1    s_t   s_end   s_0        of one environment whose game ends at t
    action              a_t-1    a_t    dummy   a_0       Gymnasium's NEXT_STEP autoreset plays no action at t+1
    reward              r_t-1    r_t     0      r_0

The frame after a game's end is kept, because a time-out bootstraps from it; its row is never sampled.
A row can be sampled exactly when its `sampling_weights` entry is above zero. It gets its weight when its window is
complete, n rows later, and loses it when the write cursor comes near its stack: every rule about the cursor, the
window's length, the stack's depth and dummy rows is in `_advance`, and sampling knows none.
Deep in-GPU replay: Parr 2018 (arXiv 1801.03138). Priorities: Schaul 2015 (arXiv 1511.05952).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from line_profiler import profile
from torch import Tensor

from gravitar_dqn.losses import window_steps
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import Upload

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """B sampled windows of n steps. A window ends early at the end of its game; later entries are zero."""

    obs: Tensor  # (B, *obs_shape)
    actions: Tensor  # (B,) int64
    rewards: Tensor  # (B, n) float32, raw score
    int_rewards: Tensor  # (B, n) float32, as last stored
    next_obs: Tensor  # (B, *obs_shape), what was seen `steps` later
    steps: Tensor  # (B,) int64, rewards in the window
    terminated: Tensor  # (B,) bool, the window ends in a termination
    truncated: Tensor  # (B,) bool, the window ends in a time-out
    indices: Tensor  # (B,) int64, flat position of the transition in the buffer
    last_indices: Tensor  # (B,) int64, flat position of the window's last transition
    probabilities: Tensor  # (B,) float64, of having been sampled


@dataclass(frozen=True)
class Windows:
    """B sampled windows of n steps. A window ends early at the end of its game; later entries mean nothing."""

    indices: Tensor  # (B, n + 1) int64, flat position in the buffer of every frame from the first to the last
    steps: Tensor  # (B,) int64, steps in the window
    inside: Tensor  # (B, n) bool, the step belongs to the window
    terminated: Tensor  # (B,) bool, the window ends in a termination
    truncated: Tensor  # (B,) bool, the window ends in a time-out
    probabilities: Tensor  # (B,) float64, of having been sampled


class ReplayBuffer:
    """Ring of transitions of `num_envs` environments that step together.

    Args:
        capacity: transitions that can be sampled when the ring is full; rounded up to whole rows.
        frame_shape: shape of one observation without its stack, (84, 84) or (n,).
        stack: frames in an observation; obs_shape is (stack, *frame_shape), or frame_shape itself for stack 1 vectors.
        padding: what a stack holds before a game's first frame: "zero" frames, or "repeat" the first one.
        priority_exponent: 0 samples uniformly; else probability ~ priority ** exponent.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        frame_shape: tuple[int, ...],
        dtype: torch.dtype = torch.uint8,
        *,
        stack: int = 4,
        n_step: int = 1,
        padding: Literal["zero", "repeat"] = "zero",
        priority_exponent: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_envs, self.frame_shape, self.stack, self.n_step = num_envs, frame_shape, stack, n_step
        self.obs_shape = frame_shape if len(frame_shape) == 1 and stack == 1 else (stack, *frame_shape)
        self.padding, self.priority_exponent = padding, priority_exponent
        self.device = torch.device(device)
        self.num_rows = rows = -(-capacity // num_envs) + self._margin
        self.capacity = (rows - self._margin) * num_envs

        # The frame behind the last row stays zero: it is what a stack shows before a game's start.
        self.frames = torch.zeros((rows * num_envs + 1, *frame_shape), dtype=dtype, device=self.device)
        grid = (rows, num_envs)
        self.actions = torch.zeros(grid, dtype=torch.uint8, device=self.device)
        self.rewards = torch.zeros(grid, device=self.device)
        self.int_rewards = torch.zeros(grid, device=self.device)
        self.terminations = torch.zeros(grid, dtype=torch.bool, device=self.device)
        self.truncations = torch.zeros(grid, dtype=torch.bool, device=self.device)
        self.valid = torch.zeros(grid, dtype=torch.bool, device=self.device)  # an action was really played
        self.ages = torch.zeros(grid, dtype=torch.uint8, device=self.device)  # frames since the start, up to stack - 1
        self.sampling_weights = torch.zeros(grid, device=self.device)  # priority ** exponent where sampleable, else 0
        self.row_sampling_weights = torch.zeros(rows, dtype=torch.float64, device=self.device)
        self.max_weight = torch.ones((), device=self.device)

        self._frames_upload = Upload((num_envs, *frame_shape), dtype, self.device)
        self._columns_upload = Upload((5, num_envs), torch.float32, self.device)
        self._cursor = -1  # the row of the newest frame, whose action is still to come
        self._written = 0  # rows ever begun
        self._played = np.zeros(rows, dtype=np.int64)  # played actions in each row
        self._ages = np.zeros(num_envs, dtype=np.int64)  # of the newest frames
        self._env_index = torch.arange(num_envs, device=self.device)
        self._offsets = torch.arange(stack - 1, -1, -1, device=self.device)
        self._window = torch.arange(n_step + 1, device=self.device)

    @property
    def _margin(self) -> int:
        """Rows around the cursor that cannot be sampled when the ring is full."""
        return self.n_step + self.stack - 1

    def __len__(self) -> int:
        """Stored transitions: actions played whose rows are still in the ring, `capacity` at most."""
        return min(int(self._played.sum()), self.capacity)

    @property
    def full(self) -> bool:
        """The ring has begun to overwrite its oldest row."""
        return self._written >= self.num_rows

    @property
    def fill(self) -> float:
        """Share of the ring's rows that hold data."""
        return min(self._written / self.num_rows, 1.0)

    # ---------------------------------------------------------------- writing

    def begin(self, obs: npt.NDArray[Any]) -> None:
        """Start every environment anew with the frames `obs` (num_envs, *frame_shape).

        What was stored stays. A game that was under way counts as cut off (truncated) at its last frame.
        """
        if self._written:
            previous = (self._cursor - 1) % self.num_rows
            self.truncations[previous] |= self.valid[previous] & ~self.terminations[previous]
            self.valid[self._cursor] = False
            self._played[self._cursor] = 0
        self._ages[:] = 0
        self._advance(obs, torch.zeros(self.num_envs, device=self.device))

    @profile
    def put(
        self,
        actions: Tensor,
        rewards: npt.NDArray[Any],
        terminations: Bools,
        truncations: Bools,
        next_obs: npt.NDArray[Any],
        played: Bools,
    ) -> None:
        """Store what the actions on the newest frames led to, and the frames that came of them.

        actions (num_envs,) int64 on the device; rewards, terminations, truncations (num_envs,); next_obs (num_envs,
        *frame_shape). `played` (num_envs,) is false where this was the dummy step after a game's end: there the
        frame is a new game's first.
        """
        self._ages = np.where(played, np.minimum(self._ages + 1, self.stack - 1), 0)
        flags = [terminations & played, truncations & played, played]
        packed = np.stack([rewards, self._ages, *flags]).astype(np.float32)
        columns = self._columns_upload(packed)  # one small transfer for all of them
        row = self._cursor
        self.actions[row] = actions
        self.rewards[row] = columns[0]
        self.terminations[row], self.truncations[row], self.valid[row] = columns[2:].bool()
        self.int_rewards[row] = 0
        self._played[row] = played.sum()
        self._advance(next_obs, columns[1])

    def _advance(self, obs: npt.NDArray[Any], ages: Tensor) -> None:
        """Move the cursor to the next row, write the newest frames and their ages, and keep the weights true."""
        self._cursor = row = (self._cursor + 1) % self.num_rows
        self._written += 1
        first = row * self.num_envs
        self._frames_upload(obs, self.frames[first : first + self.num_envs])
        self.ages[row] = ages
        self.valid[row] = False
        self._played[row] = 0
        # The new frames took the place of the oldest row, which the stacks of the next stack - 1 rows reached into.
        stale = (row + self.stack - 1) % self.num_rows  # those before it were retired by the calls before
        self.sampling_weights[stale], self.row_sampling_weights[stale] = 0.0, 0.0
        if self._written > self.n_step:  # the row whose window these frames complete
            ready = (row - self.n_step) % self.num_rows
            self.sampling_weights[ready] = self.max_weight * self.valid[ready]
            self.row_sampling_weights[ready] = self.sampling_weights[ready].sum(dtype=torch.float64)

    def set_int_rewards(self, int_rewards: Tensor) -> None:
        """Store the curiosity bonus (num_envs,) of the step that `put` stored last."""
        self.int_rewards[(self._cursor - 1) % self.num_rows] = int_rewards

    def refresh_int_rewards(self, indices: Tensor, int_rewards: Tensor) -> None:
        """Replace stored bonuses (B,) at flat `indices` (B,), such as `Batch.last_indices`."""
        self.int_rewards.view(-1)[indices] = int_rewards

    def update_priorities(self, indices: Tensor, priorities: Tensor) -> None:
        """Set the priorities (B,), above zero, of flat `indices` (B,) that were just sampled."""
        if self.priority_exponent == 0:
            return
        weights = priorities.float() ** self.priority_exponent * (self.sampling_weights.view(-1)[indices] > 0)
        self.sampling_weights.view(-1)[indices] = weights
        touched = torch.div(indices, self.num_envs, rounding_mode="floor")
        self.row_sampling_weights[touched] = self.sampling_weights[touched].sum(dim=1, dtype=torch.float64)
        self.max_weight.copy_(torch.maximum(self.max_weight, distributed.largest(weights)))

    # ---------------------------------------------------------------- reading

    def latest(self, out: Tensor | None = None) -> Tensor:
        """The newest observation of every environment, (num_envs, *obs_shape), written to `out` if given."""
        return self.stacks(self._cursor * self.num_envs + self._env_index, out)

    def rollout(self, num_steps: int) -> Tensor:
        """Flat indices (num_steps + 1, num_envs) of the last steps' frames and of the newest."""
        rows = torch.arange(self._cursor - num_steps, self._cursor + 1, device=self.device) % self.num_rows
        return rows[:, None] * self.num_envs + self._env_index

    @property
    def sampleable(self) -> bool:
        """The first window is complete."""
        return self._written > self.n_step

    def last_played(self) -> Tensor:
        """Where the step that `put` stored last was a real one: (num_envs,) bool, on the device."""
        return self.valid[(self._cursor - 1) % self.num_rows]

    @profile
    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """Draw `batch_size` windows with replacement, each with probability weight / sum of weights."""
        windows = self.windows(batch_size, generator)
        indices = windows.indices[:, 0]
        steps = windows.steps.unsqueeze(1)
        return Batch(
            obs=self.stacks(indices),
            actions=self.actions.view(-1)[indices].long(),
            rewards=self.rewards.view(-1)[windows.indices[:, :-1]] * windows.inside,
            int_rewards=self.int_rewards.view(-1)[windows.indices[:, :-1]] * windows.inside,
            next_obs=self.stacks(windows.indices.gather(1, steps).squeeze(1)),
            steps=windows.steps,
            terminated=windows.terminated,
            truncated=windows.truncated,
            indices=indices,
            last_indices=windows.indices.gather(1, steps - 1).squeeze(1),
            probabilities=windows.probabilities,
        )

    def windows(self, batch_size: int, generator: torch.Generator | None = None) -> Windows:
        """Where the windows lie that `sample` draws: flat indices for `stacks`, and for any column, flattened."""
        first, probabilities = self._draw(batch_size, generator)
        time, env = torch.div(first, self.num_envs, rounding_mode="floor"), first % self.num_envs
        indices = (time[:, None] + self._window) % self.num_rows * self.num_envs + env[:, None]  # (B, n + 1)
        terminations = self.terminations.view(-1)[indices[:, :-1]]
        truncations = self.truncations.view(-1)[indices[:, :-1]]
        steps = window_steps(terminations | truncations)
        inside = self._window[:-1] < steps[:, None]
        return Windows(
            indices=indices,
            steps=steps,
            inside=inside,
            terminated=(terminations & inside).any(dim=1),
            truncated=(truncations & inside).any(dim=1),
            probabilities=probabilities,
        )

    def sample_where(
        self, eligible: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Flat indices (B,) drawn evenly from the sampleable steps where `eligible` (rows, num_envs) is true.

        Returns also whether there is any, a bool scalar on the device; where there is none, the indices mean nothing.
        """
        counts = ((self.sampling_weights > 0) & eligible).view(-1).cumsum(0)
        draws = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=generator) * counts[-1]
        indices = torch.searchsorted(counts, draws.long(), right=True).clamp_(max=counts.numel() - 1)
        return indices, counts[-1] > 0

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Flat indices (B,) and their probabilities: prefix sum and search, first over rows, then within one."""
        draws = torch.rand(2, batch_size, dtype=torch.float64, device=self.device, generator=generator)
        by_row = self.row_sampling_weights.cumsum(0)
        total = by_row[-1]
        row = torch.searchsorted(by_row, draws[0] * total, right=True).clamp_(max=self.num_rows - 1)
        weights = self.sampling_weights[row].double()  # (B, num_envs)
        by_env = weights.cumsum(1)
        env = torch.searchsorted(by_env, (draws[1] * by_env[:, -1]).unsqueeze(1), right=True).clamp_(
            max=self.num_envs - 1
        )
        probabilities = weights.gather(1, env).squeeze(1) / total
        return row * self.num_envs + env.squeeze(1), probabilities

    def stacks(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """Observations (B, *obs_shape) whose newest frames lie at flat `indices` (B,), in `out` if given."""
        if self.stack > 1:
            ages = self.ages.view(-1)[indices].unsqueeze(1).long()
            back = self._offsets.expand(len(indices), -1)
            if self.padding == "repeat":
                back = torch.minimum(back, ages)
            index = (indices[:, None] - back * self.num_envs) % (self.num_rows * self.num_envs)
            indices = torch.where(back <= ages, index, self.num_rows * self.num_envs).view(-1)
        flat = None if out is None else out.view(-1, *self.frame_shape)
        return torch.index_select(self.frames, 0, indices, out=flat).view(-1, *self.obs_shape)

    # ---------------------------------------------------------------- keeping

    def _tensors(self) -> dict[str, Tensor]:
        names = "frames actions rewards int_rewards terminations truncations valid ages max_weight".split()
        return {name: getattr(self, name) for name in [*names, "sampling_weights", "row_sampling_weights"]}

    def state_dict(self) -> dict[str, Any]:
        """Everything stored, for `torch.save`; tensors are shared with the buffer."""
        state: dict[str, Any] = dict(self._tensors())
        state |= {"cursor": self._cursor, "written": self._written, "played": torch.from_numpy(self._played)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; ValueError when its shapes are not this buffer's. Then call `begin`."""
        for name, tensor in self._tensors().items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(f"replay {name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self._cursor, self._written = int(state["cursor"]), int(state["written"])
        self._played = state["played"].numpy().copy()

"""The ring against a naive model that keeps whole games in Python lists."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_helpers import check_valid, nbytes

from gravitar_dqn.errors import UserError
from gravitar_dqn.replay import ReplayBuffer
from gravitar_dqn.runtime.memory import bytes_per_transition, check_buffer_fits

FRAME = (2, 2)


@dataclass
class Step:
    """A transition as the naive model knows it."""

    env: int
    game: int
    index: int  # position in its game
    action: int
    reward: float
    terminated: bool
    truncated: bool
    time: int


@dataclass
class Model:
    """Every game of every environment, for ever."""

    frames: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (env, game) -> frame values
    steps: dict[int, Step] = field(default_factory=dict)  # frame value the action was taken on -> transition

    def stack(self, env: int, game: int, index: int, size: int, padding: str) -> list[int]:
        """Values of the `size` newest frames at `index`, the oldest first."""
        frames = self.frames[env, game]
        first = frames[0] if padding == "repeat" else 0
        return [frames[i] if i >= 0 else first for i in range(index - size + 1, index + 1)]


class Player:
    """Drives a buffer and the model with the same made-up games. Every frame has a value of its own."""

    def __init__(self, buffer: ReplayBuffer, seed: int) -> None:
        self.buffer, self.model, self.rng = buffer, Model(), np.random.default_rng(seed)
        self.value, self.time = 0, 0
        self.game = [-1] * buffer.num_envs
        self.begin()

    def _frame(self) -> np.ndarray:
        self.value += 1
        return np.full(FRAME, self.value, dtype=np.int32)

    def begin(self) -> None:
        """Reset all environments."""
        frames = [self._frame() for _ in range(self.buffer.num_envs)]
        for env, frame in enumerate(frames):
            self._start(env, frame)
        if self.time:  # a game that was under way is cut off at its last frame
            for step in self.model.steps.values():
                if step.time == self.time - 2 and not step.terminated:
                    step.truncated = True
        self.time += 1
        self.played = np.ones(self.buffer.num_envs, dtype=bool)
        self.buffer.begin(np.stack(frames))

    def _start(self, env: int, frame: np.ndarray) -> None:
        self.game[env] += 1
        self.model.frames[env, self.game[env]] = [int(frame.flat[0])]

    def step(self) -> None:
        """One step of the vector environment, NEXT_STEP resets included."""
        n = self.buffer.num_envs
        actions, rewards = self.rng.integers(0, 18, n), self.rng.normal(size=n).astype(np.float32)
        terminations, truncations = self.rng.random(n) < 0.15, self.rng.random(n) < 0.1
        frames = [self._frame() for _ in range(n)]
        for env in range(n):
            if not self.played[env]:
                terminations[env] = truncations[env] = False
                rewards[env] = 0
                self._start(env, frames[env])
                continue
            key = (env, self.game[env])
            seen = self.model.frames[key]
            self.model.steps[seen[-1]] = Step(
                env, key[1], len(seen) - 1, int(actions[env]), float(rewards[env]), bool(terminations[env]),
                bool(truncations[env]), self.time - 1,
            )  # fmt: skip
            seen.append(int(frames[env].flat[0]))
        self.time += 1
        self.buffer.put(
            torch.as_tensor(actions), rewards, terminations, truncations, np.stack(frames), self.played.copy()
        )
        self.played = ~((terminations | truncations) & self.played)


def make(
    num_envs: int, rows: int, stack: int, n_step: int, padding: str = "zero", exponent: float = 0.0
) -> ReplayBuffer:
    return ReplayBuffer(
        num_envs * rows, num_envs, FRAME, torch.int32, stack=stack, n_step=n_step, padding=padding,
        priority_exponent=exponent,
    )  # fmt: skip


def sampleable(buffer: ReplayBuffer) -> set[int]:
    """Frame values of the transitions that can be sampled."""
    flat = torch.nonzero(buffer.sampling_weights.view(-1) > 0).view(-1)
    return {int(buffer.frames[i].flatten()[0]) for i in flat}


def expected_sampleable(player: Player) -> set[int]:
    """Transitions whose window has been completed and whose row is not reached by the cursor's margin."""
    buffer = player.buffer
    newest = player.time - 1  # time of the cursor's row
    last = newest - buffer.n_step
    first = newest - buffer.num_rows + buffer.stack
    return {value for value, s in player.model.steps.items() if max(first, 0) <= s.time <= last}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_envs=st.integers(1, 3),
    rows=st.integers(2, 9),
    stack=st.integers(1, 4),
    n_step=st.integers(1, 4),
    padding=st.sampled_from(["zero", "repeat"]),
    plan=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
)
def test_everything_sampled_agrees_with_the_model(
    num_envs: int, rows: int, stack: int, n_step: int, padding: str, plan: list[int], seed: int
) -> None:
    buffer = make(num_envs, rows, stack, n_step, padding)
    player = Player(buffer, seed)
    for resets, count in enumerate(plan):
        if resets:
            player.begin()
        for _ in range(count):
            player.step()
            check_valid(buffer)
    assert sampleable(buffer) == expected_sampleable(player)
    newest = buffer.latest()
    for env in range(num_envs):
        game = player.game[env]
        index = len(player.model.frames[env, game]) - 1
        assert newest[env, :, 0, 0].tolist() == player.model.stack(env, game, index, stack, padding)
    if not sampleable(buffer):
        return

    batch = buffer.sample(64, torch.Generator().manual_seed(seed))
    for i in range(64):
        step = player.model.steps[int(batch.obs[i, -1, 0, 0])]
        window = [step]
        while len(window) < n_step and not (window[-1].terminated or window[-1].truncated):
            frames = player.model.frames[step.env, step.game]
            window.append(player.model.steps[frames[window[-1].index + 1]])
        assert batch.obs[i, :, 0, 0].tolist() == player.model.stack(step.env, step.game, step.index, stack, padding)
        after = player.model.stack(step.env, step.game, step.index + len(window), stack, padding)
        assert batch.next_obs[i, :, 0, 0].tolist() == after
        assert batch.actions[i] == step.action
        assert batch.steps[i] == len(window)
        assert batch.rewards[i].tolist() == [s.reward for s in window] + [0.0] * (n_step - len(window))
        assert batch.terminated[i].item() == window[-1].terminated
        assert batch.truncated[i].item() == window[-1].truncated
        assert (
            buffer.frames[batch.last_indices[i]].flatten()[0]
            == player.model.frames[step.env, step.game][window[-1].index]
        )


def test_uniform_sampling_reaches_every_valid_transition_alike() -> None:
    buffer = make(num_envs=2, rows=6, stack=4, n_step=2)
    player = Player(buffer, 3)
    for _ in range(25):
        player.step()
    rows = buffer.sample(20_000, torch.Generator().manual_seed(0)).indices
    valid = torch.nonzero(buffer.sampling_weights.view(-1) > 0).view(-1)
    counts = torch.bincount(rows, minlength=buffer.sampling_weights.numel())
    assert counts.sum() == counts[valid].sum()
    share = counts[valid] / 20_000
    torch.testing.assert_close(share, torch.full_like(share, 1 / len(valid)), atol=0.015, rtol=0)


def test_a_full_ring_holds_its_capacity() -> None:
    buffer = ReplayBuffer(40, 4, FRAME, torch.int32, stack=4, n_step=3)
    zeros, no = np.zeros(4, dtype=np.float32), np.zeros(4, dtype=bool)
    frames = np.zeros((4, *FRAME), dtype=np.int32)
    buffer.begin(frames)
    for i in range(100):
        assert len(buffer) == min(4 * i, 40)
        buffer.put(torch.zeros(4, dtype=torch.long), zeros, no, no, frames, ~no)
    assert buffer.full
    assert (buffer.sampling_weights > 0).sum() == buffer.capacity == 40


def test_priorities_are_proportional() -> None:
    buffer = make(num_envs=3, rows=8, stack=2, n_step=1, exponent=0.5)
    player = Player(buffer, 1)
    for _ in range(30):
        player.step()
    rows = torch.nonzero(buffer.sampling_weights.view(-1) > 0).view(-1)
    priorities = torch.arange(1, len(rows) + 1).float()
    buffer.update_priorities(rows, priorities)
    check_valid(buffer)
    batch = buffer.sample(40_000, torch.Generator().manual_seed(0))
    expected = priorities.sqrt() / priorities.sqrt().sum()
    counts = torch.bincount(batch.indices, minlength=buffer.sampling_weights.numel())[rows] / 40_000
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(batch.probabilities[batch.indices == rows[0]][0].float(), expected[0])
    player.step()
    assert buffer.sampling_weights.max() == pytest.approx(
        priorities.max().sqrt().item()
    )  # new rows get the largest so far


def test_priorities_cannot_revive_an_overwritten_row() -> None:
    buffer = make(num_envs=1, rows=4, stack=2, n_step=1, exponent=1.0)
    player = Player(buffer, 0)
    for _ in range(6):
        player.step()
    rows = torch.nonzero(buffer.sampling_weights.view(-1) > 0).view(-1)
    for _ in range(3):
        player.step()
    buffer.update_priorities(rows, torch.ones(len(rows)))
    check_valid(buffer)
    assert sampleable(buffer) == expected_sampleable(player)


def test_bonuses_are_stored_with_their_step_and_can_be_refreshed() -> None:
    buffer = make(num_envs=2, rows=12, stack=1, n_step=3)
    player = Player(buffer, 5)
    bonus = {}
    for i in range(9):
        player.step()
        values = torch.tensor([i + 0.25, i + 0.5])
        buffer.set_int_rewards(values)
        for env in range(2):
            bonus[i, env] = values[env].item()
    batch = buffer.sample(32, torch.Generator().manual_seed(0))
    for i in range(32):
        time, env = divmod(int(batch.indices[i]), 2)
        expected = [bonus[time + k, env] if k < batch.steps[i] else 0.0 for k in range(3)]
        assert batch.int_rewards[i].tolist() == expected
    buffer.refresh_int_rewards(batch.last_indices, torch.full((32,), -1.0))
    again = buffer.sample(32, torch.Generator().manual_seed(0))
    ends = again.int_rewards.gather(1, again.steps[:, None] - 1)
    assert (ends == -1).all()


def test_saved_and_loaded_it_samples_the_same(tmp_path) -> None:
    buffer = make(num_envs=2, rows=7, stack=3, n_step=2, exponent=0.6)
    player = Player(buffer, 9)
    for _ in range(20):
        player.step()
    torch.save(buffer.state_dict(), tmp_path / "replay.pt")
    other = make(num_envs=2, rows=7, stack=3, n_step=2, exponent=0.6)
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert len(other) == len(buffer)
    for one, two in zip(
        vars(buffer.sample(50, torch.Generator().manual_seed(1))).values(),
        vars(other.sample(50, torch.Generator().manual_seed(1))).values(),
        strict=True,
    ):
        assert torch.equal(one, two)
    player.buffer = other
    player.begin()  # new games after the old ones: nothing straddles the seam
    for _ in range(4):
        player.step()
    check_valid(other)
    assert sampleable(other) == expected_sampleable(player)
    with pytest.raises(ValueError, match="frames"):
        make(num_envs=2, rows=8, stack=3, n_step=2).load_state_dict(buffer.state_dict())


def test_vectors_use_the_same_class() -> None:
    buffer = ReplayBuffer(10, 2, (3,), torch.float32, stack=1, n_step=1)
    buffer.begin(np.array([[1.0, 2, 3], [4, 5, 6]], dtype=np.float32))
    no = np.zeros(2, dtype=bool)
    after = np.array([[7.0, 8, 9], [10, 11, 12]], dtype=np.float32)
    buffer.put(torch.tensor([1, 0]), np.ones(2), no, no, after, ~no)
    batch = buffer.sample(20, torch.Generator().manual_seed(0))
    assert batch.obs.shape == (20, 3)
    torch.testing.assert_close(batch.next_obs, batch.obs + 6)


def test_a_transition_of_an_image_game_takes_at_most_7200_bytes() -> None:
    buffer = ReplayBuffer(4_000, 8, (84, 84), torch.uint8, stack=4, n_step=3, priority_exponent=0.5)
    assert nbytes(buffer) / buffer.capacity <= 7_200
    assert bytes_per_transition((84, 84), torch.uint8) <= 7_200


def test_a_buffer_too_big_for_the_device_says_how_many_would_fit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"needs \d+\.\d GiB, but cpu has .* --agent.buffer-size \d+ would fit"):
        check_buffer_fits(10**12, (84, 84), torch.uint8, cpu)
    check_buffer_fits(1_000, (84, 84), torch.uint8, cpu)
    assert "1000 transitions of 7073 bytes, 0.01 GiB on cpu" in caplog.text

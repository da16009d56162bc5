"""What must hold in every replay buffer, and how large one is."""

from __future__ import annotations

import torch

from gravitar_dqn.replay import ReplayBuffer


def check_valid(buffer: ReplayBuffer) -> None:
    """Assert that the buffer's own bookkeeping does not contradict itself."""
    assert not buffer.frames[-1].any(), "the padding frame was written"
    sums = buffer.sampling_weights.sum(1, dtype=torch.float64)
    assert torch.allclose(buffer.row_sampling_weights, sums), "row sums are stale"
    sampleable = buffer.sampling_weights > 0
    assert not (sampleable & ~buffer.valid).any(), "a row without an action can be sampled"
    for distance in range(-buffer.n_step + 1, buffer.stack):
        assert not sampleable[(buffer._cursor + distance) % buffer.num_rows].any(), "a window straddles the cursor"


def nbytes(buffer: ReplayBuffer) -> int:
    """Bytes held on the device."""
    return sum(tensor.nbytes for tensor in buffer._tensors().values())

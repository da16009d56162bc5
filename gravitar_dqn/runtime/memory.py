"""How much memory a replay buffer takes, and whether it is there."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import numpy as np
import torch

from gravitar_dqn.errors import UserError
from gravitar_dqn.runtime import distributed

log = logging.getLogger(__name__)


def bytes_per_transition(frame_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """One frame and what goes with it: action, flags and age a byte each, rewards and weight four."""
    return int(np.prod(frame_shape)) * dtype.itemsize + 5 * 1 + 3 * 4


def available_bytes(device: torch.device) -> int:
    """Memory free for tensors on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")] or free
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return min(free)


def check_buffer_fits(
    capacity: int,
    frame_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    setting: str = "--agent.buffer-size",
    unit: int = 1,
) -> None:
    """Log a replay buffer's size, before it is allocated; UserError when it would not fit.

    `setting` is the option that decides it, in units of so many transitions.
    """
    each = bytes_per_transition(frame_shape, dtype)
    free = distributed.memory_for_each(available_bytes(device))
    # A tenth is left for networks and activations.
    fits = int(free * 0.9) // each // unit
    fits -= fits % 1000 if fits > 1000 else 0
    if capacity > fits * unit:
        raise UserError(
            f"a replay buffer of {capacity} transitions needs {capacity * each / 2**30:.1f} GiB, but {device} has "
            f"{free / 2**30:.1f} GiB free: {setting} {fits} would fit"
        )
    size = capacity * each / 2**30
    ranks = " for each rank" if distributed.size() > 1 else ""
    log.info("replay buffer: %d transitions of %d bytes, %.2f GiB on %s%s", capacity, each, size, device, ranks)

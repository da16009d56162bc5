"""How the arithmetic runs: which precision, eager or captured in a CUDA graph, and what the allocator keeps.

`precision="fp32"` with `execution="eager"` always works, and is what the rest is tested against.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gravitar_dqn.errors import OutOfMemory, UserError

log = logging.getLogger(__name__)


def describe_device(device: torch.device) -> str:
    """The device's name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def use_threads(count: int) -> None:
    """Let torch compute with this many processor threads; 0 leaves it as it is."""
    if count:
        torch.set_num_threads(count)


def choose_device(name: str) -> torch.device:
    """The device called `name` (auto, cpu, cuda, cuda:N); UserError when it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here ({torch.cuda.device_count()} CUDA devices): --device cpu works")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and graphs are made on the current one
    return device


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` resolved for the device: bf16 where it is computed natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        native = any(probe() for probe in probes if probe is not None)
    return "bf16" if native else "fp32"


def choose_execution(execution: str, device: torch.device) -> str:
    """`auto` resolved for the device: graphs on CUDA, else eager."""
    if execution != "auto":
        return execution
    return "graphs" if device.type == "cuda" else "eager"


def check_execution(execution: str, device: torch.device) -> None:
    """Raise UserError for a way to run that the device does not have."""
    if execution == "graphs" and device.type != "cuda":
        raise UserError(f"--execution graphs needs a CUDA device, not {device}: --execution auto or eager works")


class Graphed:
    """A function captured in a CUDA graph: a replay launches all its kernels at once.

    The function takes and returns nothing: it reads and writes, in place, tensors that stay where they are, and never
    looks at a value on the host. Its first calls run as they are, on a side stream as capturing demands; they count.
    Random numbers of `generator` are fresh at every replay. Where capturing fails it stays eager, with one warning.

    Args:
        function: what to run.
        generator: the random numbers it draws, on the device.
        device: where it runs.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[[], None], generator: torch.Generator, device: torch.device) -> None:
        self._function, self._generator, self._device = function, generator, device
        self._calls = 0
        self._graph: Any = None
        self._failed = False

    def __call__(self) -> None:
        """Run the function once."""
        if self._graph is not None:
            self._graph.replay()
        elif self._failed:
            self._function()
        elif self._calls < self.WARM_UP:
            self._calls += 1
            self._run_on_side_stream()
        else:
            self._capture()
            self()

    def _run_on_side_stream(self) -> None:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream(self._device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # it soon is captured
            self._function()
        here.wait_stream(stream)

    def _capture(self) -> None:
        """Record the kernels; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        here = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._function()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # a capture that fails at its end leaves its own
            self._failed = True
            name = getattr(self._function, "__name__", "a function")
            log.warning("%s runs eagerly, no CUDA graph could be made of it: %s", name, str(error).splitlines()[0])
        else:
            self._graph = graph


def prepare_optimizer(
    optimizer: torch.optim.Optimizer, learning_rate: float, graphs: bool, device: torch.device, *, changes: bool
) -> None:
    """Make an optimizer, new or from a checkpoint, ready for how its run is executed now.

    `changes`: its learning rate will, so that a CUDA graph must read it from a tensor.
    """
    for group in optimizer.param_groups:
        group["capturable"] = graphs  # a checkpoint's says how that run was executed
        group["lr"] = torch.tensor(learning_rate, device=device) if graphs and changes else learning_rate
    for state in optimizer.state.values():
        if graphs and "step" in state:
            state["step"] = state["step"].to(device)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change it; inside a CUDA graph it is a tensor that stays where it is."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def restore_generator(generator: torch.Generator, state: torch.Tensor | None, seed: int) -> None:
    """Go on with saved random numbers; from `seed` where they were another kind of device's, or another rank's."""
    if state is None:
        generator.manual_seed(seed)
        return
    try:
        generator.set_state(state.cpu())
    except (RuntimeError, TypeError):
        generator.manual_seed(seed)


class Upload:
    """Takes arrays of one shape to the device. On CUDA through pinned memory, so that the host does not wait.

    Args:
        shape: the arrays' shape; axes of size 1 may be missing or extra in what is given.
        dtype: their type.
        device: where they go.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._pinned = torch.empty(shape, dtype=dtype, pin_memory=True) if device.type == "cuda" else None
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, array: npt.NDArray[Any], out: Tensor | None = None) -> Tensor:
        """The array on the device, in `out` if given."""
        host = torch.from_numpy(np.ascontiguousarray(array)).view(self._shape)
        if self._pinned is not None and self._sent is not None:
            self._sent.synchronize()  # the copy before this one has long been made
            host = self._pinned.copy_(host)
        here = host.to(self._device, non_blocking=True) if out is None else out.copy_(host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return here


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """OutOfMemory, one line, for what Python and torch raise when an allocation fails inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemory(
            "there is not enough memory: smaller batches, a smaller replay buffer or fewer games need less"
        ) from None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next use instead of returning it to the system.

    Otherwise every activation of a few megabytes is mapped, faulted in page by page and unmapped at each gradient
    step on a CPU. Elsewhere than on glibc nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # mallopt's names for them, from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the most it takes; the replay buffer is larger and not affected
        libc.mallopt(trim_threshold, 2**31 - 1)

"""One agent on several processes, the ranks that `torchrun` starts: all that they tell each other.

Every rank plays games of its own and keeps them in a replay buffer of its own; weights, statistics and clocks are the
same on all. Alone, without torchrun, each function gives back what it was given. All ranks call the same functions in
the same order; one that does not is waited for until its time is up, and then the run ends (`RankLost`).
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.config import RunConfig
from gravitar_dqn.errors import RankLost, SettingError, UserError
from gravitar_dqn.runtime.execution import choose_device
from gravitar_dqn.runtime.processes import available_cores, by_torchrun, die_with_parent

Config = TypeVar("Config", bound=RunConfig)

END = 1  # the wish to leave because the run is complete; others are the exit codes of signals, which are larger


class _Ranks:
    """The group that this process belongs to."""

    def __init__(self, control: dist.ProcessGroup, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.control = control  # on the host, also where gradients go from GPU to GPU
        self.timeout = timeout
        self.wish = self.agreed = 0  # see `agreed`
        self.waited = 0.0


_ranks: _Ranks | None = None  # None: alone


def rank() -> int:
    """This process's number, from 0 on. Rank 0 prints, logs, films and saves for all."""
    return 0 if _ranks is None else _ranks.rank


def size() -> int:
    """How many ranks there are."""
    return 1 if _ranks is None else _ranks.size


def over_nccl() -> bool:
    """Whether gradients go from GPU to GPU."""
    return _ranks is not None and dist.get_backend() == "nccl"


def memory_for_each(free: int) -> int:
    """Of so many bytes free on this one's device, what each rank that shares it can have; the least on any machine."""
    if _ranks is None:
        return free
    least = torch.tensor(free // (1 if over_nccl() else _local("LOCAL_WORLD_SIZE")))
    with _answers(_ranks):  # nobody takes memory before all have looked
        dist.all_reduce(least, dist.ReduceOp.MIN, group=_ranks.control)
    return int(least)


def waited() -> float:
    """Seconds that this process has waited so far for others, and for what they send; not for GPUs that talk."""
    return 0.0 if _ranks is None else _ranks.waited


# ---------------------------------------------------------------- beginning and end


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[None]:
    """Be one of the ranks inside, where torchrun has started several.

    RankLost, inside, when another one has ended or did not answer for `config.rank_timeout` seconds.
    """
    global _ranks
    if by_torchrun():
        die_with_parent()  # also when torchrun is killed
    if not by_torchrun() or _local("WORLD_SIZE") == 1:
        yield
        return
    # What is wrong on all ranks is told before one waits for another.
    check_share(config, _local("WORLD_SIZE"))
    device = choose_device(_device_of(config.device))
    if config.execution == "graphs":
        raise UserError("--execution graphs is for one process: a rank that hangs in a graph would not be noticed")
    timeout = datetime.timedelta(seconds=config.rank_timeout)
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        how: dict[str, Any] = {"store": _unused(store, rank, ranks), "rank": rank, "world_size": ranks}
        if _over_nccl(config.device):
            dist.init_process_group("nccl", timeout=timeout, device_id=device, **how)
            control = dist.new_group(backend="gloo", timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout, **how)
            control = dist.group.WORLD
    except RuntimeError as error:
        raise RankLost(f"the ranks do not find each other: {str(error).splitlines()[0]}") from None
    _ranks = _Ranks(control, config.rank_timeout)
    try:
        yield
        leave()
    finally:
        _forget()


def check_share(config: RunConfig, ranks: int) -> None:
    """Raise SettingError where a run cannot be shared among so many ranks; it says how many there can be."""

    def fits(number: int) -> bool:
        with contextlib.suppress(SettingError):
            config.share(0, number)
            return True
        return False

    try:
        config.share(0, ranks)
    except SettingError as error:
        numbers = ", ".join(str(number) for number in range(1, 65) if fits(number))
        raise SettingError(error.name, f"{error.complaint}; as it is, the run can have {numbers} ranks") from None


def _unused(store: Any, rank: int, ranks: int) -> Any:
    """A part of torchrun's store for this start alone.

    torchrun keeps one store for all its restarts: a rank would find the address of one that is dead. Whoever is alive
    answers: rank 0 names its start, each of the others asks it, by a word of its own, whether that is today's.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("start", word)
        for other in range(1, ranks):
            store.set(f"{word}/{store.get(f'{word}/{other}').decode()}", "yes")
        return dist.PrefixStore(word, store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + store.timeout.total_seconds()
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", word)
        try:
            store.wait([f"{start}/{word}"], datetime.timedelta(seconds=0.5))
            return dist.PrefixStore(start, store)  # type: ignore[attr-defined]
        except RuntimeError:
            if time.monotonic() > deadline:
                raise


def leave() -> None:
    """Wait until every rank has come here, so that none ends while another one still needs it; then be alone."""
    if _ranks is not None:
        with contextlib.suppress(RankLost), _answers(_ranks):
            dist.barrier(_ranks.control)
        _forget()


def _forget() -> None:
    global _ranks
    _ranks = None
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _answers(ranks: _Ranks) -> Iterator[None]:
    """RankLost for what torch raises when another rank is gone, or silent for too long."""
    began = time.perf_counter()
    try:
        yield
        ranks.waited += time.perf_counter() - began
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason, late = str(error).splitlines()[0], time.perf_counter() - began >= ranks.timeout
        what = f"did not answer for {ranks.timeout:g} seconds" if late else "has ended"
        raise RankLost(f"another rank {what}" + ("" if "gloo" in reason else f" ({reason})")) from None


def _local(name: str) -> int:
    """A number that torchrun has left in the environment."""
    return int(os.environ.get(name, "1"))


def _device_of(name: str) -> str:
    """The device of this rank: where it was not named, every rank on a machine has its own."""
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return "cpu" if name == "auto" else name
    here, there = _local("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if here > there:
        raise UserError(
            f"{here} ranks on a machine with {there} GPUs: --nproc-per-node {there} gives each its own, --device "
            "cuda:0 lets them share one, --device cpu needs none"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def _over_nccl(name: str) -> bool:
    """Whether gradients go from GPU to GPU. NCCL refuses ranks that share one."""
    own = name in ("auto", "cuda") or _local("LOCAL_WORLD_SIZE") == 1
    return own and _device_of(name).startswith("cuda") and dist.is_nccl_available()


def share_of(config: Config) -> Config:
    """The settings of this rank's part of a run.

    Several ranks run eagerly on GPUs too: torch does not watch over what NCCL does in a CUDA graph, so that a rank
    which hangs there would never be noticed.
    """
    if _ranks is None:
        return config
    ours = config.share(_ranks.rank, _ranks.size)
    cores = max(1, len(available_cores()) // _local("LOCAL_WORLD_SIZE"))
    env = replace(ours.env, num_threads=ours.env.num_threads or cores)
    return replace(ours, env=env, device=_device_of(config.device), execution="eager")


# ---------------------------------------------------------------- what rank 0 tells all


def same(state: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 has, tensors on the CPU."""
    if _ranks is None:
        return state
    packed = io.BytesIO()
    if _ranks.rank == 0:
        torch.save(state, packed)
    words = [packed.getvalue()]
    with _answers(_ranks):
        dist.broadcast_object_list(words, src=0, group=_ranks.control)
    loaded: dict[str, Any] = torch.load(io.BytesIO(words[0]), map_location="cpu", weights_only=True)
    return loaded


# ---------------------------------------------------------------- what all tell each other at every step


def counts(*own: int) -> list[int]:
    """Sums over the ranks. The wishes to leave go with them: see `agreed`."""
    if _ranks is None:
        return list(own)
    table = torch.zeros((_ranks.size, len(own) + 1), dtype=torch.int64)
    table[_ranks.rank] = torch.tensor([*own, _ranks.wish])
    with _answers(_ranks):
        dist.all_reduce(table, group=_ranks.control)
    _ranks.agreed = int(table[:, -1].max())
    return [int(column) for column in table[:, :-1].sum(dim=0)]


def agreed(wish: int) -> int:
    """The largest wish of all ranks to leave, 0 for none: this one's now, of several ranks as of the last `counts`."""
    if _ranks is None:
        return wish
    _ranks.wish = max(_ranks.wish, wish)
    return _ranks.agreed


def all_games(own: Sequence[tuple[float, int]], count: int) -> list[tuple[float, int]]:
    """Score and length of the games, `count` in all, that have ended on the ranks; `own` are this one's."""
    if _ranks is None or count == 0:
        return list(own)
    table = torch.zeros((_ranks.size, count, 3), dtype=torch.float64)
    for row, (score, length) in zip(table[_ranks.rank], own, strict=False):
        row[:] = torch.tensor([1.0, score, length], dtype=torch.float64)
    with _answers(_ranks):
        dist.all_reduce(table, group=_ranks.control)
    return [(float(score), int(length)) for there, score, length in table.view(-1, 3).tolist() if there]


# ---------------------------------------------------------------- what learning needs


def total(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums over the ranks, entry by entry, of tensors of one dtype."""
    if _ranks is None:
        return values
    flat = torch.cat([value.reshape(-1) for value in values])
    with _answers(_ranks):
        dist.all_reduce(flat)
    parts = torch.split(flat, [value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values, strict=True))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], *others: Mapping[nn.Parameter, Tensor]) -> None:
    """Let the gradients of parameters, and `others` that were computed apart, be their means over the ranks."""
    if _ranks is not None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients += [gradient for found in others for gradient in found.values()]
        torch._foreach_copy_(gradients, total(*gradients))
        torch._foreach_div_(gradients, _ranks.size)


@torch.no_grad()
def _fraction(count: Tensor) -> Tensor:
    """This rank's count over the mean of all ranks'."""
    (whole,) = total(count.float())
    return count * size() / whole.clamp(min=1)


def weighted(loss: Tensor, mask: Tensor) -> Tensor:
    """A mean over the rows where `mask` is 1, so weighted that `average_gradients` makes it a mean over all ranks'."""
    return loss if _ranks is None else loss * _fraction(mask.sum())


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """`losses.masked_mean` over the rows of all ranks."""
    if _ranks is None:
        return losses.masked_mean(values, mask)
    whole, count = total((values * mask).sum(), mask.sum())
    return whole / count.clamp(min=1)


def largest(values: Tensor) -> Tensor:
    """The largest value on any rank, a scalar."""
    return largest_of_each(values.max())


def largest_of_each(values: Tensor) -> Tensor:
    """The largest of every entry over the ranks; of what alone is given back, the tensor itself may be changed."""
    if _ranks is not None:
        with _answers(_ranks):
            dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gathered(values: Tensor) -> Tensor:
    """The ranks' columns side by side: (T, num_envs) of each -> (T, size * num_envs)."""
    if _ranks is None:
        return values
    whole = torch.zeros((len(values), _ranks.size, values.shape[1]), device=values.device)
    whole[:, _ranks.rank] = values
    return total(whole)[0].view(len(values), -1).to(values.dtype)


def own_part(values: Tensor) -> Tensor:
    """Of values for the environments of all ranks those for this one's."""
    return values.view(size(), -1)[rank()]

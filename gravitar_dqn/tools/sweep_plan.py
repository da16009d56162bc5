"""What a sweep runs: presets, variants of them and seeds, each a run with a folder and a name of its own."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from gravitar_dqn.config import RunConfig, check_bounds, flatten, to_dict, validate
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import get_preset

BASE = "base"
# What the sweep sets itself. The rest of a run can be changed by a variant.
OWN = {
    "preset": "the presets come first",
    "seed": "--seeds sets it",
    "total_minutes": "--minutes sets it",
    "run_dir": "--dir sets it",
    "resume": "the same command again goes on",
    "profile": "profile a single run with train",
    "threads": "--parallel sets it",
}


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep is asked for."""

    presets: tyro.conf.Positional[tuple[str, ...]]
    """Presets to train, one or more; they come first."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Every preset and variant is trained once with each."""
    variants: tuple[str, ...] = ()
    """Settings to change together against the preset, "agent.gamma=0.99 agent.n-step=3"; each text is a variant."""
    settings: str = ""
    """Settings for all runs, "env.num-envs=64 env.id=ALE/Breakout-v5"."""
    base: bool = True
    """Also train each preset without a variant."""
    minutes: float = field(default=15.0, metadata={"low": 0.001, "high": 1e6})
    """Training time of each run; one that reaches its other limits (total-steps) ends earlier."""
    budget_minutes: float = field(default=0.0, metadata={"low": 0, "high": 1e6})
    """No run is started that would not end in this time, counted from now; 0: no limit."""
    parallel: int = field(default=1, metadata={"low": 1, "high": 1024})
    """Runs side by side, each bound to its share of the cores where the system can do that, and to a GPU of its own
    where there is one for each."""
    episodes: int = field(default=100, metadata={"low": 1, "high": 1e6})
    """Games of each evaluation."""
    dir: Path | None = None
    """The sweep's folder; by default runs/sweeps/<presets>."""

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.dir or Path("runs") / "sweeps" / shortened("_".join(dict.fromkeys(self.presets)))

    @property
    def fixed(self) -> dict[str, Any]:
        """What scores depend on. Presets, variants and seeds may be added later, and the budget is of the day."""
        fixed = asdict(self)
        for name in ("presets", "variants", "seeds", "base", "budget_minutes", "dir"):
            del fixed[name]
        return fixed | {"settings": label(read_settings(self.settings, "--settings"))}


@dataclass(frozen=True)
class Job:
    """A run of a sweep."""

    preset: str
    variant: str  # what it changes, or BASE
    seed: int
    arguments: tuple[str, ...]  # of train, without the run's folder
    config: RunConfig
    run_dir: Path

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others, as in sweep.csv."""
        return self.preset, self.variant, str(self.seed)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.preset} {self.variant} seed {self.seed}"


def plan(options: SweepConfig, threads: int, read: Callable[[Sequence[str]], RunConfig]) -> list[Job]:
    """All runs of a sweep, in the order in which they are started: all variants of a seed before the next seed.

    Args:
        options: the sweep's.
        threads: cores that each run has.
        read: the configuration that these arguments of `train` stand for; UserError when they cannot be.

    Returns:
        The runs; UserError for whatever cannot be run.
    """
    check_bounds(options, "--")
    if not options.presets:
        raise UserError("no preset: name one or more first, sweep gravitar ...")
    if not options.seeds:
        raise UserError("--seeds names no seed")
    shared = read_settings(options.settings, "--settings")
    changes = [read_settings(text, "--variants") for text in options.variants]
    if not all(changes):
        raise UserError("--variants has an empty text: a variant is setting=value; the base runs unless --no-base")
    variants = dict.fromkeys([BASE] * options.base) | {label(changed): changed for changed in changes}
    if not variants:
        raise UserError("--no-base without --variants leaves nothing to run")
    jobs = [
        make_job(options, preset, name, shared | (changed or {}), threads, read)
        for preset in dict.fromkeys(options.presets)
        for name, changed in variants.items()
    ]
    return list(_with_seeds(options, jobs))


def read_settings(text: str, option: str) -> dict[str, str]:
    """ "agent.n-step=1 seed=2" by dotted names; UserError for what is no setting, or the sweep's own."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r} cannot be read: {error}") from None
    settings = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not equals or not name:
            raise UserError(f"{option} {text!r}: {word!r} is not of the form setting=value")
        if name in OWN:
            raise UserError(f"{option} {text!r}: {name} is not for a sweep to change, {OWN[name]}")
        settings[name] = value
    return settings


def label(settings: Mapping[str, str]) -> str:
    """Settings as they are typed."""
    return " ".join(f"{name.replace('_', '-')}={value}" for name, value in settings.items())


def make_job(
    options: SweepConfig,
    preset: str,
    variant: str,
    settings: Mapping[str, str],
    threads: int,
    read: Callable[[Sequence[str]], RunConfig],
) -> Job:
    """The run of a preset's variant, with the first seed; UserError, which names both, when it cannot be."""
    default = get_preset(preset)
    given = {"dashboard": "off", "video_every": "0", "env.num_threads": str(threads), **settings}
    given |= {"total_minutes": f"{options.minutes:g}"}
    arguments = (preset, *as_options(default, given))
    try:
        config = read(arguments)
    except UserError as error:
        raise UserError(f"{preset} {variant}: {error}") from None
    return Job(preset, variant, 0, arguments, config, options.folder)


def as_options(preset: RunConfig, settings: Mapping[str, str]) -> Iterator[str]:
    """Settings by dotted names as options of `train`, which has switches instead of true and false."""
    known = flatten(to_dict(preset))
    for name, value in settings.items():
        part, dot, last = name.replace("_", "-").rpartition(".")
        if isinstance(known.get(name), bool) and value.lower() in ("true", "false"):
            yield f"--{part}{dot}{'' if value.lower() == 'true' else 'no-'}{last}"
        else:
            yield f"--{part}{dot}{last}={value}"


def _with_seeds(options: SweepConfig, jobs: Sequence[Job]) -> Iterator[Job]:
    """Each run with each seed and a folder of its own. A budget that ends early then leaves whole comparisons."""
    for seed in dict.fromkeys(options.seeds):
        for job in jobs:
            config = replace(job.config, seed=seed)
            validate(config)
            name = shortened(f"{job.preset}__{job.variant}__{seed}")
            arguments = (*job.arguments, f"--seed={seed}")
            yield replace(job, seed=seed, arguments=arguments, config=config, run_dir=options.folder / name)


def shortened(name: str) -> str:
    """A name that every file system takes, and that no other name is changed to."""
    plain = re.sub(r"[^\w.=+-]+", "_", name)
    if plain == name.replace(" ", "_") and len(plain) <= 120:
        return plain
    return f"{plain[:110]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"

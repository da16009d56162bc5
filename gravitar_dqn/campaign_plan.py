"""What a campaign is asked for, how it shares out its time, and what it remembers from one call to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from gravitar_dqn.errors import UserError
from gravitar_dqn.files import read_json, write_json
from gravitar_dqn.presets import get_preset
from gravitar_dqn.serialization import flatten, to_dict
from gravitar_dqn.sweep_plan import LAST_PART, as_options, for_snapshots, label, read_settings

STAGES = ("tests", "benchmark", "train", "weights", "evaluation", "curves")
DONE, FAILED, CUT_SHORT, SKIPPED = "done", "failed", "cut short", "skipped"
ENDLESS = 10**12  # steps: the time ends the run
# What the campaign sets itself. The rest of the run can be changed with --settings.
OWN = {
    "preset": "the preset comes first",
    "seed": "--seed sets it",
    "device": "--device sets it",
    "total_minutes": "--minutes sets it",
    "checkpoint_minutes": "it follows from --minutes",
    "keep_checkpoints": "it follows from --minutes",
    "run_dir": "--dir sets it",
    "resume": "the same command again goes on",
    "profile": "profile a single run with train",
}
QUICK = {  # settings that are at most so large, where the preset has them
    "env.num_envs": 4,
    "log_seconds": 0.2,
    "agent.learning_starts": 200,
    "agent.buffer_size": 5_000,
    "agent.batch_size": 32,
    "agent.num_steps": 16,
    "rnd.init_steps": 20,
    "tasks.replay_length": 200,
    "tasks.num_windows": 2,
}


@dataclass(frozen=True)
class CampaignConfig:
    """What a campaign is asked for."""

    preset: tyro.conf.Positional[str] = "gravitar-ram"
    """What is trained."""
    dir: Path = Path("runs/campaign")
    """The campaign's folder; it may be moved to another machine between two calls."""
    minutes: float = field(default=45.0, metadata={"low": 0.1, "high": 1e6})
    """Time of the whole campaign, all calls together. Only an evaluation that is slow may exceed it."""
    piece_minutes: float = field(default=9.0, metadata={"low": 0.25, "high": 1e6})
    """This call ends before so much time has passed; the next one goes on."""
    seed: int = 742
    """Of the run."""
    settings: str = ""
    """Settings of the run, "env.num-envs=256 agent.batch-size=1024"."""
    quick: bool = False
    """Everything small, to try a campaign on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.dir / f"{self.preset}__{self.seed}"

    @property
    def piece_seconds(self) -> float:
        """Seconds of this call."""
        return 60 * self.piece_minutes

    @property
    def margin(self) -> float:
        """Seconds at the end of a call in which nothing is done but saving."""
        return min(30.0, 0.1 * self.piece_seconds)

    @property
    def reserve(self) -> float:
        """Seconds that are kept for what follows the training. They fit into a call."""
        return min(9.0 * self.minutes, 0.8 * self.piece_seconds)

    @property
    def least(self) -> float:
        """Seconds of the shortest training that is worth its start."""
        return min(60.0, 0.2 * self.piece_seconds, 6.0 * self.minutes)

    @property
    def games(self) -> int:
        """Of each evaluation."""
        return 4 if self.quick else 100

    @property
    def snapshots(self) -> int:
        """Checkpoints of the run's last part that are evaluated too."""
        return 2 if self.quick else 5

    def needed(self, stage: str) -> float:
        """Seconds that a stage probably takes; only a call that has just begun starts it with fewer left."""
        usual = {"tests": 180.0, "benchmark": 180.0, "weights": 5.0, "curves": 15.0}
        return self.reserve if stage == "evaluation" else usual[stage] * (0.25 if self.quick else 1)


def settings_of(options: CampaignConfig) -> dict[str, str]:
    """--settings by dotted names; UserError where it cannot be read."""
    return read_settings(options.settings, "--settings", OWN, "a campaign")


def arguments_of(options: CampaignConfig) -> list[str]:
    """Arguments of `train` for the run, without those that change from call to call, and without its folder."""
    preset = get_preset(options.preset)
    given = {"dashboard": "off", "video_every": "0", "total_steps": str(ENDLESS)}
    if options.quick:
        values = flatten(to_dict(preset))
        given |= {name: str(min(values[name], small)) for name, small in QUICK.items() if name in values}
    return [options.preset, *as_options(preset, given | settings_of(options)), f"--seed={options.seed}"]


def free_arguments(options: CampaignConfig, trained: float, left: float, span: float) -> list[str]:
    """Arguments of `train` that change from call to call.

    Args:
        options: the campaign's.
        trained: seconds that the run was trained before.
        left: seconds of training that the whole campaign still has.
        span: seconds of training in this call.
    """
    minutes = (trained + left) / 60
    probable = 0.9 * minutes  # starting and saving take time too
    free = for_snapshots(options.snapshots, probable)
    if trained + span < 60 * probable * (1 - LAST_PART):  # nothing of the last part yet: what travels stays small
        free["keep_checkpoints"] = "2"
    free |= {"total_minutes": f"{minutes:.4f}", "device": options.device}
    return list(as_options(get_preset(options.preset), free))


@dataclass
class Stage:
    """What became of a stage."""

    outcome: str = ""  # empty until it has ended
    seconds: float = 0.0
    tries: int = 0  # calls that began it
    said: str = ""


@dataclass
class State:
    """What a campaign remembers: campaign.json. It holds no absolute path."""

    options: dict[str, Any]
    seconds: float = 0.0  # of all calls
    stages: dict[str, Stage] = field(default_factory=lambda: {name: Stage() for name in STAGES})
    machines: list[str] = field(default_factory=list)  # devices that the run was trained on
    commits: list[str] = field(default_factory=list)  # of the source, where known

    @property
    def next(self) -> str | None:
        """The stage that has not ended yet; None when all have."""
        return next((name for name in STAGES if not self.stages[name].outcome), None)

    @property
    def failed(self) -> bool:
        """Whether a stage did not end well."""
        return any(stage.outcome in (FAILED, CUT_SHORT) for stage in self.stages.values())

    def save(self, folder: Path) -> None:
        """Write campaign.json."""
        write_json(folder / "campaign.json", asdict(self))


def load(path: Path) -> State:
    """The state in a campaign.json; UserError when it holds none."""
    saved = read_json(path)
    try:
        stages = {name: Stage(**saved["stages"][name]) for name in STAGES}
        return State(**{**saved, "stages": stages})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a campaign's, or of another version ({error})") from None


def claim(options: CampaignConfig) -> State:
    """The state of the campaign in its folder, which is begun where there is none.

    UserError when the folder holds a campaign of other options.
    """
    asked = {name: value for name, value in asdict(options).items() if name not in ("dir", "piece_minutes")}
    asked["settings"] = label(settings_of(options))
    path = options.dir / "campaign.json"
    if path.exists():
        state = load(path)
        if told := changes(state.options, asked):
            raise UserError(
                f"{options.dir} holds a campaign with other options, another --dir starts anew: {'; '.join(told)}"
            )
        return state
    options.dir.mkdir(parents=True, exist_ok=True)
    state = State(asked)
    state.save(options.dir)
    return state


def changes(before: Mapping[str, Any], asked: Mapping[str, Any]) -> Sequence[str]:
    """What differs, as lines `name: old -> new`."""
    return [f"{name}: {before.get(name)} -> {value}" for name, value in asked.items() if before.get(name) != value]

"""A training run: build environments and agent, train, save, resume."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gravitar_dqn.agents import entry_of
from gravitar_dqn.agents.base import Agent
from gravitar_dqn.config import RunConfig, to_dict
from gravitar_dqn.dashboard.connection import check_address
from gravitar_dqn.dashboard.thread import Dashboard
from gravitar_dqn.dashboard.visdom_server import find_or_start_server
from gravitar_dqn.envs import make_envs, spec_of
from gravitar_dqn.envs.spec import EnvSpec, find_game, is_atari
from gravitar_dqn.errors import NotFinite, NotSaved, OutOfMemory, RankLost, UserError
from gravitar_dqn.evaluation.evaluator import Evaluator
from gravitar_dqn.evaluation.video import Recorder
from gravitar_dqn.loop import Episode, Observer, Timer, can_overlap, play
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.folder import cannot_be_written, check_free, lock, removed_after_errors, write_config
from gravitar_dqn.run.logs import show_log, speaks
from gravitar_dqn.run.status import shares
from gravitar_dqn.run.telemetry import Console, Tracker
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.clock import Every
from gravitar_dqn.runtime.execution import (
    check_execution,
    choose_device,
    choose_execution,
    choose_precision,
    describe_device,
    enough_memory,
    keep_freed_memory,
    use_threads,
)
from gravitar_dqn.runtime.processes import Stop, command_line

log = logging.getLogger(__name__)

# The figures are those of the README.
PICTURES_ON_A_CPU = (
    "pictures learn slowly on a CPU. RAM learns faster there: the preset gravitar-ram plays more "
    "than twice as many steps a second and learns four times as many samples from each"
)


class Checkpointer:
    """Saves the run every `checkpoint_minutes`, but never NaN. A full disk costs a warning, not the run."""

    def __init__(self, run_dir: Path, config: RunConfig, agent: Agent, tracker: Tracker, console: Console) -> None:
        self._run_dir, self._config = run_dir, config
        self._agent, self._tracker, self._console = agent, tracker, console
        self._began = tracker.wall_seconds
        self._every = Every(60 * config.checkpoint_minutes)
        self.saved_step = agent.global_step  # of the newest checkpoint

    def step(self, episodes: list[Episode]) -> None:
        """Save when it is time."""
        if self._every.due(self._tracker.wall_seconds - self._began):
            try:
                self.save()
            except OSError as error:
                log.warning("%s; the one of step %d stays", error, self.saved_step)

    def save(self) -> None:
        """Write a checkpoint now.

        OSError when it cannot be written; NotFinite when what it would hold has NaN or infinity.
        """
        state = self.state(replay=self._config.checkpoint_replay and distributed.size() == 1)
        checkpoint.save(self._run_dir, state, self._agent.global_step, self._config.keep_checkpoints)
        self.saved_step = self._agent.global_step

    def state(self, *, replay: bool = False) -> dict[str, Any]:
        """What a checkpoint of this moment holds; NotFinite when there is NaN or infinity in it."""
        state = {
            "config": to_dict(self._config),
            "agent": self._agent.state_dict(replay=replay),
            "tracker": self._tracker.state_dict(),
            "console": self._console.state_dict(),
        }
        if name := checkpoint.not_finite(state):
            raise NotFinite(f"{name} holds NaN or infinity")
        return state

    def save_last(self) -> None:
        """`save`, or NotSaved."""
        try:
            self.save()
        except OSError as error:
            stays = f"{self._run_dir} stays as of step {self.saved_step}"
            raise NotSaved(f"step {self._agent.global_step} could not be saved, {stays}: {error}") from None


@contextlib.contextmanager
def follow(
    config: RunConfig,
    run_dir: Path,
    agent: Agent,
    spec: EnvSpec,
    state: Mapping[str, Any],
    further: Callable[[], Iterable[Observer]],
) -> Iterator[tuple[Tracker, Checkpointer, Evaluator, list[Observer]]]:
    """Everything that follows a run, dashboard and films too, in the order of their calls; closed at the end."""
    with contextlib.ExitStack() as closing:
        try:
            write_config(
                run_dir,
                config,
                device=describe_device(agent.device),
                precision=choose_precision(config.precision, agent.device),
                execution=choose_execution(distributed.share_of(config).execution, agent.device),
                frames_per_step=spec.frames_per_step,
                ranks=distributed.size(),
                metrics=list(agent.measured),
            )
            tracker = Tracker(run_dir, config, agent, spec.frames_per_step, state.get("tracker"))
            console = Console(agent, state.get("console"))
            checkpointer = Checkpointer(run_dir, config, agent, tracker, console)
            evaluator = Evaluator(run_dir, config, agent, checkpointer.state, resumed=bool(state))
            others = [*further()]
            if not state:
                checkpointer.save()  # so that a kill leaves something whole to resume from
        except OSError as error:
            raise cannot_be_written(run_dir, error) from None
        beginning = "going on with" if state else "run folder:"
        ranks = f"{distributed.size()} ranks of " if distributed.size() > 1 else ""
        log.info("%s %s, on %s%s", beginning, run_dir, ranks, describe_device(agent.device))
        if not state:
            log.info("learning begins after %s steps", f"{config.first_update:,}")
        elif agent.partial_buffer_size == 0:
            kept = " (--checkpoint-replay keeps it)" if distributed.size() == 1 else ""
            log.info(f"the replay buffer fills anew before learning goes on{kept}")
        video_dir = Path(config.video_dir) / run_dir.name
        server = find_or_start_server() if config.dashboard == "auto" else config.dashboard
        if server not in (None, "off"):
            dashboard = Dashboard(run_dir, server, video_dir=video_dir)
            dashboard.start()
            closing.callback(dashboard.close)
            log.info("dashboard: %s", dashboard.url)
        recorder = Recorder(config, video_dir, agent, console)
        closing.enter_context(tracker)
        closing.callback(recorder.close)
        closing.callback(evaluator.close)
        yield tracker, checkpointer, evaluator, [console, tracker, recorder, checkpointer, evaluator, *others]


def check_machine(config: RunConfig) -> torch.device:
    """The run's device; UserError for a game, a device or a way to run that is not on this machine."""
    device = choose_device(config.device)
    check_execution(config.execution, device)
    find_game(config.env)
    return device


def build(config: RunConfig) -> tuple[Any, Agent]:
    """The environments and a new agent for them, seeded. Logs what takes time, and the replay buffer's size.

    Of several ranks, those of this one.
    """
    torch.manual_seed(config.seed)  # the same first weights on all ranks
    config = distributed.share_of(config)
    device = check_machine(config)
    keep_freed_memory()
    use_threads(config.threads)
    each = f" on each of {distributed.size()} ranks" if distributed.size() > 1 else ""
    log.info("starting %d games of %s%s", config.env.num_envs, config.env.id, each)  # many take some seconds
    envs = make_envs(config.env)
    spec = spec_of(envs)
    if device.type == "cpu" and spec.kind == "picture" and config.preset == "gravitar":
        log.info(PICTURES_ON_A_CPU)
    agent = entry_of(config).make(config, spec, device)
    for complaint in doubts(config):
        log.warning(complaint)
    return envs, agent


def doubts(config: RunConfig) -> Iterator[str]:
    """What is allowed, but hardly meant."""
    if config.total_steps <= config.first_update:
        yield (
            f"the run ends after {config.total_steps} steps and learns nothing: learning begins after "
            f"{config.first_update}"
        )
    if config.checkpoint_replay and distributed.size() > 1:
        yield "--checkpoint-replay is for one process: the replay buffers of several ranks are not saved"
    if config.env.obs_type == "ram" and not is_atari(find_game(config.env)):
        yield f"env.obs_type ram is for ALE's games: {config.env.id} is played as without it"
    meant = PRESETS[config.preset].env if config.preset in PRESETS else config.env
    if is_atari(find_game(meant)) != is_atari(find_game(config.env)):
        yield (
            f"the preset {config.preset} has settings for {meant.id}, {config.env.id} is a game of another kind: "
            "another preset may learn better"
        )


def train(
    config: RunConfig, run_dir: Path, *, resume: bool = False, auto: bool = False, show_times: bool = False
) -> int:
    """Train until `total_steps`, `total_episodes`, `total_minutes` or Ctrl-C, and save.

    Args:
        config: the run's settings.
        run_dir: the run's folder; ranks other than 0 do not look at it.
        resume: resume from the newest checkpoint.
        auto: a run that is complete is no error.
        show_times: print at the end where the time went.

    Returns:
        The process's exit code: 0 at the end, 128 and its number after a signal.
    """
    show_log()
    if config.dashboard not in ("auto", "off"):
        check_address(config.dashboard)
    find_game(config.env)
    with distributed.joined(config):
        if distributed.rank() > 0:
            return help_train(config)
        return lead(config, run_dir, resume=resume, auto=auto, show_times=show_times)


def help_train(config: RunConfig) -> int:
    """Play and learn as one of the ranks, until rank 0 has saved what all have learned; the process's exit code."""
    try:
        with Stop() as stop, enough_memory():
            envs, agent = build(config)
            with contextlib.closing(envs):
                if not (state := distributed.same({})):  # the run is complete
                    return 0
                agent.load_state_dict(state | {"generator": None})  # its random numbers are its own
                seed = distributed.share_of(config).seed + agent.global_step
                for _ in play(envs, agent, seed, overlap=can_overlap(envs, agent)):
                    agent.messages.clear()
                    if wish := distributed.agreed(stop.exit_code):
                        break
                distributed.leave()
                return 0 if wish == distributed.END else wish
    except (UserError, OSError) as error:
        # Rank 0 tells of a lost one too, unless it is that itself: so rank 1 does.
        if not speaks() and (not isinstance(error, RankLost) or distributed.rank() == 1):
            log.error("rank %d: %s", distributed.rank(), error)
        raise


def lead(config: RunConfig, run_dir: Path, *, resume: bool, auto: bool, show_times: bool) -> int:
    """Train alone, or as rank 0, as `train` says."""
    with lock(run_dir):
        damaged: list[checkpoint.NotWhole] = []
        state = checkpoint.load(run_dir, damaged=damaged) if resume else {}
        if not resume:
            check_free(run_dir)  # another one may have begun and ended in it since the command was read
        with enough_memory():
            envs, agent = build(config)
        with contextlib.closing(envs):
            if resume:
                restore(agent, state, run_dir)
                if finished(config, agent, state["tracker"]["wall_seconds"]):
                    complete = (
                        f"{run_dir} is complete ({agent.global_step} steps, {agent.episodes} games): "
                        "a higher --total-steps, --total-episodes or --total-minutes goes on"
                    )
                    if not auto:
                        raise UserError(complete)
                    log.info(complete)
                    distributed.same({})  # the others wait for it
                    return 0
            checkpoint.set_aside(run_dir, damaged)
            if distributed.size() > 1:
                distributed.same(agent.state_dict())
            return run(config, run_dir, envs, agent, state, show_times=show_times)


def run(
    config: RunConfig,
    run_dir: Path,
    envs: Any,
    agent: Agent,
    state: Mapping[str, Any],
    *,
    show_times: bool = False,
    further: Callable[[], Iterable[Observer]] = tuple,
    how_to_resume: str = "",
    stop: Stop | None = None,
) -> int:
    """Train an agent in environments, as `train` says.

    Args:
        config: the run's settings; a resume needs nothing else.
        run_dir: the run's folder, whose lock is held.
        envs: a vector environment.
        agent: who plays.
        state: the checkpoint that it was restored from; empty for a new run.
        show_times: print at the end where the time went.
        further: makes observers beside the usual ones, once the folder is this run's.
        how_to_resume: what goes on with the run; by default the command that started it, with --resume.
        stop: what signals set, for observers that take long.

    Raises:
        UserError: the run could not begin; a new run's folder is removed again.
        NotFinite: NaN or infinity was met; the last checkpoint stays.
        NotSaved: the run ended, but could not be saved; the last checkpoint stays.
        RankLost: another rank has ended; what was learned until then is saved.
    """
    farewell: list[str] = []
    how = how_to_resume or command_line(["--resume", str(run_dir)], "train")
    with stop or Stop() as stop, contextlib.ExitStack() as closing:
        closing.callback(lambda: log.info("\n".join(farewell)) if farewell else None)  # below the progress line
        following = follow(config, run_dir, agent, spec_of(envs), state, further)
        with contextlib.nullcontext() if state else removed_after_errors(run_dir):
            tracker, checkpointer, evaluator, observers = closing.enter_context(following)
        timer = Timer(torch.cuda.synchronize if show_times and agent.device.type == "cuda" else None)
        first_step = agent.global_step
        try:
            seed, overlap = config.seed + first_step, can_overlap(envs, agent)
            with enough_memory():
                for episodes in play(envs, agent, seed, overlap=overlap, timer=timer):
                    for observer in observers:
                        observer.step(episodes)
                    complete = finished(config, agent, tracker.wall_seconds)
                    if wish := distributed.agreed(distributed.END if complete else stop.exit_code):
                        break
                at_end = wish == distributed.END
                if not at_end:
                    log.info("stopping: the run is being saved")
                tracker.finish()
                checkpointer.save_last()
                distributed.leave()
                if at_end:
                    evaluator.finish(lambda: stop.requested)
        except (NotFinite, OutOfMemory, RankLost) as error:
            stays = f"{run_dir} stays as of step {checkpointer.saved_step}"
            if isinstance(error, RankLost):
                if not distributed.over_nccl():  # there the GPU may wait for ever for the one that is lost
                    checkpointer.save_last()
                    stays = "saved"
                stays += f", go on with: {how}"
            hint = "; a new run with a lower learning rate may do better" if isinstance(error, NotFinite) else ""
            raise type(error)(f"{error}; stopped at step {agent.global_step}; {stays}{hint}") from None
        if show_times:
            farewell.append(timer.table(agent.global_step - first_step))
        if at_end:
            farewell.append(f"done: {agent.global_step} steps, {agent.episodes} games, saved in {run_dir}")
            return 0
        farewell.append(f"stopped at step {agent.global_step}, saved; go on with: {how}")
        return wish


def restore(agent: Agent, state: dict[str, Any], run_dir: Path) -> None:
    """Move the agent's part of a checkpoint's state into a new agent; UserError when it does not fit."""
    try:
        learned = state.pop("agent")  # so that a replay buffer in it is not kept twice
        if distributed.size() > 1:
            learned["replay"] = None  # of one process, with all the games
        with enough_memory():
            agent.load_state_dict(learned)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
        raise UserError(
            f"the checkpoint in {run_dir} does not fit this version ({reason}): the commit in config.json wrote it"
        ) from None


def finished(config: RunConfig, agent: Agent, wall_seconds: float) -> bool:
    """Whether the run has reached its end, after `wall_seconds` of training."""
    return max(shares(config, agent.global_step, agent.episodes, wall_seconds)) >= 1

"""Videos of whole games, in colour and at real speed.

`record_game` plays and films one game. `Recorder` has it done by another process, so that training never waits: it
hands over a copy of the network that acts, goes on, and learns later that the film is there.

Frames are streamed into ffmpeg as they are drawn. (Gymnasium's `RecordVideo` keeps a game's pictures in memory: at
every emulator frame of a long game that is gigabytes.)
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gravitar_dqn.agents.base import Agent, Look
from gravitar_dqn.config import RunConfig, to_dict
from gravitar_dqn.envs import spec_of
from gravitar_dqn.envs.single import action_names, make_recorded_env
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation.acting import Policy, load_policy, play_games
from gravitar_dqn.evaluation.background import Worker, serve
from gravitar_dqn.evaluation.overlay import Overlay
from gravitar_dqn.loop import Episode
from gravitar_dqn.presets import from_dict
from gravitar_dqn.run.files import written_whole
from gravitar_dqn.run.telemetry import Console


@contextlib.contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[npt.NDArray[np.uint8]], None]]:
    """A function that appends pictures (height, width, 3) uint8 to the mp4 `path`, which appears when it is whole."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError("no video: there is no ffmpeg; pip install imageio-ffmpeg brings one") from None
    writer: Any = None

    def append(picture: npt.NDArray[np.uint8]) -> None:
        nonlocal writer
        if writer is None:
            height, width = picture.shape[:2]
            writer = imageio_ffmpeg.write_frames(
                str(temporary),
                (width, height),
                fps=fps,
                quality=6,
                macro_block_size=2,
                ffmpeg_log_level="fatal",
                ffmpeg_timeout=0,
            )
            writer.send(None)
        writer.send(np.ascontiguousarray(picture))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, suffix=".part.mp4") as temporary:
            try:
                yield append
            finally:
                if writer is not None:
                    writer.close()
            try:
                imageio_ffmpeg.count_frames_and_secs(str(temporary))
            except RuntimeError:  # ffmpeg says nothing when the disk fills up at the end
                raise OSError("ffmpeg could not finish it: is the disk full?") from None
    except OSError as error:
        raise UserError(f"no video: {path} cannot be written ({' '.join(str(error).split())[:200]})") from None


def record_game(
    config: RunConfig, network: nn.Module, path: Path, *, epsilon: float, seed: int, look: Look | None = None
) -> float:
    """Play one whole game on the CPU, film it to `path`, and return its score. UserError when it cannot be filmed.

    With `look`, a panel beside the game shows what the agent makes of it.
    """
    overlay: Overlay | None = None

    def show(picture: npt.NDArray[np.uint8]) -> None:
        append(picture if overlay is None else overlay.beside(picture))

    env, fps = make_recorded_env(config.env, show)
    try:
        if look is not None:
            overlay = Overlay(look, action_names(env))
        with mp4_writer(path, fps) as append:
            on_act = None if overlay is None else overlay.update
            policy = Policy(config, network, spec_of(env), 1, epsilon=epsilon, seed=seed, on_act=on_act)
            return play_games(env, policy, 1, seed)[0]
    except Exception as error:
        if isinstance(error, ImportError) or type(error).__module__.startswith("gymnasium"):  # there is no renderer
            raise UserError(f"no video: {' '.join(str(error).split())}") from None
        raise
    finally:
        env.close()


class Recorder:
    """Films a game with the present policy after every `video_every` episodes, in another process.

    While a game is being filmed further ones are skipped: training never waits. A failure is one warning, and the
    run goes on without videos.
    """

    def __init__(self, config: RunConfig, home: Path, agent: Agent, console: Console) -> None:
        self._config, self._home, self._agent, self._console = config, home, agent, console
        self._worker = Worker("gravitar_dqn.evaluation.video", "no more videos: the recording process ended")
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def step(self, episodes: list[Episode]) -> None:
        """Collect a finished film; order the next one when an episode calls for it."""
        if self._worker.busy:
            self._collect()
        for episode in episodes if self._config.video_every else ():
            if episode.number % self._config.video_every == 0 and self._worker.free:
                self._order(episode.number)

    def _order(self, number: int) -> None:
        try:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="gravitar_dqn_")
            weights = Path(self._scratch.name) / "policy.pt"
            torch.save(self._agent.policy_state(), weights)
            self._worker.order(
                {
                    "config": to_dict(self._config),
                    "weights": str(weights),
                    "home": str(self._home),
                    "number": number,
                    "epsilon": self._agent.epsilon,
                    "seed": self._config.seed + number,
                }
            )
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self._worker.give_up(f"no more videos: {error}")

    def _collect(self, timeout: float = 0.0) -> None:
        if (answer := self._worker.answer(timeout)) is not None:
            self._console.video(answer["number"], answer["score"])

    def close(self) -> None:
        """Wait a little for a film in the making, then end the process."""
        if self._worker.busy:
            self._collect(timeout=15.0)
        self._worker.close()
        if self._scratch is not None:
            for torn in self._home.glob("*.part.mp4"):
                torn.unlink(missing_ok=True)
            self._scratch.cleanup()


def _film(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order of a Recorder."""
    config, home, number = from_dict(order["config"]), Path(order["home"]), order["number"]
    network = load_policy(config, torch.load(order["weights"], map_location="cpu", weights_only=True))
    path = home / f"episode_{number:06d}.mp4"
    score = record_game(config, network, path, epsilon=order["epsilon"], seed=order["seed"])
    path.replace(home / f"episode_{number:06d}_score_{score:.0f}.mp4")
    return {"number": number, "score": score}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if (last := serve(_film)) is not None:  # training was killed: nobody else will clear up
        shutil.rmtree(Path(last["weights"]).parent, ignore_errors=True)

"""Recordings: whole films at real speed, made beside training, and nothing left behind when they cannot be."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import pytest
import torch
from faults import injected
from probes import spec_of_shape
from run_helpers import CARTPOLE, ROOT, train

from gravitar_dqn import training
from gravitar_dqn.cli import commands
from gravitar_dqn.config import DQNRunConfig
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation.video import Recorder, mp4_writer, record_game
from gravitar_dqn.loop import Episode
from gravitar_dqn.networks import DuelingConvQNetwork, QNetwork, make_q_network
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.logs import show_log
from gravitar_dqn.run.telemetry import Console

CARTPOLE_CONFIG = PRESETS["cartpole"]
PATIENCE = 300.0  # seconds; films get only processor time that nobody else wants


def limited(preset: str, **settings: Any) -> DQNRunConfig:
    """The preset's configuration with these settings of its environment."""
    return replace(PRESETS[preset], env=replace(PRESETS[preset].env, **settings))


def film(path: Path) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    """What ffmpeg tells about a film, and its pictures (time, height, width, 3)."""
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(picture, dtype=np.uint8).reshape(height, width, 3) for picture in reader])


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_game_is_filmed_whole_in_colour_and_at_real_speed(tmp_path: Path) -> None:
    config = limited("gravitar", max_frames=400, noop_max=0, sticky_actions=0.0)
    path = tmp_path / "a" / "game.mp4"
    score = record_game(config, DuelingConvQNetwork(4, 18), path, epsilon=1.0, seed=5)
    assert score >= 0
    assert everything(tmp_path) == ["a", "game.mp4"]
    about, pictures = film(path)
    assert about["fps"] == 60
    assert about["codec"] == "h264"
    assert about["size"] == (160, 210)
    assert len(pictures) == pytest.approx(400 + 1, abs=4)  # 100 agent steps of 4, and the start
    assert len(pictures) / 60 == pytest.approx(about["duration"], abs=0.1)
    colour = pictures.max(axis=3).astype(int) - pictures.min(axis=3)
    assert colour.max() > 60, "the film is grey"


def test_the_filmed_policy_is_the_networks(tmp_path: Path) -> None:
    """A network that always pushes left loses CartPole within 10 steps or so; alternating would not."""
    left = QNetwork(4, 2)
    torch.nn.init.zeros_(left.layers[-1].weight)
    left.layers[-1].bias.data = torch.tensor([1.0, 0.0])
    score = record_game(CARTPOLE_CONFIG, left, tmp_path / "left.mp4", epsilon=0.0, seed=1)
    assert 8 <= score <= 11
    about, pictures = film(tmp_path / "left.mp4")
    assert about["fps"] == 50
    assert about["size"] == (600, 400)
    assert len(pictures) == score + 1


def test_the_same_seed_films_the_same_game(tmp_path: Path) -> None:
    config, q_network = limited("gravitar", max_frames=200), DuelingConvQNetwork(4, 18)
    films = []
    for name in "ab":
        record_game(config, q_network, tmp_path / f"{name}.mp4", epsilon=0.5, seed=5)
        films.append(film(tmp_path / f"{name}.mp4")[1])
    np.testing.assert_array_equal(*films)


def write(path: Path, pictures: Iterable[npt.NDArray[np.uint8]]) -> None:
    with mp4_writer(path, 60) as append:
        for picture in pictures:
            append(picture)


def test_a_film_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def pictures() -> Iterator[npt.NDArray[np.uint8]]:
        yield np.zeros((210, 160, 3), dtype=np.uint8)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.mp4", pictures())
    assert everything(tmp_path) == []


@pytest.mark.faults
def test_an_encoder_that_dies_is_a_video_error_and_leaves_nothing(tmp_path: Path) -> None:
    injected("encoder killed during a film")

    def pictures() -> Iterator[npt.NDArray[np.uint8]]:
        (tmp_path / "gone").rmdir()  # ffmpeg finds nowhere to write
        while True:
            yield np.zeros((210, 160, 3), dtype=np.uint8)

    with pytest.raises(UserError, match=r"^no video: .*a\.mp4 cannot be written \("):
        write(tmp_path / "gone" / "a.mp4", pictures())
    assert everything(tmp_path) == []


@pytest.mark.faults
def test_a_film_that_the_disk_cuts_short_is_not_passed_off_as_whole(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk. ffmpeg notices it only when it ends the film."""
    injected("disk full during a film")
    code = f"""
import resource, signal
import numpy as np
from pathlib import Path
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation.video import mp4_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
pictures = np.random.default_rng(0).integers(0, 255, (20, 210, 160, 3), dtype=np.uint8)  # about 320 kB of film
try:
    with mp4_writer(Path({str(tmp_path / "a.mp4")!r}), 60) as append:
        for picture in pictures:
            append(picture)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"no video: .*a\.mp4 cannot be written \(.*is the disk full\?\)\n", done.stdout)
    assert everything(tmp_path) == []


def test_a_place_that_cannot_be_written_is_a_video_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^no video: "):
        record_game(CARTPOLE_CONFIG, QNetwork(4, 2), tmp_path / "file" / "a.mp4", epsilon=1.0, seed=1)


def test_without_ffmpeg_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(UserError, match="there is no ffmpeg; pip install imageio-ffmpeg brings one"):
        record_game(CARTPOLE_CONFIG, QNetwork(4, 2), tmp_path / "a" / "game.mp4", epsilon=1.0, seed=1)
    assert everything(tmp_path) == []


def test_watch_says_so_when_there_is_no_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*CARTPOLE, "--total-steps", 60, "--run-dir", tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    words = [str(tmp_path / "run"), "--video-dir", str(tmp_path / "videos")]
    assert commands.run(commands.watch_command, words, "watch.py") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no video: ") and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.mp4"))


def test_watch_films_as_many_games_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(*CARTPOLE, "--total-steps", 60, "--run-dir", tmp_path / "run")
    capsys.readouterr()
    words = [str(tmp_path / "run"), "--episodes", "2", "--epsilon", "1", "--video-dir", str(tmp_path / "videos")]
    assert commands.run(commands.watch_command, words, "watch.py") == 0
    home = tmp_path / "videos" / "run"
    assert everything(home) == ["step_60_seed_742.mp4", "step_60_seed_743.mp4"]
    lines = capsys.readouterr().out.splitlines()
    for line, path in zip(lines, sorted(home.iterdir()), strict=True):
        pictures = len(film(path)[1])
        assert line == f"{path}: score {pictures - 1}"


def test_watch_plays_a_run_of_the_version_before_and_shows_what_its_policy_says(tmp_path: Path) -> None:
    """What it kept beside the policy has other names and shapes today."""
    train(*CARTPOLE, "--rnd.coef", 0.1, "--total-steps", 60, "--run-dir", tmp_path / "run")
    path = (checkpoint.folder(tmp_path / "run") / "latest").resolve()
    state = checkpoint.read(path)
    state["agent"]["curiosity"] = state["agent"].pop("rnd")
    torch.save({**state, "format": 2}, tmp_path / "old.pt")
    (tmp_path / "old.pt").replace(path)
    words = [str(tmp_path / "run"), "--epsilon", "1", "--overlay", "--video-dir", str(tmp_path / "videos")]
    assert commands.run(commands.watch_command, words, "watch.py") == 0
    assert everything(tmp_path / "videos" / "run") == ["step_60_seed_742_overlay.mp4"]


class Agent:
    """As much of an agent as a Recorder looks at."""

    def __init__(self) -> None:
        self.q_network, self.epsilon, self.messages, self.episodes = QNetwork(4, 2), 1.0, [], 0
        self.partial_buffer_size = None

    def policy_state(self) -> dict[str, torch.Tensor]:
        return self.q_network.state_dict()


def make_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DQNRunConfig = CARTPOLE_CONFIG) -> Recorder:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    agent: Any = Agent()
    return Recorder(replace(config, video_every=25), tmp_path / "videos", agent, Console(agent))


def wait_for(recorder: Recorder) -> None:
    """Step until the film that was ordered is there."""
    deadline = time.monotonic() + PATIENCE
    while recorder._worker.busy:
        assert time.monotonic() < deadline, "no film in time"
        recorder.step([])
        time.sleep(0.01)


def test_every_25th_episode_is_filmed_by_another_process_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = make_recorder(tmp_path, monkeypatch)
    recorder.step([Episode(number, number, 0.0, 1) for number in range(1, 25)])
    assert recorder._worker._process is None, "nothing was to be filmed yet"
    began = time.monotonic()
    recorder.step([Episode(25, 25, 0.0, 1)])
    assert time.monotonic() - began < 0.5, "training waited"
    recorder.step([Episode(50, 50, 0.0, 1)])  # skipped: the first film is not there yet
    wait_for(recorder)
    recorder.step([Episode(74, 74, 0.0, 1), Episode(75, 75, 0.0, 1)])
    wait_for(recorder)
    process = recorder._worker._process
    recorder.close()
    assert process is not None and process.poll() is not None, "the process lives on"
    assert everything(tmp_path / "scratch") == []
    paths = sorted((tmp_path / "videos").iterdir())
    assert [path.name.split("_score_")[0] for path in paths] == ["episode_000025", "episode_000075"]
    scores = [int(path.stem.split("_score_")[1]) for path in paths]
    assert [len(film(path)[1]) - 1 for path in paths] == scores
    best, of = (scores[0], 25) if scores[0] >= scores[1] else (scores[1], 75)
    assert capsys.readouterr().out.splitlines() == [
        f"video: 25, score: {scores[0]} (best {scores[0]}.0 at episode 25)",
        f"video: 75, score: {scores[1]} (best {best}.0 at episode {of})",
    ]


@pytest.mark.faults
def test_closing_in_the_middle_of_a_film_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    injected("stop during a film")
    config = limited("gravitar", max_frames=100_000)
    recorder = make_recorder(tmp_path, monkeypatch, config)
    recorder._agent.q_network = make_q_network(spec_of_shape((4, 84, 84)), config.agent)
    recorder.step([Episode(0, 0, 0.0, 1)])
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "videos").glob("*.part.mp4")):
        assert time.monotonic() < deadline and recorder._worker.busy
        time.sleep(0.005)
    monkeypatch.setattr(recorder, "_collect", lambda timeout=0.0: None)  # do not wait for the film
    recorder.close()
    assert everything(tmp_path / "videos") == []
    assert everything(tmp_path / "scratch") == []


@pytest.mark.faults
def test_a_recording_process_that_dies_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    injected("recording process killed")
    show_log()
    recorder = make_recorder(tmp_path, monkeypatch)
    recorder.step([Episode(0, 0, 0.0, 1)])
    assert recorder._worker._process is not None
    recorder._worker._process.kill()
    wait_for(recorder)
    recorder.step([Episode(25, 25, 0.0, 1)])
    recorder.close()
    assert capsys.readouterr() == ("", "warning: no more videos: the recording process ended\n")
    assert everything(tmp_path / "scratch") == []


def run_until(monkeypatch: pytest.MonkeyPatch, reached: Any) -> None:
    """Let a training run end when `reached` says so."""
    deadline = time.monotonic() + PATIENCE
    monkeypatch.setattr(
        training, "finished", lambda config, agent, wall_seconds: bool(reached()) or time.monotonic() > deadline
    )


@pytest.mark.slow
def test_a_training_run_records_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "videos" / "run"
    run_until(monkeypatch, lambda: list(home.glob("*_score_*.mp4")))
    words = ["--video-every", 25, "--video-dir", home.parent, "--run-dir", tmp_path / "run"]
    assert train(*CARTPOLE, *words) == 0
    (path,) = home.iterdir()
    score = int(path.stem.removeprefix("episode_000000_score_"))
    told = capsys.readouterr()
    assert f"video: 0, score: {score} (best {score}.0 at episode 0)\n" in told.out
    assert "warning" not in told.err
    assert len(film(path)[1]) == score + 1


def test_a_training_run_without_ffmpeg_goes_on_with_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "imageio_ffmpeg.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stubs'}:{ROOT}")
    ended: list[int] = []

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    def enough() -> bool:
        ended.append(1)
        return len(warnings()) > 0 and len(ended) > 400

    run_until(monkeypatch, enough)
    words = ["--video-every", 1, "--video-dir", tmp_path / "videos", "--run-dir", tmp_path / "run"]
    assert train(*CARTPOLE, *words) == 0
    assert warnings() == ["no video: there is no ffmpeg; pip install imageio-ffmpeg brings one"]
    said = capsys.readouterr()
    assert said.err.count("warning: ") == 1
    assert "video:" not in said.out
    assert not (tmp_path / "videos").exists()

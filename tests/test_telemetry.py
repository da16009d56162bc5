"""What a run tells: console lines to the letter, and CSV files that hold whole rows whatever the disk does."""

import csv
import errno
import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faults import injected
from run_helpers import rows

from gravitar_dqn.config import DQNRunConfig
from gravitar_dqn.errors import NotFinite, NotSaved
from gravitar_dqn.loop import Episode
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run.csv_log import CsvLog
from gravitar_dqn.run.logs import show_log
from gravitar_dqn.run.telemetry import METRICS, Console, Tracker

COLUMNS = ["global_step", "score"]


@pytest.fixture(autouse=True)
def shown_log() -> None:
    """Warnings go where a person sees them."""
    show_log()


@dataclass
class Agent:
    """As much of an agent as the observers look at."""

    global_step: int = 0
    episodes: int = 0
    num_updates: int = 0
    epsilon: float = 0.497
    messages: list[str] = field(default_factory=list)
    partial_buffer_size: int | None = 5156
    batch_size: int = 128
    metric_names: tuple[str, ...] = ("entropy",)

    def metrics(self) -> dict[str, float]:
        values = {"int_reward_mean": 0.5, "td_loss": 0.25, "q_mean": 1e7, "buffer_fill": 1.0}
        return {**values, "epsilon": self.epsilon, "int_reward_max": 2.0, "entropy": 0.75}


def game(number: int, score: float = 0.0, step: int = 0, length: int = 1) -> Episode:
    return Episode(number, step, score, length)


class TestConsole:
    def test_every_fifth_episode_has_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        Console(Agent()).step([game(5, 500.0)])
        assert capsys.readouterr().out == "episode: 5, score: 500, epsilon: 0.497, buffer size: 5156\n"

    def test_the_buffer_part_is_left_out_once_it_is_full(self, capsys: pytest.CaptureFixture[str]) -> None:
        Console(Agent(partial_buffer_size=None)).step([game(10, 250.0)])
        assert capsys.readouterr().out == "episode: 10, score: 250, epsilon: 0.497\n"

    def test_episodes_are_numbered_from_0_and_marked_every_100(self, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console(Agent())
        for number in range(201):
            console.step([game(number, 100.0)])
        lines = capsys.readouterr().out.splitlines()
        told = [line.split(",")[0] for line in lines if line.startswith("episode: ")]
        marks = [line.split(",")[1] for line in lines if line.startswith("marking, ")]
        assert told == [f"episode: {number}" for number in range(0, 201, 5)]
        assert marks == [" episode: 0", " episode: 100", " episode: 200"]
        assert len(lines) == len(told) + len(marks)

    def test_a_mark_tells_mean_and_std_since_the_last_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console(Agent())
        console.step([game(0, 0.0)])
        console.step([game(number, 200.0 * (number % 2)) for number in range(1, 101)])  # 50 times 200, 50 times 0
        console.step([game(number, 250.0) for number in range(101, 201)])
        marks = [line for line in capsys.readouterr().out.splitlines() if line.startswith("marking")]
        assert marks == [
            "marking, episode: 0, score: 0.0, mean_score: 0.00, std_score: 0.00",
            "marking, episode: 100, score: 0.0, mean_score: 100.00, std_score: 100.00",
            "marking, episode: 200, score: 250.0, mean_score: 250.00, std_score: 0.00",
        ]

    def test_a_video_is_told_with_the_best_so_far(self, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console(Agent())
        for number, score in ((0, 100.0), (25, 700.0), (50, 700.0), (75, 0.0)):
            console.video(number, score)
        assert capsys.readouterr().out.splitlines() == [
            "video: 0, score: 100 (best 100.0 at episode 0)",
            "video: 25, score: 700 (best 700.0 at episode 25)",
            "video: 50, score: 700 (best 700.0 at episode 25)",
            "video: 75, score: 0 (best 700.0 at episode 25)",
        ]

    def test_the_agents_messages_are_printed_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        agent = Agent(messages=["Matching network values"])
        console = Console(agent)
        console.step([])
        console.step([])
        assert capsys.readouterr().out == "Matching network values\n"

    def test_only_the_lines_others_parse_go_to_standard_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console(Agent())
        for number in (1, 2, 3, 4, 6, 99, 101):
            console.step([game(number, 100.0)])
        assert capsys.readouterr() == ("", "")

    def test_marks_and_best_go_on_after_a_resume(self, capsys: pytest.CaptureFixture[str]) -> None:
        before = Console(Agent())
        before.step([game(number, 0.0) for number in range(1, 51)])
        before.video(25, 700.0)
        after = Console(Agent(), before.state_dict())
        after.step([game(number, 200.0) for number in range(51, 101)])
        after.video(100, 100.0)
        assert capsys.readouterr().out.splitlines()[-2:] == [
            "marking, episode: 100, score: 200.0, mean_score: 100.00, std_score: 100.00",
            "video: 100, score: 100 (best 700.0 at episode 25)",
        ]


class TestCsvLog:
    def test_rows_are_on_the_disk_after_a_flush(self, tmp_path: Path) -> None:
        log = CsvLog(tmp_path / "a.csv", COLUMNS)
        log.add([1, 10])
        assert log.path.read_bytes() == b"global_step,score\n"
        log.flush()
        log.add([2, "a,b"])
        log.flush()
        log.flush()
        assert log.path.read_bytes() == b'global_step,score\n1,10\n2,"a,b"\n'

    @pytest.mark.parametrize("room", [None, 0, 1, 5, 9], ids=lambda room: f"{room} bytes left")
    def test_rows_wait_while_the_disk_is_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int | None
    ) -> None:
        """`room` bytes are still written; None: even that fails."""
        log, write = CsvLog(tmp_path / "a.csv", COLUMNS), os.write
        log.add([1, 10])
        log.flush()
        before = log.path.read_bytes()

        def full(descriptor: int, data: bytes) -> int:
            if room is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[:room])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for step in (2, 3):
                log.add([step, 1234567890])
                log.flush()
                assert log.path.read_bytes() == before, "a torn row is in the file"
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith(f"warning: {log.path} cannot be written (")
        log.add([4, 30])
        log.flush()
        assert log.path.read_bytes() == b"global_step,score\n1,10\n2,1234567890\n3,1234567890\n4,30\n"

    @pytest.mark.faults
    def test_a_second_full_disk_is_told_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        injected("disk full during CSV", 2)
        log = CsvLog(tmp_path / "a.csv", COLUMNS)
        for step in (1, 2):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", lambda descriptor, data: 0)
                log.add([step, 0])
                log.flush()
            log.flush()
        assert capsys.readouterr().err.count("warning: ") == 2
        assert [row["global_step"] for row in rows(log.path)] == [1, 2]

    @pytest.mark.faults
    def test_a_folder_that_went_away_costs_a_warning(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        injected("CSV file removed")
        log = CsvLog(tmp_path / "a.csv", COLUMNS)
        log.path.unlink()
        log.add([1, 10])
        log.flush()
        assert "cannot be written" in capsys.readouterr().err

    @pytest.mark.parametrize("torn", ["", "8", "8,", "5,1", "5,10", "\0\0\0\0", '5,"1'])
    @pytest.mark.faults
    def test_a_resume_drops_later_rows_and_torn_lines(self, tmp_path: Path, torn: str) -> None:
        injected("CSV row torn by a kill")
        path = tmp_path / "a.csv"
        path.write_text(f"global_step,score\n2,10\n3,20\n5,30\n6,40\n{torn}")
        log = CsvLog(path, COLUMNS, last_step=5)
        log.add([7, 50])
        log.flush()
        assert path.read_bytes() == b"global_step,score\n2,10\n3,20\n5,30\n7,50\n"

    def test_a_resume_without_the_file_starts_it(self, tmp_path: Path) -> None:
        CsvLog(tmp_path / "a.csv", COLUMNS, last_step=5)
        assert (tmp_path / "a.csv").read_bytes() == b"global_step,score\n"

    def test_a_new_run_starts_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("global_step,score\n1,10\n")
        CsvLog(tmp_path / "a.csv", COLUMNS)
        assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
        assert rows(tmp_path / "a.csv") == []


def make_tracker(
    tmp_path: Path, agent: Agent, log_seconds: float = 0.0, frames_per_step: int = 4, **kwargs: object
) -> Tracker:
    config = DQNRunConfig(log_seconds=log_seconds, agent=PRESETS["gravitar"].agent)
    return Tracker(tmp_path, config, agent, frames_per_step, **kwargs)  # type: ignore[arg-type]


class TestTracker:
    def test_columns_that_others_rely_on_come_first(self, tmp_path: Path) -> None:
        with make_tracker(tmp_path, Agent()):
            pass
        assert (
            (tmp_path / "metrics.csv")
            .read_text()
            .startswith(
                "wall_seconds,global_step,frames,num_updates,episodes,sps,return_mean,return_min,return_max,"
                "int_reward_mean,epsilon,td_loss,rnd_loss,q_mean,buffer_fill"
            )
        )
        assert (tmp_path / "episodes.csv").read_text() == "global_step,episodic_return,episodic_length\n"

    def test_a_row_tells_the_state_of_the_run(self, tmp_path: Path) -> None:
        agent = Agent()
        tracker = make_tracker(tmp_path, agent)
        agent.global_step, agent.num_updates, agent.episodes = 8, 3, 2
        tracker.step([game(0, 100.0, step=7, length=7), game(1, -21.5, step=8, length=8)])
        (row,) = rows(tmp_path / "metrics.csv")
        assert list(row) == [*METRICS, "entropy"]
        expected = {
            "global_step": 8,
            "frames": 32,
            "num_updates": 3,
            "episodes": 2,
            "return_mean": 39.25,
            "return_min": -21.5,
            "return_max": 100,
            "int_reward_mean": 0.5,
            "epsilon": 0.497,
            "td_loss": 0.25,
            "q_mean": 1e7,
            "buffer_fill": 1,
            "int_reward_max": 2,
            "entropy": 0.75,
        }
        assert {name: row[name] for name in expected} == expected
        assert math.isnan(row["rnd_loss"])
        assert row["sps"] > 0
        assert (tmp_path / "episodes.csv").read_text().splitlines()[1:] == ["7,100,7", "8,-21.5,8"]

    def test_frames_are_steps_where_there_is_no_emulator(self, tmp_path: Path) -> None:
        agent = Agent()
        tracker = make_tracker(tmp_path, agent, frames_per_step=1)
        agent.global_step = 8
        tracker.step([])
        assert rows(tmp_path / "metrics.csv")[-1]["frames"] == 8

    def test_a_cell_that_an_agent_has_nothing_for_is_empty(self, tmp_path: Path) -> None:
        agent = Agent()
        agent.metrics = lambda: {"td_loss": 0.25, "entropy": 0.75}  # type: ignore[method-assign]
        tracker = make_tracker(tmp_path, agent)
        agent.global_step = 8
        tracker.step([])
        with (tmp_path / "metrics.csv").open(newline="") as file:
            (row,) = csv.DictReader(file, strict=True)
        empty = "return_mean return_min return_max int_reward_mean epsilon rnd_loss q_mean buffer_fill int_reward_max"
        assert {name for name, cell in row.items() if cell == ""} == set(empty.split())
        assert (row["td_loss"], row["entropy"], row["global_step"]) == ("0.25", "0.75", "8")

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_is_written_and_ends_the_run(self, tmp_path: Path, bad: float) -> None:
        agent = Agent()
        agent.metrics = lambda: {"td_loss": bad, "entropy": 0.75}  # type: ignore[method-assign]
        with make_tracker(tmp_path, agent) as tracker:
            agent.global_step = 8
            with pytest.raises(NotFinite, match=f"^td_loss is {bad}$"):
                tracker.step([])
            tracker.finish()
        (row,) = rows(tmp_path / "metrics.csv")
        assert repr(row["td_loss"]) == repr(bad)

    @pytest.mark.faults
    def test_rows_that_cannot_be_written_to_the_end_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        injected("disk full during CSV")
        agent = Agent()
        told = pytest.raises(NotSaved, match=r"episodes.csv could not be written: its last 2 rows are lost$")
        with told, make_tracker(tmp_path, agent, log_seconds=100) as tracker:
            agent.global_step = 8
            tracker.step([game(0), game(1)])
            monkeypatch.setattr(os, "write", lambda descriptor, data: 0)

    @pytest.mark.faults
    def test_rows_that_are_lost_do_not_hide_what_ended_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        injected("disk full during CSV")
        tracker = make_tracker(tmp_path, Agent(), log_seconds=100)
        tracker.step([game(0), game(1)])
        monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
        tracker.__exit__(NotFinite)
        assert caplog.messages[-1].endswith("episodes.csv could not be written: its last 2 rows are lost")

    @pytest.mark.faults
    def test_there_is_no_checkpoint_while_rows_before_it_wait(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A kill after it would lose them for good; but a file that was removed cannot have them anyway."""
        injected("disk full during CSV")
        tracker = make_tracker(tmp_path, Agent(), log_seconds=100)
        tracker.step([game(0), game(1)])
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda descriptor, data: 0)
            with pytest.raises(OSError, match=r"checkpoint not written: .*episodes.csv has no room"):
                tracker.state_dict()
        (tmp_path / "episodes.csv").unlink()
        assert tracker.state_dict()["returns"]

    def test_the_last_row_is_judged_before_the_run_is_saved(self, tmp_path: Path) -> None:
        agent = Agent()
        agent.metrics = lambda: {"td_loss": math.nan}  # type: ignore[method-assign]
        with make_tracker(tmp_path, agent, log_seconds=100) as tracker:
            agent.global_step = 8
            with pytest.raises(NotFinite, match=r"^td_loss is nan$"):
                tracker.finish()
        assert len(rows(tmp_path / "metrics.csv")) == 1

    def test_a_row_after_another_error_is_written_and_not_judged(self, tmp_path: Path) -> None:
        agent = Agent()
        agent.metrics = lambda: {"td_loss": math.nan}  # type: ignore[method-assign]
        tracker = make_tracker(tmp_path, agent, log_seconds=100)
        agent.global_step = 8
        tracker.__exit__(RuntimeError)
        assert len(rows(tmp_path / "metrics.csv")) == 1

    def test_before_the_first_game_there_is_no_score(self, tmp_path: Path) -> None:
        agent = Agent()
        tracker = make_tracker(tmp_path, agent)
        agent.global_step = 1
        tracker.step([])
        (row,) = rows(tmp_path / "metrics.csv")
        assert all(math.isnan(row[name]) for name in ("return_mean", "return_min", "return_max"))

    def test_scores_are_those_of_the_last_100_games(self, tmp_path: Path) -> None:
        tracker = make_tracker(tmp_path, Agent())
        tracker.step([game(0, 1e6)])
        tracker.step([game(number, float(number)) for number in range(1, 101)])
        row = rows(tmp_path / "metrics.csv")[-1]
        assert (row["return_mean"], row["return_min"], row["return_max"]) == (50.5, 1, 100)

    def test_rows_wait_for_their_time_and_the_end_writes_the_last(self, tmp_path: Path) -> None:
        agent = Agent()
        with make_tracker(tmp_path, agent, log_seconds=1e6) as tracker:
            agent.global_step = 5
            tracker.step([game(0, 10.0, step=5)])
            assert rows(tmp_path / "metrics.csv") == []
        assert [row["global_step"] for row in rows(tmp_path / "metrics.csv")] == [5]
        assert [row["global_step"] for row in rows(tmp_path / "episodes.csv")] == [5]

    def test_a_checkpoint_finds_every_game_on_the_disk(self, tmp_path: Path) -> None:
        tracker = make_tracker(tmp_path, Agent(), log_seconds=1e6)
        tracker.step([game(0, 10.0, step=5)])
        tracker.state_dict()
        assert [row["global_step"] for row in rows(tmp_path / "episodes.csv")] == [5]

    def test_a_resume_goes_on_with_clock_and_scores(self, tmp_path: Path) -> None:
        agent = Agent()
        tracker = make_tracker(tmp_path, agent)
        agent.global_step = 5
        tracker.step([game(0, 10.0, step=5)])
        state = tracker.state_dict() | {"wall_seconds": 1000.0}
        agent.global_step = 9
        tracker.step([game(1, 99.0, step=9)])  # played after the checkpoint: it will be played again

        agent = Agent(global_step=5, episodes=1)
        tracker = make_tracker(tmp_path, agent, state=state)
        agent.global_step = 6
        tracker.step([game(1, 30.0, step=6)])
        assert [row["global_step"] for row in rows(tmp_path / "episodes.csv")] == [5, 6]
        kept, new = rows(tmp_path / "metrics.csv")
        assert (kept["global_step"], new["global_step"]) == (5, 6)
        assert new["wall_seconds"] >= 1000
        assert new["return_mean"] == 20


def test_console_that_nobody_reads_goes_silent_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(Agent())
    full = Path("/dev/full").open("w")  # noqa: SIM115  the console's, not ours to close before it
    monkeypatch.setattr("sys.stdout", full)
    for number in range(0, 20, 5):
        console.step([Episode(number, 100, 250.0, 10)])
    monkeypatch.undo()
    full.close()  # what waited in it is lost without a word
    assert capsys.readouterr().err.count("standard output cannot be written") == 1


def test_resume_keeps_columns_of_a_version_with_more(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("global_step,snapshots,mean\n3,1|2,7\n9,3|4,8\n")
    log = CsvLog(path, ["global_step", "mean"], last_step=5)
    log.add([6, 8.5])
    log.flush()
    assert path.read_text() == "global_step,mean,snapshots\n3,7,1|2\n6,8.5,\n"


def test_resume_keeps_rows_of_a_version_with_fewer_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("global_step,sps\n10,5\n20,6\n")
    CsvLog(path, ["global_step", "new", "sps"], last_step=10)
    assert path.read_text() == "global_step,new,sps\n10,,5\n"


def test_the_progress_line_at_a_terminal_shows_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    agent = Agent()
    with Tracker(tmp_path, DQNRunConfig(log_seconds=0.0, total_steps=1000), agent, 4) as tracker:
        agent.global_step, agent.episodes = 250, 2
        tracker.step([game(0, 100.0, 100, 100), game(1, 400.0, 250, 150)])
        tracker._bar.refresh()
    assert "25%" in terminal.getvalue()
    assert "games 2, mean score 250" in terminal.getvalue()

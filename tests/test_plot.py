"""Pictures of learning curves: which runs, in which groups, over which axis, and what is refused."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from run_helpers import CARTPOLE, refusal, train

from gravitar_dqn.cli import commands
from gravitar_dqn.config import to_dict
from gravitar_dqn.presets import get_preset
from gravitar_dqn.tools import plot

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn where the command runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def make_run(
    run_dir: Path, preset: str = "gravitar", *, seed: int = 1, slope: float = 1.0, games: int = 50, **settings: Any
) -> Path:
    """A run's files: game i ends at step 100 i and scores slope * i; the run plays 100 steps a second."""
    config = dataclasses.replace(get_preset(preset), seed=seed)
    for part in ("env", "agent"):
        changed = {name.partition("__")[2]: value for name, value in settings.items() if name.startswith(part)}
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changed)})
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"preset": preset, "config": to_dict(config)}))
    table(run_dir / "metrics.csv", "wall_seconds global_step frames", [(10, 1000, 4000), (50, 5000, 20000)])
    done = [(100 * i, slope * i, 100) for i in range(1, games + 1)]
    table(run_dir / "episodes.csv", "global_step episodic_return episodic_length", done)
    return run_dir


def table(path: Path, columns: str, rows: list[Any]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def draw(*words: object) -> int:
    return commands.run(commands.plot_command, [str(word) for word in words], "plot.py")


def labels(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_a_moving_mean_takes_what_there_is() -> None:
    values = np.array([4.0, 2.0, 0.0, 10.0, 2.0])
    assert plot.moving_mean(values, 3).tolist() == [4.0, 3.0, 2.0, 4.0, 4.0]
    assert plot.moving_mean(values, 1).tolist() == values.tolist()
    assert plot.moving_mean(values[:0], 3).tolist() == []


def test_games_are_placed_by_frames_minutes_or_steps(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", slope=2.0)
    steps = plot.read_curve(run_dir, "steps", 1)
    assert steps.x.tolist() == [100.0 * i for i in range(1, 51)]
    assert steps.scores.tolist() == [2.0 * i for i in range(1, 51)]
    np.testing.assert_allclose(plot.read_curve(run_dir, "frames", 1).x, 4 * steps.x)
    np.testing.assert_allclose(plot.read_curve(run_dir, "minutes", 1).x, steps.x / 100 / 60)


def test_half_a_row_is_not_read(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", games=3)
    for name in ("episodes.csv", "metrics.csv"):
        with (run_dir / name).open("a") as file:
            file.write("400,1")
    assert len(plot.read_curve(run_dir, "frames", 1).x) == 3


def test_seeds_of_the_same_settings_are_a_band(tmp_path: Path, figures: list[Figure]) -> None:
    for seed, slope in ((1, 1.0), (2, 3.0)):
        make_run(tmp_path / "sweep" / f"a{seed}", seed=seed, slope=slope, env__num_threads=seed)
    make_run(tmp_path / "sweep" / "b", agent__n_step=4, agent__double_q=False)
    (tmp_path / "sweep" / "notes").mkdir()
    for name, mean in (("a1", 40.0), ("a2", 80.0)):
        (tmp_path / "sweep" / name / "eval.json").write_text(json.dumps({"mean": mean, "frames_trained": 20_000}))
    assert draw("sweep", "--smooth", 1, "--x", "steps") == 0
    assert Path("curves.png").read_bytes().startswith(PNG)
    axes = figures[0].axes[0]
    assert labels(figures[0]) == ["gravitar (2 runs)", "agent.n-step=4 agent.double-q=False", "evaluation, mean"]
    line = axes.get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), np.asarray(line.get_xdata()) / 100 * 2)  # mean of slopes 1 and 3
    low, high = axes.collections[0].get_datalim(axes.transData).get_points()[:, 1]
    assert (low, high) == (1.0, 150.0)
    assert axes.get_title() == "ALE/Gravitar-v5"
    markers = [drawn for drawn in axes.get_lines() if drawn.get_marker() == "D" and len(drawn.get_xdata())]
    assert [(*marker.get_xdata(), *marker.get_ydata()) for marker in markers] == [(5000.0, 40.0), (5000.0, 80.0)]


def test_presets_are_told_apart_and_what_all_share_is_not_told(tmp_path: Path, figures: list[Figure]) -> None:
    for preset in ("gravitar", "ppo"):
        make_run(tmp_path / preset, preset, env__num_envs=4)
        make_run(tmp_path / f"{preset}-slow", preset, env__num_envs=4, agent__learning_rate=1e-5)
    assert draw(*sorted(tmp_path.iterdir()), "--title", "Both", "--out", "both.png") == 0
    slow = "agent.learning-rate=1e-05"
    assert labels(figures[0]) == ["gravitar", f"gravitar {slow}", "ppo", f"ppo {slow}"]
    assert figures[0].axes[0].get_title() == "Both"
    assert len({line.get_color() for line in figures[0].axes[0].get_lines()}) == 4
    assert Path("both.png").read_bytes().startswith(PNG)


def test_runs_of_different_games_are_not_drawn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for preset in ("gravitar", "cartpole"):
        make_run(tmp_path / preset, preset, env__num_envs=4)
    told = refusal(capsys, draw(tmp_path / "gravitar", tmp_path / "cartpole"))
    assert told == "scores of ALE/Gravitar-v5 and CartPole-v1 have nothing in common: name runs of one game"


def test_published_curves_are_drawn_as_far_as_ours_go(tmp_path: Path, figures: list[Figure]) -> None:
    make_run(tmp_path / "run")
    assert draw("run", "--published") == 0
    axes = figures[0].axes[0]
    names = {text.get_text(): text for text in axes.texts}
    near = {agent for agent, (frames, _) in plot.read_published().items() if frames[0] <= 10e6}
    assert set(names) == {"random play", "human", *near}
    assert "DreamerV3" in near and len(near) < len(plot.read_published())
    assert axes.get_xlim() == (0, 10e6) and axes.get_ylim()[1] > 3351
    heights = sorted(text.xy[1] for text in axes.texts)
    assert min(np.diff(heights)) >= 0.04 * axes.get_ylim()[1]
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == len(near)
    assert max(np.asarray(line.get_xdata()).max() for line in dashed) == 10e6
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert sorted(np.asarray(line.get_ydata())[0] for line in dotted) == [180, 3351]


def test_the_published_curves_are_there() -> None:
    curves = plot.read_published()
    frames, scores = curves["DreamerV3"]
    assert (frames[-1], scores[-1]) == (200e6, 12561)
    for frames, scores in curves.values():
        assert len(frames) == len(scores) > 1 and (np.diff(frames) > 0).all()


def test_runs_that_cannot_be_drawn_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "young", games=1)
    make_run(tmp_path / "runs" / "younger")
    (tmp_path / "runs" / "younger" / "episodes.csv").unlink()
    make_run(tmp_path / "runs" / "broken")
    (tmp_path / "runs" / "broken" / "config.json").write_text("{")
    assert draw("runs") == 0
    said = capsys.readouterr()
    assert said.out == "curves.png\n"
    broken, *others = sorted(said.err.splitlines())
    assert broken.startswith("warning: runs/broken/config.json cannot be read: ")
    assert others == [f"warning: runs/{name} has not finished two games yet: left out" for name in ("young", "younger")]


def test_runs_are_named_as_everywhere_else(tmp_path: Path, figures: list[Figure]) -> None:
    """By the name of a folder in runs/, or by their preset."""
    for name, preset in (("a", "gravitar"), ("b", "gravitar"), ("c", "ppo")):
        make_run(tmp_path / "runs" / name, preset)
    for words in (["gravitar"], ["a", "c"], ["runs", "a"]):
        assert draw(*words) == 0
    assert [labels(figure) for figure in figures] == [
        ["a", "b"],  # nothing else tells them apart, not even their seeds
        ["gravitar", "ppo"],
        ["gravitar (2 runs)", "ppo"],
    ]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run")
    make_run(tmp_path / "young" / "a", games=0)
    make_run(tmp_path / "young" / "b", games=0)
    make_run(tmp_path / "breakout", "breakout")
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "torn")
    (tmp_path / "torn" / "eval.json").write_text("{}")
    for words, expected in (
        ([], "no run: name one or more, plot runs/NAME"),
        (["nowhere"], "nowhere is no run: name a run's folder, one in runs, or a preset"),
        (["randal"], "there is no run of the preset randal in runs"),
        (["run", "empty"], "empty is not a run's folder, and there is none in it"),
        (["young/a"], "young/a has not finished two games yet"),
        (["young"], "young/a has not finished two games yet, and 1 more like it"),
        (["torn"], "torn/eval.json cannot be read: 'frames_trained'"),
        (["run", "--x", "hours"], "invalid choice 'hours'"),
        (["run", "--smooth", "0"], "--smooth is 0: it must be finite and between 1 and 1000000000.0"),
        (["run", "--out", "curves.xyz"], "--out is curves.xyz: Format 'xyz' is not supported"),
        (["run", "--out", "nowhere/curves.png"], "No such file or directory: 'nowhere/curves.png'"),
        (["run", "--published", "--x", "minutes"], "--published has scores by frames, not by minutes: --x frames"),
        (["breakout", "--published"], "--published has curves of Gravitar only, not of ALE/Breakout-v5"),
        (["run", "--publish"], "unknown option '--publish': did you mean --published?"),
    ):
        assert expected in refusal(capsys, draw(*words)), words
    assert not list(tmp_path.rglob("*.png")) and run_dir.exists()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal(capsys, draw("run")) == "there is no matplotlib: pip install -e '.[plot]' brings it"


def test_a_real_run_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*CARTPOLE, "--total-episodes", 5, "--run-dir", "run") == 0
    capsys.readouterr()
    assert draw("run", "--x", "minutes") == 0
    assert capsys.readouterr().out == "curves.png\n"
    assert Path("curves.png").read_bytes().startswith(PNG)


def test_seeds_alone_are_a_curve_each(tmp_path: Path, figures: list[Figure]) -> None:
    for seed in (1, 2):
        make_run(tmp_path / "runs" / f"run{seed}", seed=seed)
    assert draw("gravitar") == 0
    assert labels(figures[0]) == ["gravitar, seed 1", "gravitar, seed 2"]


def test_a_band_that_ends_early_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, games in (("long", 100), ("short", 40)):
        make_run(tmp_path / "runs" / name, games=games)
    make_run(tmp_path / "runs" / "other", agent__n_step=4)
    assert draw("runs") == 0
    assert "warning: gravitar is drawn as far as short goes: name the runs that went further alone" in (
        capsys.readouterr().err
    )

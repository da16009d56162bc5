"""The benchmark measures what it says: ratios, turns, and the same samples for each step for everyone."""

import itertools
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probes import spec_of_shape
from replay_helpers import check_valid

from gravitar_dqn.benchmark import scale, suite
from gravitar_dqn.benchmark.contenders import (
    BATCH,
    NOTEBOOK_STEPS,
    NOTEBOOK_UPDATES,
    STEPS,
    UPDATES,
    Ours,
    actor_critic_config,
    our_config,
)
from gravitar_dqn.benchmark.measure import Row, milliseconds, rows_of, spread, table
from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.benchmark.peers import DuelingHead, Notebook, StableBaselines, StablePPO
from gravitar_dqn.benchmark.worker import Contender, take_turns
from gravitar_dqn.cli import commands
from gravitar_dqn.errors import UserError
from gravitar_dqn.networks import make_q_network
from gravitar_dqn.presets import NO_TASKS
from gravitar_dqn.replay import ReplayBuffer


def test_spread_is_median_and_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([]) == {}


def test_ratios_are_taken_round_by_round_and_say_how_many_times_better() -> None:
    speeds = Row("s", "fast", "steps/s", [10.0, 30.0], [2.0, 3.0])
    assert speeds.ratios == [5.0, 10.0]
    times = Row("s", "fast", "ms", [2.0, 5.0], [4.0, 20.0])
    assert times.ratios == [2.0, 4.0]
    assert Row("s", "alone", "ms", [1.0]).ratios == []
    assert speeds.summary() == {
        "section": "s", "name": "fast", "unit": "steps/s", "median": 20.0, "low": 15.0, "high": 25.0,
        "ratio_median": 7.5, "ratio_low": 6.25, "ratio_high": 8.75,
    }  # fmt: skip


def test_functions_take_turns_with_the_threads_that_torch_has() -> None:
    order: list[str] = []

    def function(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            threads.add(torch.get_num_threads())
            time.sleep(seconds)

        return call

    threads: set[int] = set()
    values = milliseconds({"a": function("a", 0.001), "b": function("b", 0.002)}, rounds=2, calls=3)
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b"] * 3  # to warm up, and twice
    assert threads == {torch.get_num_threads()}
    assert {name: len(times) for name, times in values.items()} == {"a": 2, "b": 2}
    assert min(values["a"]) >= 1 and min(values["b"]) >= 2


def test_table_names_sections_units_and_ratios() -> None:
    rows = rows_of("replay", "ms", {"small": [1.0, 1.0], "large": [2.0, 4.0]}, "small")
    told = table(rows)
    assert "replay (ms)" in told
    small, large = told.splitlines()[-2:]
    assert small.split()[:2] == ["small", "1"] and "x" not in small
    assert "0.38x (0.31 - 0.44)" in large


def test_everyone_learns_1_4_samples_a_step() -> None:
    assert BATCH * UPDATES / STEPS == 1.4
    assert pytest.approx(1.4, rel=1e-3) == BATCH * NOTEBOOK_UPDATES / NOTEBOOK_STEPS
    ours = Ours(our_config("cpu", 16))
    before, steps = ours.agent.num_updates, 0
    for _ in range(3):
        steps += ours.play()
    learned = BATCH * (ours.agent.num_updates - before)
    assert learned / steps == pytest.approx(1.4, rel=0.05)


def test_the_notebooks_way_plays_and_learns() -> None:
    notebook = Notebook("cpu")
    weights = [parameter.clone() for parameter in notebook._q.parameters()]
    predictor = [parameter.clone() for parameter in notebook._predictor.parameters()]
    for _ in range(20):
        notebook._step()
    notebook._update()
    assert notebook._stored == 20 and len(notebook._bonuses) == 20
    assert (notebook._states[1:20] == notebook._next_states[:19]).all()
    assert any((old != new).any() for old, new in zip(weights, notebook._q.parameters(), strict=True))
    # its fault: the predictor never learns
    assert all((old == new).all() for old, new in zip(predictor, notebook._predictor.parameters(), strict=True))


def test_stable_baselines_learns_on_the_notebooks_network() -> None:
    pytest.importorskip("stable_baselines3")
    peer = StableBaselines("cpu")
    updates = peer._model._n_updates
    assert peer.play() == STEPS
    assert peer._model._n_updates - updates == UPDATES
    assert isinstance(peer._model.q_net.q_net, DuelingHead)


def test_stable_baselines_ppo_learns_from_rollouts_of_our_size() -> None:
    pytest.importorskip("stable_baselines3")
    config = actor_critic_config("cpu")
    config = replace(config, env=replace(config.env, num_envs=2), agent=replace(config.agent, num_steps=8))
    peer = StablePPO(config)
    assert peer.play() == 16
    assert (peer._model.batch_size, peer._model._n_updates) == (4, 4)


def test_our_actor_critics_take_turns_of_a_rollout() -> None:
    config = actor_critic_config("cpu")
    tasks = replace(config.tasks, replay_length=100, num_windows=2)
    agent = replace(config.agent, num_steps=8, update_epochs=1)
    ours = Ours(replace(config, env=replace(config.env, num_envs=2), agent=agent, tasks=tasks))
    before = ours.agent.num_updates
    assert ours.play() == 16 and ours.agent.num_updates == before + 4
    plain = actor_critic_config("cpu", curious=False, tasks=False)
    assert plain.rnd.coef == 0 and plain.tasks == NO_TASKS and plain.agent == config.agent


def test_contenders_have_the_networks_and_curiosity_that_their_rows_name() -> None:
    plain = our_config("cpu", 16, plain=True)
    assert (plain.agent.network, plain.agent.policy, plain.agent.tau, plain.agent.n_step) == (
        "notebook",
        "online",
        1,
        1,
    )
    assert plain.rnd.coef > 0 and not plain.agent.double_q
    ours = our_config("cpu", 16)
    assert ours.rnd.coef > 0 and replace(ours.agent, gradient_steps=1) != replace(plain.agent, gradient_steps=1)
    spec = spec_of_shape((4, 84, 84))
    sizes = [sum(p.numel() for p in make_q_network(spec, c.agent).parameters()) for c in (plain, ours)]
    assert sizes == [3_562_675, 1_694_899]


class Counts:
    """A contender that plays ten steps in a hundredth of a second."""

    def play(self) -> int:
        time.sleep(0.01)
        return 10


class Sleeps:
    """A contender that plays no step."""

    def play(self) -> int:
        time.sleep(0.01)
        return 0


class Breaks:
    """A contender that ends at its first turn."""

    warm = False

    def play(self) -> int:
        if self.warm:
            raise ValueError("out of games")
        self.warm = True
        return 0


def fails() -> Contender:
    raise ValueError("no such game")


def ends() -> Contender:
    os._exit(1)


def test_a_contender_of_several_processes_has_the_first_ones_turns() -> None:
    turns = take_turns({"run": [Counts, Sleeps]}, BenchConfig(rounds=2, seconds=0.05))
    assert [waited for _, waited in turns["run"]] == [0, 0]
    assert all(0 < speed <= 1_000 for speed, _ in turns["run"])


def test_it_says_what_it_measures_and_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In the log: standard output is for the table."""
    caplog.set_level(logging.INFO, "gravitar_dqn")
    settings = BenchConfig(device="cpu", num_envs=4, rounds=2, seconds=0.02, sizes=(1_000,))
    speeds = suite.speeds_of({"one": Counts, "other": Counts}, settings)
    assert [len(values) for values in speeds.values()] == [2, 2]
    assert caplog.messages == [
        "  starting 1 of 2: one",
        "  starting 2 of 2: other",
        "  round 1 of 2: 2 turns of 0.02 s or more",
        "  round 2 of 2: 2 turns of 0.02 s or more",
    ]
    caplog.clear()
    suite.replay_rows(settings, torch.device("cpu"))
    assert caplog.messages == [
        "  filling buffers of 1,000 frames",
        *(f"  {operation}, {kind}" for operation in ("sample", "put") for kind in ("uniform", "priorities")),
        "  new priorities, priorities",
    ]
    caplog.clear()
    monkeypatch.setattr(suite, "training_rows", lambda *_: [Row("training", "ours", "steps/s", [7.0])])
    for name in ("network_rows", "replay_rows"):
        monkeypatch.setattr(suite, name, lambda *_: [])
    capsys.readouterr()
    suite.run(replace(settings, quick=True))
    told = [message.partition(" (after")[0] for message in caplog.messages]
    assert told == [
        f"measuring {i} of 3: {part}" for i, part in enumerate(("whole training", "networks", "replay"), start=1)
    ]
    assert "measuring" not in capsys.readouterr().out


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(UserError, match="broken: ValueError: no such game"):
        take_turns({"fine": [Counts], "broken": [fails]}, BenchConfig())
    assert not multiprocessing.active_children()


def test_a_process_that_breaks_off_is_told_though_another_reports() -> None:
    with pytest.raises(UserError, match="run: ValueError: out of games"):
        take_turns({"run": [Counts, Breaks]}, BenchConfig(rounds=1, seconds=0.05))


def test_a_worker_that_ends_is_not_waited_for() -> None:
    with pytest.raises(UserError, match="gone ended unexpectedly"):
        take_turns({"gone": [ends]}, BenchConfig())


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_work_that_grows_with_the_ranks_is_the_same_for_each(ranks: int) -> None:
    one = our_config("cpu", 16)
    share = scale.grown(one, ranks).share(0, ranks)
    assert share.env.num_envs == one.env.num_envs
    assert share.agent.batch_size == one.agent.batch_size
    assert share.agent.buffer_size == one.agent.buffer_size
    steps = one.env.num_envs * ranks  # in one step of all ranks' games
    assert share.agent.train_frequency / steps == one.agent.train_frequency / one.env.num_envs


@pytest.mark.parametrize(("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (64, [1, 2, 4, 8])])
def test_ranks_are_doubled_as_far_as_there_are_cores(
    cores: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "available_cores", lambda: list(range(cores)))
    assert scale.counts("cpu") == expected


@pytest.mark.slow
def test_ranks_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "available_cores", lambda: [0, 1])
    rows = scale.scale_rows(BenchConfig(device="cpu", num_envs=4, rounds=2, seconds=0.1))
    one, grown, shared, *waited = rows
    assert [len(row.values) for row in rows] == [2] * 5
    assert "8 games, batch 256" in grown.name and "4 games in all, batch 128" in shared.name
    assert min(one.values + grown.values + shared.values) > 0
    assert all(0 < value < 100 for row in waited for value in row.values)


def test_noise_fills_a_buffer_with_whole_games() -> None:
    buffer = ReplayBuffer(500, 8, (84, 84), n_step=3)
    suite.fill(buffer, 700, buffer.put, buffer.begin)
    assert buffer.full and (buffer.sampling_weights > 0).sum() > 300
    check_valid(buffer)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "--rounds is 0: it must be finite and at least 1"),
        (["--num-envs", "0"], "--num-envs is 0"),
        (["--seconds", "-1"], "--seconds is -1.0: it must be finite and between 0.01 and 3600"),
        (["--sizes", "10"], "--sizes is 10: every size must be at least 1000"),
        (["--json", "nowhere/at/all.json"], "nowhere/at/all.json cannot be written"),
        (["--json", "."], "cannot be written: it is a folder"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--what"], "unknown option '--what'"),
    ],
)
def test_bad_arguments_get_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(commands.bench_command, words, "benchmark.py") == 2
    error = capsys.readouterr().err.strip()
    assert told in error and len(error.splitlines()) == 1


def test_without_stable_baselines_its_row_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also: what the sections make of the speeds."""
    speeds = {"the notebook's way": 2.0, "our parts: the emulator": 60.0, "our parts: the networks": 30.0}
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        suite, "speeds_of", lambda makers, settings: {name: [speeds.get(name, 10.0)] for name in makers}
    )
    rows = suite.training_rows(BenchConfig(device="cpu"))
    assert "Stable-Baselines3 is not installed and left out; .venv/bin/pip install" in caplog.text
    assert not any("Stable" in row.name + row.section for row in rows)
    by_name = {(row.section, row.name): row for row in rows}
    assert by_name["training", "ours, the notebook's targets"].ratios == [5.0]
    assert by_name["training", "our parts, one after the other"].values == [pytest.approx(20.0)]
    share = by_name["training, as a share of its parts", "ours, the notebook's targets"]
    assert share.ratios == [pytest.approx(0.5)]


def test_actor_critics_are_measured_against_plain_ppo_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"ours, PPO without curiosity": 40.0, "ours, PPO with curiosity": 20.0, "ours, randal": 10.0}
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(suite, "speeds_of", lambda makers, settings: {name: [speeds[name]] for name in makers})
    rows = suite.actor_critic_rows(BenchConfig(device="cpu"))
    assert {row.name: row.ratios for row in rows} == {
        "ours, PPO without curiosity": [],
        "ours, PPO with curiosity": [0.5],
        "ours, randal": [0.25],
    }


def test_the_networks_and_the_replay_buffer_are_measured() -> None:
    settings = BenchConfig(device="cpu", num_envs=4, rounds=1, sizes=(1_000,))
    device = torch.device("cpu")
    networks = suite.network_rows(settings, device)
    assert [row.name for row in networks] == ["fp32, eager", "as it runs"] * 4
    replay = suite.replay_rows(settings, device)
    assert len(replay) == 5 and all(row.values[0] > 0 for row in networks + replay)


def test_settings_that_cannot_be_are_refused_before_anything_starts() -> None:
    assert our_config("cpu", 8_192).agent.buffer_size > 3 * 8_192


def test_curiosity_is_measured_though_the_preset_has_none() -> None:
    assert our_config("cpu", 16).rnd.coef > 0
    assert our_config("cpu", 16, curious=False).rnd.coef == 0


def test_the_record_and_the_table_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = rows_of("update", "ms", {"fp32": [4.0], "fast": [2.0]}, "fp32")
    monkeypatch.setattr(suite, "network_rows", lambda *_: networks)
    monkeypatch.setattr(suite, "training_rows", lambda *_: [Row("training", "ours", "steps/s", [7.0])])
    monkeypatch.setattr(suite, "replay_rows", lambda *_: [])
    record = suite.run(BenchConfig(device="cpu", peers=False, quick=True, json=tmp_path / "bench.json"))
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"] == json.loads(json.dumps(record["rows"]))
    assert [row["median"] for row in written["rows"]] == [7.0, 4.0, 2.0]
    assert {"machine", "cores", "commit", "versions", "settings", "samples_per_step"} <= set(written)
    assert "2.00x" in capsys.readouterr().out


@pytest.mark.slow
def test_the_parts_and_whole_training_are_measured() -> None:
    settings = BenchConfig(device="cpu", num_envs=16, rounds=1, seconds=0.5, peers=False, sizes=(1_000,))
    sections = {row["section"] for row in suite.run(settings)["rows"]}
    assert {"training", "acting", "replay"} <= sections
    assert {"update of the Q network", "update of the predictor", "curiosity of a step"} <= sections

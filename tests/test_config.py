"""Settings: presets, their JSON form, and what is refused."""

import ast
import dataclasses
import json
import math
import typing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gravitar_dqn import config as module
from gravitar_dqn.config import (
    FREE_FIELDS,
    DQNRunConfig,
    EnvSettings,
    PPORNDSettings,
    PPORunConfig,
    PPOSettings,
    TaskSettings,
    differences,
    flatten,
    to_dict,
    validate,
)
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import PRESETS, PUBLISHED_PPO, from_dict, get_preset
from gravitar_dqn.run.folder import load_run

PARTS = {"": DQNRunConfig, "env.": module.EnvSettings, "agent.": module.DQNSettings, "rnd.": module.RNDSettings}
NUMBERS = [
    (prefix + field.name, field.metadata)
    for prefix, part in PARTS.items()
    for field in dataclasses.fields(part)
    if typing.get_type_hints(part)[field.name] in (int, float)
]


def changed(config: DQNRunConfig, name: str, value: object) -> DQNRunConfig:
    """`config` with the setting of this dotted name replaced."""
    part, _, rest = name.rpartition(".")
    if not part:
        return dataclasses.replace(config, **{rest: value})
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{rest: value})})


def as_json(config: DQNRunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(to_dict(config)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    preset = get_preset(name)
    validate(preset)
    assert preset.preset == name
    assert from_dict(as_json(preset)) == preset


def test_the_presets_are_those_of_the_issue() -> None:
    dqn = {"notebook", "gravitar", "breakout", "gravitar-ram", "cartpole"}
    assert set(PRESETS) == dqn | {"ppo", "ppo-rnd", "randal", "randal-cartpole"}
    assert {name for name, preset in PRESETS.items() if isinstance(preset, DQNRunConfig)} == dqn
    assert PRESETS["gravitar"] == DQNRunConfig()


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'gravtar': did you mean gravitar\? there are gravitar, "):
        get_preset("gravtar")
    with pytest.raises(UserError, match="unknown preset 'qqq': there are gravitar, "):
        get_preset("qqq")


def test_the_notebook_preset_has_the_notebooks_numbers() -> None:
    settings = flatten(to_dict(PRESETS["notebook"]))
    expected = {
        # Environment
        "env.id": "Gravitar-v0",
        "env.obs_type": "image",
        "env.num_envs": 1,
        "env.sticky_actions": 0.25,
        "env.noop_max": 30,
        "env.max_frames": 108_000,
        "agent.stack_padding": "repeat",
        "agent.reward_scale": 1 / 500,
        "seed": 742,
        # Replay
        "agent.buffer_size": 50_000,
        "agent.batch_size": 128,
        "agent.learning_starts": 2_000,
        "agent.priority_exponent": 0,
        # Learning
        "agent.learning_rate": 1e-4,
        "rnd.learning_rate": 1e-4,
        "agent.adam_epsilon": 1e-8,  # Adam's own
        "agent.max_grad_norm": 0,
        "agent.gamma": 0.99,
        "agent.n_step": 1,
        "agent.double_q": False,
        "agent.time_limit_is_terminal": True,
        "agent.clock": "episodes",
        "agent.train_frequency": 1,
        "agent.gradient_steps": 10,
        "agent.target_network_frequency": 100,
        "agent.epsilon_start": 0.5,
        "agent.epsilon_end": 0.02,
        "agent.epsilon_ladder": 0,
        # Curiosity
        "rnd.coef": 1 / 500,
        "rnd.variant": "notebook",
        "rnd.update_frequency": 1,
        # What a run shows
        "video_every": 25,
    }
    assert {name: settings[name] for name in expected} == expected
    agent = PRESETS["notebook"].agent
    assert (agent.epsilon_start - agent.epsilon_end) / agent.epsilon_decay == pytest.approx(1 / 2000)


@pytest.mark.parametrize("name", ["gravitar", "breakout", "gravitar-ram", "cartpole"])
def test_only_the_notebook_has_the_notebooks_faults(name: str) -> None:
    preset = PRESETS[name]
    assert preset.rnd.variant == "rnd"
    assert not preset.agent.time_limit_is_terminal
    assert preset.agent.clock == "steps"


def test_every_number_has_bounds() -> None:
    assert [name for name, metadata in NUMBERS if "low" not in metadata] == []


@pytest.mark.parametrize(("name", "metadata"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_numbers_out_of_bounds_are_refused_by_name(name: str, metadata: Any) -> None:
    outside = [math.nan, math.inf, -math.inf]
    outside += [metadata[side] + step for side, step in (("low", -1), ("high", 1)) if math.isfinite(metadata[side])]
    for value in outside:
        with pytest.raises(UserError, match=rf"^{name} is {value}: it must be finite and (at least|between)"):
            validate(changed(DQNRunConfig(), name, value))


def test_bounds_themselves_are_allowed() -> None:
    for name, metadata in NUMBERS:
        for side in ("low", "high"):
            if math.isfinite(metadata[side]) and name not in ("agent.buffer_size", "agent.learning_starts"):
                validate(changed(DQNRunConfig(), name, metadata[side]))


def test_a_buffer_that_could_never_start_learning_is_refused() -> None:
    config = changed(DQNRunConfig(), "agent.buffer_size", 20_000)
    with pytest.raises(UserError, match="buffer_size is 20000: learning would never begin, it must be above 20000"):
        validate(config)
    validate(changed(config, "agent.learning_starts", 19_999))
    with pytest.raises(UserError, match="must be above 640"):  # five steps of 128 environments
        validate(changed(changed(config, "agent.learning_starts", 0), "agent.buffer_size", 640))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", "742", "seed is '742': it must be int"),
        ("seed", 7.0, "seed is 7.0: it must be int"),
        ("seed", True, "seed is True: it must be int"),
        ("log_seconds", "2", "log_seconds is '2': it must be a number"),
        ("log_seconds", False, "log_seconds is False: it must be a number"),
        ("device", None, "device is None: it must be str"),
        ("precision", "fp16", "precision is 'fp16': it must be auto or fp32 or bf16"),
        ("precision", [], "precision is []: it must be auto or fp32 or bf16"),
        ("env", 3, "setting env is not a table of settings"),
        ("env.id", 3, "env.id is 3: it must be str"),
        ("agent.double_q", 1, "agent.double_q is 1: it must be bool"),
        ("rnd.variant", "ngu", "rnd.variant is 'ngu': it must be rnd or notebook"),
        ("rnd.colour", 1, "unknown setting rnd.colour: was it written by another version?"),
        ("colour", 1, "unknown setting colour: was it written by another version?"),
    ],
)
def test_json_with_a_wrong_setting_is_refused_by_name(name: str, value: object, expected: str) -> None:
    values = as_json(DQNRunConfig())
    part, _, rest = name.rpartition(".")
    (values[part] if part else values)[rest] = value
    with pytest.raises(UserError) as refused:
        from_dict(values)
    assert str(refused.value) == expected


@pytest.mark.parametrize("name", sorted(set(flatten(to_dict(PRESETS["cartpole"]))) - {"preset"}))
def test_json_from_before_a_setting_was_there_takes_the_presets(name: str) -> None:
    values = as_json(replace(PRESETS["cartpole"], seed=5))
    part, _, rest = name.rpartition(".")
    del (values[part] if part else values)[rest]
    seed = PRESETS["cartpole"].seed if name == "seed" else 5
    assert from_dict(values) == replace(PRESETS["cartpole"], seed=seed)


def test_whole_numbers_may_stand_for_fractions() -> None:
    values = as_json(DQNRunConfig())
    values["log_seconds"] = 2
    assert isinstance(from_dict(values).log_seconds, float)


def test_differences_are_told_except_of_free_settings() -> None:
    old = PRESETS["gravitar"]
    for name, value in flatten(to_dict(old)).items():
        other = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else value + 1
        told = differences(old, changed(old, name, other))
        assert told == ({} if name in FREE_FIELDS else {name: (value, other)})
    assert differences(old, old) == {}


def test_free_settings_are_those_that_say_so() -> None:
    classes = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    groups = {"RunConfig": "", "EnvSettings": "env."}
    documented = {
        f"{groups[owner.name]}{setting.target.id}"
        for owner in classes
        for setting, text in pairwise(owner.body)
        if isinstance(setting, ast.AnnAssign)
        and isinstance(setting.target, ast.Name)
        and isinstance(text, ast.Expr)
        and "(free)" in ast.unparse(text)
    }
    assert documented == FREE_FIELDS


def test_a_runs_configuration_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"preset": "cartpole", "config": to_dict(PRESETS["cartpole"])}))
    assert load_run(tmp_path) == PRESETS["cartpole"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "is not a run's folder: it has no config.json"),
        ("", "config.json cannot be read"),
        ('{"config": {', "config.json cannot be read"),
        ("[]", "config.json holds no table"),
        ('{"preset": "gravitar"}', "config.json is not a run's configuration"),
        ('{"config": 3}', "setting config is not a table of settings"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=expected):
        load_run(tmp_path)


# ---------------------------------------------------------------- RANDAL


def test_ppo_and_ppo_rnd_differ_in_curiosity_alone() -> None:
    assert list(differences(PRESETS["ppo"], PRESETS["ppo-rnd"])) == ["preset", "rnd.coef"]
    ppo = PRESETS["ppo"]
    assert isinstance(ppo, PPORunConfig) and ppo.rnd.coef == 0
    agent = ppo.agent
    assert (ppo.env.num_envs, agent.num_steps, agent.update_epochs, agent.num_minibatches) == (64, 128, 3, 8)
    assert (agent.gamma, agent.clip_coef, agent.ent_coef, agent.learning_rate) == (0.997, 0.2, 0.01, 3e-4)
    assert agent.normalize_advantages and not agent.clip_rewards and agent.reward_scale == 1 / 250


def test_randal_is_ppo_rnd_with_tasks_and_the_published_end_of_a_game() -> None:
    randal, ppo = PRESETS["randal"], PRESETS["ppo-rnd"]
    assert isinstance(randal, PPORunConfig) and isinstance(ppo, PPORunConfig)
    tasks = randal.tasks
    assert min(tasks.pixel_control, tasks.reward_prediction, tasks.value_replay) > 0
    assert randal.env.max_frames == 4 * 4_500
    same = replace(randal, preset="ppo-rnd", env=ppo.env, tasks=ppo.tasks)
    assert same == ppo and replace(randal.env, max_frames=ppo.env.max_frames) == ppo.env


def test_the_published_settings() -> None:
    agent = PUBLISHED_PPO
    assert (agent.num_steps, agent.update_epochs, agent.num_minibatches) == (128, 4, 4)
    assert (agent.optimizer, agent.learning_rate, agent.learning_rate_end) == ("adam", 1e-4, 1e-4)
    assert (agent.gamma, agent.gae_lambda, agent.clip_coef, agent.ent_coef) == (0.999, 0.95, 0.1, 0.001)
    assert (agent.ext_coef, PPORNDSettings().gamma, agent.max_grad_norm) == (2.0, 0.99, 0.5)
    assert agent.clip_rewards and EnvSettings().sticky_actions == 0.25 and TaskSettings().replay_length == 2000


def test_a_rollout_must_fall_into_minibatches() -> None:
    config = replace(PRESETS["randal"], agent=PPOSettings(num_steps=5, num_minibatches=3))
    with pytest.raises(UserError, match=r"agent.num_minibatches is 3: it must divide the 320 steps"):
        validate(config)
    with pytest.raises(UserError, match=r"tasks.window is 0"):
        validate(replace(PRESETS["randal"], tasks=TaskSettings(window=0)))

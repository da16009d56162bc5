"""Games: ALE's vector environment against Gymnasium's own wrappers, and what every kind of game offers the agent."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from run_helpers import ROOT

from gravitar_dqn.config import EnvSettings
from gravitar_dqn.envs import make_envs, spec_of
from gravitar_dqn.envs.single import make_recorded_env, make_single
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import PRESETS

PLAIN = EnvSettings(num_envs=1, sticky_actions=0.0, noop_max=0)  # nothing left to chance


@dataclass
class Played:
    """What a vector environment gave for a sequence of random actions, time first."""

    obs: npt.NDArray[Any]  # one more than steps, without the axis of ALE's own stack
    rewards: npt.NDArray[Any]
    terminations: npt.NDArray[np.bool_]
    truncations: npt.NDArray[np.bool_]

    @property
    def ends(self) -> list[int]:
        """Steps of the first environment that ended a game."""
        return np.flatnonzero(self.terminations[:, 0] | self.truncations[:, 0]).tolist()


def play(env: Any, steps: int, *, seed: int = 0, action_seed: int = 9) -> Played:
    """Random actions for `steps` steps; closes the environment."""
    rng, shape = np.random.default_rng(action_seed), (env.num_envs, *spec_of(env).frame_shape)
    obs, _ = env.reset(seed=seed)
    frames, told = [obs.reshape(shape).copy()], []
    for _ in range(steps):
        obs, *rest, _ = env.step(rng.integers(0, spec_of(env).num_actions, env.num_envs))
        frames.append(obs.reshape(shape).copy())
        told.append([np.copy(values) for values in rest])
    env.close()
    return Played(np.stack(frames), *(np.stack(column) for column in zip(*told, strict=True)))


def wrapped(config: EnvSettings) -> Any:
    """The game through Gymnasium's own wrappers, one environment after the other."""
    make = [lambda: make_single(config)] * config.num_envs
    return SyncVectorEnv(make, autoreset_mode=AutoresetMode.NEXT_STEP)


@pytest.mark.parametrize(("game", "action_seed", "steps"), [("Gravitar", 9, 560), ("Breakout", 5, 400)])
def test_ales_vector_environment_and_gymnasiums_wrappers_agree(game: str, action_seed: int, steps: int) -> None:
    """Over a whole game, its end, the reset after it and the start of the next; seeds play no part here."""
    config = replace(PLAIN, id=f"ALE/{game}-v5")
    ours = play(make_envs(config), steps, seed=1, action_seed=action_seed)
    theirs = play(wrapped(config), steps, seed=2, action_seed=action_seed)
    assert ours.ends and ours.ends[0] < steps - 1, "no whole game was played"
    assert ours.rewards.any(), "no reward was earned"
    np.testing.assert_array_equal(ours.rewards, theirs.rewards)
    np.testing.assert_array_equal(ours.terminations, theirs.terminations)
    np.testing.assert_array_equal(ours.truncations, theirs.truncations)
    np.testing.assert_array_equal(ours.obs, theirs.obs)


def test_recordings_see_what_the_agent_sees_and_show_every_emulator_frame_in_colour() -> None:
    pictures: list[npt.NDArray[np.uint8]] = []
    env, fps = make_recorded_env(PLAIN, lambda picture: pictures.append(picture.copy()))
    seen = play(env, 100)
    assert fps == 60
    assert len(pictures) == 1 + 4 * 100
    assert {(picture.shape, picture.dtype) for picture in pictures} == {((210, 160, 3), np.dtype(np.uint8))}
    assert any((picture[..., 0] != picture[..., 2]).any() for picture in pictures), "the pictures are grey"
    assert len({picture.tobytes() for picture in pictures}) > 200, "frames are shown twice"
    np.testing.assert_array_equal(seen.obs, play(make_envs(PLAIN), 100).obs)


def test_recordings_of_other_games_run_at_real_speed() -> None:
    # An emulator frame lasts 1/60 s. RAM shows one in 4, the old ids one in 3 on average.
    kinds = {"CartPole-v1": ("image", 50), "ALE/Gravitar-v5": ("ram", 15), "Gravitar-v0": ("image", 20)}
    for game, (obs_type, expected) in kinds.items():
        pictures: list[npt.NDArray[np.uint8]] = []
        env, fps = make_recorded_env(
            EnvSettings(id=game, obs_type=obs_type, noop_max=0),  # type: ignore[arg-type]
            lambda picture, pictures=pictures: pictures.append(picture),  # type: ignore[misc]
        )
        play(env, 5)
        assert fps == expected
        assert len(pictures) == 1 + 5
        assert pictures[0].ndim == 3 and pictures[0].shape[2] == 3


def test_rewards_are_the_games_own() -> None:
    """ALE's vector environment clips to 1 unless told otherwise."""
    rewards = play(make_envs(PLAIN), 520).rewards
    assert set(rewards.ravel().tolist()) == {0, 100}
    assert rewards.sum() == 300


def test_fire_is_not_pressed_at_the_start() -> None:
    """In Breakout nothing moves before FIRE: with no-ops alone, the picture stands still."""
    env = make_envs(replace(PLAIN, id="ALE/Breakout-v5"))
    first, _ = env.reset(seed=0)
    later = [env.step(np.zeros(1, dtype=np.int64))[0].copy() for _ in range(30)]
    env.close()
    assert all((frame == first).all() for frame in later)


@pytest.mark.parametrize(
    "config",
    [
        EnvSettings(num_envs=3, max_frames=80, noop_max=0),
        EnvSettings(id="Gravitar-v0", num_envs=3, max_frames=60, noop_max=0),
        EnvSettings(num_envs=3, max_frames=80, noop_max=0, obs_type="ram"),
        EnvSettings(id="CartPole-v1", num_envs=3),
    ],
    ids=lambda config: f"{config.id} {config.obs_type}",
)
def test_the_step_after_a_games_end_resets_and_earns_nothing(config: EnvSettings) -> None:
    played = play(make_envs(config), 120)
    done = played.terminations | played.truncations
    assert (done.sum(axis=0) >= 2).all(), "every environment should end games"
    after = done[:-1]
    assert (played.rewards[1:][after] == 0).all()
    assert not done[1:][after].any()
    frames = {frame.tobytes() for frame in played.obs[2:][after]}
    if config.id != "CartPole-v1":
        assert frames == {played.obs[0, 0].tobytes()}, "the reset frame is not the start of a game"


@pytest.mark.parametrize("obs_type", ["image", "ram"])
def test_the_frame_limit_counts_emulator_frames_and_truncates(obs_type: str) -> None:
    config = replace(PLAIN, max_frames=80, obs_type=obs_type)  # type: ignore[arg-type]
    played = play(make_envs(config), 30)
    assert played.ends == [80 // 4 - 1]
    assert played.truncations[19, 0] and not played.terminations[19, 0]


@pytest.mark.parametrize(
    "config",
    [
        EnvSettings(num_envs=2),
        EnvSettings(id="Gravitar-v0", num_envs=2),
        EnvSettings(num_envs=2, obs_type="ram"),
        EnvSettings(id="CartPole-v1", num_envs=2),
    ],
    ids=lambda config: f"{config.id} {config.obs_type}",
)
def test_seeds_reproduce_games_and_tell_them_apart(config: EnvSettings) -> None:
    first, again, other = (play(make_envs(config), 80, seed=seed) for seed in (1, 1, 9))
    np.testing.assert_array_equal(first.obs, again.obs)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    assert (first.obs != other.obs).any()
    assert (first.obs[:, 0] != first.obs[:, 1]).any(), "the environments play the same game"


def test_threads_do_not_change_what_is_played() -> None:
    one, three = (play(make_envs(EnvSettings(num_envs=3, num_threads=threads)), 60) for threads in (1, 3))
    np.testing.assert_array_equal(one.obs, three.obs)


def test_sticky_actions_reach_the_emulator() -> None:
    """With probability 1 the first action is repeated for ever, so that later ones make no difference."""
    for config in (PLAIN, replace(PLAIN, obs_type="ram")):
        stuck = [play(make_envs(replace(config, sticky_actions=1.0)), 60, action_seed=seed) for seed in (1, 2)]
        free = [play(make_envs(config), 60, action_seed=seed) for seed in (1, 2)]
        np.testing.assert_array_equal(stuck[0].obs, stuck[1].obs)
        assert (free[0].obs != free[1].obs).any()


@pytest.mark.parametrize(
    ("config", "frame", "actions"),
    [
        (PRESETS["gravitar"].env, ((84, 84), torch.uint8), 18),
        (PRESETS["notebook"].env, ((84, 84), torch.uint8), 18),
        (PRESETS["breakout"].env, ((84, 84), torch.uint8), 4),
        (PRESETS["gravitar-ram"].env, ((128,), torch.uint8), 18),
        (PRESETS["cartpole"].env, ((4,), torch.float32), 2),
        (EnvSettings(id="ALE/MontezumaRevenge-v5"), ((84, 84), torch.uint8), 18),
        (EnvSettings(id="Pong-v4"), ((84, 84), torch.uint8), 6),
        (EnvSettings(id="Acrobot-v1"), ((6,), torch.float32), 3),
    ],
    ids=lambda value: value.id if isinstance(value, EnvSettings) else "",
)
def test_presets_and_any_other_game_by_its_id(config: EnvSettings, frame: object, actions: int) -> None:
    env = make_envs(replace(config, num_envs=2))
    spec = spec_of(env)
    assert ((spec.frame_shape, spec.frame_dtype), spec.num_actions) == (frame, actions)
    played = play(env, 3)
    assert played.obs.shape == (4, 2, *spec_of(env).frame_shape)
    assert torch.from_numpy(played.obs).dtype == spec_of(env).frame_dtype


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        ("ALE/Gravitr-v5", r"^unknown game 'ALE/Gravitr-v5': .* Did you mean: `Gravitar`\?"),
        ("CartPol-v1", r"^unknown game 'CartPol-v1': .* Did you mean: `CartPole`\?"),
        ("", "^unknown game ''"),
        ("Pendulum-v1", "^Pendulum-v1 has .* actions Box.*up to 256 discrete actions, is needed$"),
        ("FrozenLake-v1", "^FrozenLake-v1 has observations Discrete"),
        ("Blackjack-v1", "^Blackjack-v1 has observations Tuple"),
        ("Humanoid-v2", "^cannot make Humanoid-v2: "),
    ],
)
def test_games_the_agent_cannot_play_are_refused_by_name(game: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_envs(EnvSettings(id=game, num_envs=2))


@pytest.mark.parametrize(
    ("config", "fps"),
    [
        (EnvSettings(id="ALE/Gravitar-v5"), 60),
        (EnvSettings(id="ALE/Gravitar-v5", obs_type="ram"), 15),
        (EnvSettings(id="GravitarNoFrameskip-v4"), 60),
        (EnvSettings(id="Gravitar-v0"), 20),  # skips 2, 3 or 4 frames
    ],
)
def test_films_play_at_real_speed(config: EnvSettings, fps: float) -> None:
    env, speed = make_recorded_env(config, lambda picture: None)
    env.close()
    assert speed == fps


RAM = replace(PLAIN, obs_type="ram")


def test_ram_on_threads_and_gymnasiums_own_agree() -> None:
    """Over a whole game, its end, the reset after it and the start of the next; nothing is left to chance."""
    ours = play(make_envs(replace(RAM, num_envs=2, num_threads=2)), 900, seed=1)
    theirs = play(wrapped(replace(RAM, num_envs=2)), 900, seed=2)
    assert ours.ends and ours.ends[0] < 890 and ours.rewards.any()
    np.testing.assert_array_equal(ours.rewards, theirs.rewards)
    np.testing.assert_array_equal(ours.terminations, theirs.terminations)
    np.testing.assert_array_equal(ours.obs, theirs.obs)


def test_ram_is_the_same_for_any_number_of_threads_and_other_for_another_seed() -> None:
    config = EnvSettings(obs_type="ram", num_envs=5, num_threads=1)  # sticky actions and no-ops
    alone, threads = (play(make_envs(replace(config, num_threads=n)), 200, seed=3) for n in (1, 3))
    np.testing.assert_array_equal(alone.obs, threads.obs)
    np.testing.assert_array_equal(alone.rewards, threads.rewards)
    other = play(make_envs(config), 200, seed=4)
    assert (alone.obs != other.obs).any()
    assert len({frame.tobytes() for frame in alone.obs[-1]}) == 5, "environments play the same game"


def test_a_ram_game_that_is_cut_off_is_truncated_and_begins_anew() -> None:
    env = make_envs(replace(RAM, num_envs=2, max_frames=40))
    played = play(env, 23)
    assert played.truncations[:, 0].tolist() == [t in (9, 20) for t in range(23)]  # a dummy step follows each end
    assert not played.terminations.any()
    np.testing.assert_array_equal(played.obs[11], played.obs[0])  # without chance every game begins alike


def test_some_ram_games_can_begin_anew_while_others_go_on() -> None:
    env = make_envs(replace(RAM, num_envs=2))
    first, _ = env.reset(seed=0)
    for _ in range(20):
        last, *_ = env.step(np.array([2, 2]))
    obs, _ = env.reset(options={"reset_mask": np.array([True, False])})
    np.testing.assert_array_equal(obs[0], first[0])
    np.testing.assert_array_equal(obs[1], last[1])
    env.close()


def test_what_ram_envs_returned_is_not_overwritten_by_the_next_step() -> None:
    env = make_envs(replace(RAM, num_envs=2))
    env.reset(seed=0)
    obs, rewards, *_ = env.step(np.array([2, 3]))
    kept = obs.copy(), rewards.copy()
    env.send(np.array([4, 5]))
    env.recv()
    np.testing.assert_array_equal(obs, kept[0])
    np.testing.assert_array_equal(rewards, kept[1])
    env.close()


def test_seeds_of_ram_games_have_nothing_in_common_and_none_is_needed() -> None:
    config = replace(RAM, num_envs=4, sticky_actions=0.5)
    first, second = (play(make_envs(config), 60, seed=seed, action_seed=1) for seed in (1, 2))
    streams = {stream.tobytes() for told in (first, second) for stream in told.obs.swapaxes(0, 1)}
    assert len(streams) == 8
    env = make_envs(config)
    obs, _ = env.reset()
    assert obs.shape == (4, 128)
    env.reset(options={})
    with pytest.raises(TypeError, match="one seed is needed"):
        env.reset(seed=[1, 2, 3, 4])
    env.close()


def test_no_ops_of_ram_games_are_counted_in_emulator_frames() -> None:
    env = make_envs(replace(RAM, num_envs=40, noop_max=30))
    env.reset(seed=0)
    frames = {ale.getEpisodeFrameNumber() for ale in env._games}
    still = make_envs(RAM)
    still.reset(seed=0)
    start = still._games[0].getEpisodeFrameNumber()
    assert frames == {start + 4 * k for k in range(8)}
    env.close()
    still.close()


@pytest.mark.parametrize(
    ("game", "driver"), [("CartPole-v1", "dummy"), ("Gravitar-v0", None), ("ALE/Gravitar-v5", None)]
)
def test_without_a_desktop_games_and_films_print_nothing(game: str, driver: str | None) -> None:
    """Neither SDL, which looks for a desktop, nor ALE, which would greet. A driver that the user chose stays."""
    code = f"""
import os
from gravitar_dqn.config import EnvSettings
from gravitar_dqn.envs import make_envs
from gravitar_dqn.envs.single import make_recorded_env
config, shown = EnvSettings(id="{game}", num_envs=1), []
make_recorded_env(config, shown.append)[0].reset(seed=1)
make_envs(config).reset(seed=1)
print(shown[0].ndim, os.environ.get("SDL_VIDEODRIVER"), os.environ["SDL_AUDIODRIVER"])
"""
    desktop = {"XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"}
    env = {name: value for name, value in os.environ.items() if name not in desktop} | {"SDL_AUDIODRIVER": "disk"}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == (f"3 {driver} disk\n", "")

"""ALE games seen by the console's RAM, many side by side on threads."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ale_py import ALEInterface, roms
from gymnasium.vector import AutoresetMode, VectorEnv

from gravitar_dqn.envs.spec import FRAME_SKIP, RAM_BYTES


class RamVectorEnv(VectorEnv[Any, Any, Any]):
    """ALE games seen by their RAM: observations (num_envs, 128) uint8.

    The emulators are played by threads: ALE's interface lets go of Python's lock while it plays, and Gymnasium's own
    vector environments would play one game after the other. Nothing is drawn that nobody looks at.

    Args:
        game: Gymnasium's id, `ALE/<Game>-v5`.
        num_envs: games played side by side.
        num_threads: threads that play them.
        sticky_actions: probability that the emulator repeats the last action instead of the chosen one.
        noop_max: a game starts with no-ops of up to this many emulator frames.
        max_frames: emulator frames after which a game is cut off (truncated).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  (Gymnasium's own way to say it)

    def __init__(
        self, game: str, num_envs: int, num_threads: int, sticky_actions: float, noop_max: int, max_frames: int
    ) -> None:
        rom = roms.get_rom_path(gym.spec(game).kwargs["game"])
        assert rom is not None, "ale_py brings every game's ROM"
        self._rom = rom
        ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # of all that are made from now on: no greeting
        self._games = [ALEInterface() for _ in range(num_envs)]
        for ale in self._games:
            ale.setInt("frame_skip", FRAME_SKIP)
            ale.setFloat("repeat_action_probability", sticky_actions)
            ale.setInt("max_num_frames_per_episode", max_frames)
        self.num_envs, self._noop_max = num_envs, noop_max
        self._random = [np.random.default_rng() for _ in range(num_envs)]  # of the no-ops
        self._seeded = False
        self._ended = np.zeros(num_envs, dtype=np.bool_)
        self._pool = ThreadPoolExecutor(num_threads)
        self._shares = [range(i, num_envs, num_threads) for i in range(num_threads)]
        self._pending: list[Future[None]] = []
        self._games[0].loadROM(self._rom)  # for the actions; `reset` seeds and loads all
        self._actions = list(self._games[0].getMinimalActionSet())
        self.single_observation_space = gym.spaces.Box(0, 255, (RAM_BYTES,), np.uint8)
        self.single_action_space = gym.spaces.Discrete(len(self._actions))
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.spec = gym.spec(game)
        self._new_outputs()

    def _new_outputs(self) -> None:
        """Arrays for what a step brings; those of the step before may still be in use."""
        self._obs = np.empty((self.num_envs, RAM_BYTES), dtype=np.uint8)
        self._rewards = np.zeros(self.num_envs)
        self._terminations = np.zeros(self.num_envs, dtype=np.bool_)
        self._truncations = np.zeros(self.num_envs, dtype=np.bool_)

    def _begin(self, i: int) -> None:
        ale = self._games[i]
        ale.reset_game()
        for _ in range(self._random[i].integers(0, self._noop_max // FRAME_SKIP + 1)):
            ale.act(ale_py.Action.NOOP)
        if ale.game_over():  # cut off by a small max_frames
            ale.reset_game()
        ale.getRAM(self._obs[i])

    def _begin_share(self, share: range, which: npt.NDArray[np.bool_], seeds: list[int] | None) -> None:
        for i in share:
            if seeds is not None:
                self._games[i].setInt("random_seed", seeds[i] % 2**31)
                self._games[i].loadROM(self._rom)  # it takes the seed
                self._random[i] = np.random.default_rng(seeds[i])
            if which[i]:
                self._begin(i)
            else:
                self._games[i].getRAM(self._obs[i])

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """New games, in all environments or where `options["reset_mask"]` (num_envs,) is true.

        Every environment takes a seed of its own from `seed`; without one the first reset draws one.
        """
        if isinstance(seed, list):
            raise TypeError("one seed is needed: each environment takes its own from it")
        mask = (options or {}).get("reset_mask")
        which = np.ones(self.num_envs, dtype=np.bool_) if mask is None else np.asarray(mask)
        seeds = None
        if seed is not None or not self._seeded:
            seeds = [int(own) for own in np.random.SeedSequence(seed).generate_state(self.num_envs)]
            self._seeded = True
        self._new_outputs()
        for done in [self._pool.submit(self._begin_share, share, which, seeds) for share in self._shares]:
            done.result()
        self._ended &= ~which
        return self._obs, {}

    def _play(self, share: range, actions: npt.NDArray[np.int64]) -> None:
        for i in share:
            if self._ended[i]:  # NEXT_STEP autoreset: no action is played, nothing is earned
                self._begin(i)
                continue
            ale = self._games[i]
            self._rewards[i] = ale.act(self._actions[actions[i]])
            self._terminations[i] = ale.game_over(with_truncation=False)
            self._truncations[i] = ale.game_truncated() and not self._terminations[i]
            ale.getRAM(self._obs[i])

    def send(self, actions: npt.NDArray[np.int64]) -> None:
        """Begin a step; `recv` waits for it."""
        self._new_outputs()
        self._pending = [self._pool.submit(self._play, share, actions) for share in self._shares]

    def recv(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """What the step brought: observations, rewards, terminations, truncations, and nothing else."""
        for done in self._pending:
            done.result()
        self._ended = self._terminations | self._truncations
        return self._obs, self._rewards, self._terminations, self._truncations, {}

    def step(self, actions: npt.NDArray[np.int64]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every game."""
        self.send(actions)
        return self.recv()

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool.shutdown()

"""A trained network playing whole games, without learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.agents import entry_of
from gravitar_dqn.config import RunConfig
from gravitar_dqn.envs import spec_of_game
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.errors import UserError
from gravitar_dqn.replay import ReplayBuffer
from gravitar_dqn.run import checkpoint


class Policy:
    """A trained network playing `num_envs` games without learning. The last few frames are its memory.

    Every action is random with probability `epsilon`; else the largest Q value's, or drawn from PPO's policy.
    `on_act` is shown the observations and the actions chosen on them.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        spec: EnvSpec,
        num_envs: int,
        *,
        epsilon: float,
        seed: int,
        on_act: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        device = next(network.parameters()).device
        self.network = network
        self._action_scores = entry_of(config).action_scores
        self.frames = ReplayBuffer(
            num_envs,
            num_envs,
            spec.frame_shape,
            spec.frame_dtype,
            stack=spec.stack,
            padding=config.stack_padding,
            device=device,
        )
        self.epsilon = torch.full((num_envs,), epsilon, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self._on_act = on_act

    def begin(self, obs: npt.NDArray[Any]) -> None:
        """Start with the frames of freshly reset environments."""
        self.frames.begin(obs)

    @torch.no_grad()
    def act(self) -> Tensor:
        """Actions (num_envs,) int64 for the newest observations."""
        obs = self.frames.latest()
        scores = self._action_scores(self.network, obs, self.generator)
        actions = losses.epsilon_greedy(scores, self.epsilon, self.generator)
        if self._on_act is not None:
            self._on_act(obs, actions)
        return actions

    def observe(self, actions: Tensor, obs: npt.NDArray[Any], played: npt.NDArray[np.bool_]) -> None:
        """Take in the next frames; `played` is false where they start a game."""
        nothing = np.zeros(len(played), dtype=np.bool_)
        self.frames.put(actions, nothing, nothing, nothing, obs, played)


def load_policy(config: RunConfig, weights: dict[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """The network that acts, with these weights; UserError when they do not fit the game."""
    network = entry_of(config).make_policy(config, spec_of_game(config.env)).to(device)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit {config.env.id}: {str(error).splitlines()[-1].strip()}") from None
    if name := checkpoint.not_finite(weights):
        raise UserError(f"the weights cannot play: {name} holds NaN or infinity")
    return network.eval()


def play_games(
    envs: Any,
    policy: Policy,
    episodes: int,
    seed: int,
    max_steps: float = math.inf,
    interrupted: Callable[[], bool] = lambda: False,
    on_score: Callable[[float], None] = lambda score: None,
    on_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Scores of `episodes` whole games. Every environment plays its fixed share: short games count no more often.

    A game is cut off after `max_steps` agent steps. What ended before `interrupted` is returned then. `on_score` is
    called with every score that counts, `on_step` at every step.
    """
    num_envs = envs.num_envs
    quota = np.full(num_envs, episodes // num_envs) + (np.arange(num_envs) < episodes % num_envs)
    scores: list[list[float]] = [[] for _ in range(num_envs)]
    policy.begin(envs.reset(seed=seed)[0])
    played, score, length = np.ones(num_envs, dtype=np.bool_), np.zeros(num_envs), np.zeros(num_envs)
    while any(len(done) < share for done, share in zip(scores, quota, strict=True)) and not interrupted():
        on_step()
        actions = policy.act()
        obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
        score += rewards * played
        length += played
        ended = (terminations | truncations) & played
        cut = played & ~ended & (length >= max_steps)
        if cut.any():  # these begin anew at once; those that ended do so by their next step
            obs, _ = envs.reset(options={"reset_mask": cut})
        policy.observe(actions, obs, played & ~cut)
        for i in np.flatnonzero(ended | cut):
            scores[i].append(float(score[i]))
            if len(scores[i]) <= quota[i]:
                on_score(float(score[i]))
            score[i], length[i] = 0.0, 0.0
        played = ~ended
    return [value for done, share in zip(scores, quota, strict=True) for value in done[:share]]

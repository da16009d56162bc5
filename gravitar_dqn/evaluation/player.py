"""A trained agent in Python code of one's own, in Gymnasium's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.wrappers import FrameStackObservation

from gravitar_dqn import losses
from gravitar_dqn.agents import entry_of
from gravitar_dqn.envs import spec_of_game
from gravitar_dqn.envs.single import make_single
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation import trained_agent
from gravitar_dqn.evaluation.acting import load_policy
from gravitar_dqn.run.status import RUNS, find_one
from gravitar_dqn.runtime.execution import choose_device


def load_agent(name: str | Path, *, checkpoint: str = "latest", device: str = "auto", seed: int = 0) -> Player:
    """A trained agent that can be asked for actions; UserError when there is none of that name.

    Args:
        name: a run's folder, the name of one in runs/, or the name of weights that ship with the package.
        checkpoint: of a run: its newest, `latest`; `best`, of those that were evaluated while it trained; or the name
            of a file in its folder checkpoints/.
        device: auto, cpu, cuda or cuda:N.
        seed: of random actions, and of actions drawn from a policy.
    """
    if str(name) in trained_agent.names() and not (Path(name).exists() or (RUNS / name).exists()):
        if checkpoint != "latest":
            raise UserError(f"{name} ships with the package: it is one checkpoint, there is no {checkpoint}")
        agent = trained_agent.from_pretrained(str(name))
    else:
        try:
            run_dir = find_one(str(name))
        except UserError as error:
            raise UserError(f"{error}; weights ship for {', '.join(trained_agent.names()) or 'none'}") from None
        agent = trained_agent.from_run(run_dir, checkpoint)
    return Player(agent, choose_device(device), seed)


class Player:
    """A trained agent. It has no memory: all it knows is the observation that it is shown.

    Attributes:
        name: of its run's folder, or of the weights.
        config: the settings of the run that trained it.
        obs_shape: of an observation: (4, 84, 84) uint8 pictures, the newest last; (2, 128) uint8 RAM, the newest last;
            or (n,) float32.
    """

    def __init__(self, agent: trained_agent.Trained, device: torch.device, seed: int) -> None:
        self.name, self.config, self._device = agent.name, agent.config, device
        self._spec = spec_of_game(agent.config.env)
        self.obs_shape = self._spec.obs_shape
        self._network = load_policy(agent.config, agent.weights, device)
        self._action_scores = entry_of(agent.config).action_scores
        self._generator = torch.Generator(device).manual_seed(seed)

    def make_env(self, **options: Any) -> gym.Env[Any, Any]:
        """The game as the agent was trained on it, with its observations and raw rewards.

        Args:
            options: for `gymnasium.make`, such as render_mode="human".
        """
        env = make_single(self.config.env, **options)
        if self._spec.kind == "vector":
            return env
        zero = self.config.stack_padding == "zero"
        return FrameStackObservation(env, self._spec.stack, padding_type="zero" if zero else "reset")

    @torch.no_grad()
    def predict(self, obs: npt.ArrayLike, epsilon: float = 0.0) -> int | npt.NDArray[np.int64]:
        """The action for an observation (*obs_shape), or actions (N,) for N of them (N, *obs_shape).

        Each is random with probability `epsilon`; else the largest Q value's, or drawn from PPO's policy. ValueError
        for observations of another shape.
        """
        array = np.asarray(obs)
        single = array.shape == self.obs_shape
        if not single and array.shape[1:] != self.obs_shape:
            raise ValueError(f"an observation has the shape {self.obs_shape}, not {array.shape}: see make_env")
        batch = torch.as_tensor(array[None] if single else array, dtype=self._spec.frame_dtype, device=self._device)
        scores = self._action_scores(self._network, batch, self._generator)
        epsilons = torch.full((len(batch),), epsilon, device=self._device)
        actions = losses.epsilon_greedy(scores, epsilons, self._generator).cpu().numpy()
        return int(actions[0]) if single else actions

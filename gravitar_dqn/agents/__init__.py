"""The registry: which agent plays a run is decided by the class of its settings, here and nowhere else.

A new agent is a file with an `ENTRY`, its settings in config.py, a line in REGISTRY, and a preset.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gravitar_dqn.config import DQNRunConfig, PPORunConfig, RunConfig

if TYPE_CHECKING:
    from gravitar_dqn.agents.base import AgentEntry

# The settings' class -> the module with the agent's ENTRY, by name: settings and command line load no agent.
REGISTRY: dict[type[RunConfig], str] = {
    DQNRunConfig: "gravitar_dqn.agents.dqn",
    PPORunConfig: "gravitar_dqn.agents.ppo",
}


def entry_of(config: RunConfig) -> AgentEntry:
    """The agent that these settings are for."""
    home = next(REGISTRY[kind] for kind in type(config).__mro__ if kind in REGISTRY)
    entry: AgentEntry = import_module(home).ENTRY
    return entry

"""What an agent makes of what it sees, drawn beside the game in a recording.

DQN: the Q value of every action. RANDAL: the probability of every action and, as a map, how much it expects to be
able to change each part of the screen (pixel control). Both: curiosity over the last steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gravitar_dqn.agents import entry_of
from gravitar_dqn.agents.base import Insight, Look
from gravitar_dqn.envs import spec_of_game
from gravitar_dqn.evaluation.trained_agent import Trained

Picture = npt.NDArray[np.uint8]

WIDTH, LEAST_HEIGHT = 320, 400  # of the panel, pixels
REMEMBERED = 240  # steps of curiosity shown
INK, PAPER, DIM, BLUE, ORANGE = (40, 40, 40), (255, 255, 255), (225, 225, 225), (0, 114, 178), (213, 94, 0)


class Overlay:
    """Puts a panel beside the game's pictures.

    Args:
        look: what the agent makes of an observation (1, *obs_shape).
        actions: names of the actions.
    """

    def __init__(self, look: Look, actions: Sequence[str]) -> None:
        self._look, self._actions = look, actions
        self._bonuses: deque[float] = deque(maxlen=REMEMBERED)
        self._insight: Insight | None = None
        self._chosen = 0
        self._panel: Picture | None = None

    def update(self, obs: Tensor, actions: Tensor) -> None:
        """Take in the observation (1, *obs_shape) and the action (1,) chosen on it."""
        self._insight, self._chosen, self._panel = self._look(obs), int(actions[0]), None
        if self._insight.bonus is not None:
            self._bonuses.append(self._insight.bonus)

    def beside(self, picture: Picture) -> Picture:
        """A picture (height, width, 3), enlarged if it is small, and the panel at its right."""
        scale = -(-LEAST_HEIGHT // picture.shape[0])
        large = np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)
        if self._panel is None:
            self._panel = self._draw(large.shape[0])
        return np.concatenate([large, self._panel], axis=1)

    def _draw(self, height: int) -> Picture:
        panel = np.full((height, WIDTH, 3), PAPER, dtype=np.uint8)
        if (insight := self._insight) is None:
            return panel
        blocks: list[Callable[[Picture], None]] = [partial(self._draw_values, insight)]
        if insight.cells is not None:
            blocks.append(partial(_draw_cells, insight.cells))
        if insight.bonus is not None:
            blocks.append(self._draw_curiosity)
        for i, draw in enumerate(blocks):
            draw(panel[i * height // len(blocks) : (i + 1) * height // len(blocks)])
        return panel

    def _draw_values(self, insight: Insight, block: Picture) -> None:
        values = insight.values
        low, high = min(0.0, float(values.min())), float(values.max())
        _write(block, f"{insight.title}: {self._actions[self._chosen]} {values[self._chosen]:.3g}")
        top, bottom = 24, block.shape[0] - 6
        width = (WIDTH - 20) / len(values)
        for i, value in enumerate(values):
            height = int((bottom - top) * (value - low) / max(high - low, 1e-9))
            left, right = int(10 + i * width), int(10 + (i + 1) * width) - 2
            color = ORANGE if i == self._chosen else BLUE
            cv2.rectangle(block, (left, bottom - max(height, 1)), (right, bottom), color, cv2.FILLED)

    def _draw_curiosity(self, block: Picture) -> None:
        values = np.array(self._bonuses)
        _write(block, f"curiosity, last {REMEMBERED} steps: {values[-1]:.3g}")
        top, bottom = 24, block.shape[0] - 6
        cv2.line(block, (10, bottom), (WIDTH - 10, bottom), DIM)
        heights = bottom - (bottom - top) * values / max(values.max(), 1e-9)
        xs = 10 + np.arange(len(values)) * (WIDTH - 20) / REMEMBERED
        points = np.stack([xs, heights], axis=1).astype(np.int32)
        cv2.polylines(block, [points], isClosed=False, color=BLUE, thickness=1, lineType=cv2.LINE_AA)


def _draw_cells(cells: npt.NDArray[np.float32], block: Picture) -> None:
    _write(block, f"pixel control, most change to come: {cells.max():.2g}")
    scaled = (255 * (cells - cells.min()) / max(float(np.ptp(cells)), 1e-9)).astype(np.uint8)
    side = block.shape[0] - 30
    heat = cv2.applyColorMap(cv2.resize(scaled, (side, side), interpolation=cv2.INTER_NEAREST), cv2.COLORMAP_VIRIDIS)
    left = (WIDTH - side) // 2
    block[24 : 24 + side, left : left + side] = heat[:, :, ::-1]  # OpenCV's colours run the other way


def _write(block: Picture, text: str) -> None:
    cv2.putText(block, text, (10, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)


def make_look(trained: Trained, network: nn.Module) -> Look:
    """What a trained agent makes of observations; `network` is the one that acts.

    Weights that ship have no state: there is only what that network says.
    """
    config = trained.config
    return entry_of(config).make_look(config, spec_of_game(config.env), network, trained.state)

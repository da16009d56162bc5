"""Windows as Visdom takes them: how a run stands, its film, its settings; and what all charts share."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gravitar_dqn.config import flatten
from gravitar_dqn.dashboard.charts import BLUE, GREEN, ORANGE
from gravitar_dqn.run.status import Standing

Pane = dict[str, Any]
Window = tuple[str, object, Callable[[], Pane]]  # key, the revision of what it shows, how to make it

WIDTH, HEIGHT = 400, 300  # pixels of a window; three columns in a page 1280 wide
MOST_TICKS = 6  # of an axis in decades
STATES = {
    "running": (GREEN, ""),
    "finished": (BLUE, "it has reached its limit"),
    "stopped": ("#E69F00", "all is saved: train --resume goes on"),
    "died": (ORANGE, "train --resume goes on from its last checkpoint"),
}  # of a run: colour, and what it means


def options(title: str, width: int = WIDTH, height: int = HEIGHT) -> Pane:
    return {"title": title, "width": width, "height": height}


def text_pane(key: str, title: str, content: str) -> Pane:
    boxed = f"<div style='padding:4px 10px;color:#333'>{content}</div>"
    return {"data": [{"type": "text", "content": boxed}], "win": key, "layout": {}, "opts": options(title)}


# ---------------------------------------------------------------- charts


def log_axis(values: Iterable[float]) -> Pane:
    """Range and ticks of a logarithmic axis: whole decades, so that one at least has its label."""
    positive = [value for value in values if value > 0]
    low = math.floor(math.log10(min(positive, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(positive, default=1))))
    return {"range": [low, high], "dtick": math.ceil((high - low) / MOST_TICKS)}


def nothing_yet(sentence: str) -> Pane:
    """A chart's layout where there is no data: a sentence instead of axes."""
    where = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    note = {"text": html.escape(sentence), "font": {"size": 14, "color": "#777"}, **where}
    # Nothing to zoom into: the page would keep such axes when there is data.
    axis = {"visible": False, "fixedrange": True}
    return {"annotations": [note], "xaxis": axis, "yaxis": axis, "showlegend": False}


# ---------------------------------------------------------------- the run, its film, its settings


def state_badge(state: str) -> str:
    """A run's state, in a word with its colour; `state_of` reads it back from `data-state`."""
    color = STATES[state][0]
    return f"<b data-state='{state}' style='color:{color}'>&#9679; {state}</b>"


def state_of(windows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The state that the Run window says, of an environment's windows as a server holds them; None without one."""
    said = re.search(r"data-state='(\w+)'", str(windows.get("run", {}).get("content", "")))
    return said[1] if said is not None and said[1] in STATES else None


def run_pane(run: Standing | None) -> Pane:
    """How a run stands; a placeholder where that cannot be read."""
    if run is None:
        return text_pane("run", "Run", "<i>config.json has not been written yet, or cannot be read</i>")
    config, (color, meaning) = run.config, STATES[run.state]
    bar = (
        "<div style='background:#E5E5E5;border-radius:4px;height:14px;margin:8px 0'>"
        f"<div style='background:{color};border-radius:4px;height:100%;width:{run.progress:.1%}'></div></div>"
    )
    table = "".join(
        f"<tr><td style='padding-right:14px;color:#555'>{name}</td><td>{value}</td></tr>" for name, value in _facts(run)
    )
    return text_pane(
        "run",
        "Run",
        f"<div style='font-size:17px'>{state_badge(run.state)}</div>"
        f"<div style='font-size:12px;color:#555;min-height:17px'>{meaning}</div>"
        f"<div><b>{html.escape(config.env.id)}</b>, {html.escape(run.label)}</div>"
        f"{bar}<table style='font-size:13px;line-height:1.6'>{table}</table>",
    )


def _facts(run: Standing) -> list[tuple[str, str]]:
    config, left = run.config, run.minutes_left
    games, minutes = f"{run.episodes:,}", duration(run.minutes)
    games += f" of {config.total_episodes:,}" if config.total_episodes else ""
    minutes += f" of {duration(config.total_minutes)}" if config.total_minutes else ""
    facts = [
        ("done", f"{run.progress:.1%}"),
        ("steps", f"{run.global_step:,} of {config.total_steps:,}"),
        ("games", games),
        ("trained", minutes),
        ("left", f"about {duration(left)}" if left is not None else "-"),
        ("mean of the last 100 games", "-" if run.mean_score is None else f"{run.mean_score:,.1f}"),
        ("best evaluation", str(run.best or "-")),
    ]
    return facts if run.state == "running" else [fact for fact in facts if fact[0] != "left"]


def duration(minutes: float) -> str:
    """Minutes in words: 12.3 min, or 3 h 05 min."""
    if minutes < 100:
        return f"{minutes:.1f} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours:,} h {rest:02} min"


def video_pane(caption: str, mp4: bytes | None) -> Pane:
    """The last recorded game, playing; `caption` alone keeps the window's place until there is one."""
    if mp4 is None:
        return text_pane("video", "Last recorded game", f"<i>{html.escape(caption)}</i>")
    source = f"data:video/mp4;base64,{base64.b64encode(mp4).decode('ascii')}"
    # Muted, because browsers start nothing else by themselves.
    player = (
        f'<video muted autoplay loop controls playsinline style="width:100%;max-height:235px" src="{source}"></video>'
    )
    return text_pane("video", "Last recorded game", f"{player}<div>{html.escape(caption)}</div>")


def settings_pane(settings: Mapping[str, Any]) -> Pane:
    """A table of config.json, the lines that tell one run from another first."""
    rows = flatten(settings)
    for name in ("config.preset", "metrics"):  # the same as "preset"; no setting
        rows.pop(name, None)
    first: dict[str, Any] = {
        name: rows.pop(name) for name in ("preset", "config.seed", "device", "commit") if name in rows
    }
    cells = "".join(
        f"<tr><td style='padding-right:12px;color:#555'>{html.escape(name.removeprefix('config.'))}</td>"
        f"<td style='word-break:break-word'>{html.escape(str(value))}</td></tr>"
        for name, value in {**first, **rows}.items()
    )
    table = f"<table style='font-size:12px;line-height:1.35;vertical-align:top'>{cells}</table>"
    return text_pane("settings", "Settings", table if cells else "<i>config.json has not been written yet</i>")

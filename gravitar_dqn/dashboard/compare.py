"""Several runs in one chart each: from their windows, as a Visdom server holds them, to those of a comparison. Pure."""

from __future__ import annotations

import hashlib
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from gravitar_dqn.charts import BLUE, GREEN, ORANGE, PURPLE
from gravitar_dqn.dashboard.panes import STATES, Pane, log_axis, options, state_badge, text_pane

Held = Mapping[str, Any]  # a window as the server holds it
Environments = Mapping[str, Mapping[str, Held]]  # environment -> window -> what is held

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito's: one a run
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # one a line of a run
BELOW = 6  # lines whose names find room below a chart
COMPARED = "-compared"  # ends the names of the windows of a comparison
WIDTH, HEIGHT = 610, 400  # pixels: names are long; two columns in a page 1280 wide


def merge(environments: Environments) -> list[dict[str, Any]]:
    """The windows of a comparison: a table of the runs, then every chart that two of them have, in their order.

    A run has a colour, its lines are told apart by their dashes. Single games and extremes are left out. Windows are
    one chart when title and x axis are the same. `contentID` changes with what is shown, and only then.
    """
    environments = {name: windows for name, windows in environments.items() if any(map(_is_run, windows.values()))}
    labels = labels_of(environments)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(environments)}
    charts: dict[tuple[str, str], dict[str, Held]] = {}
    for name, windows in environments.items():
        for window in sorted(windows.values(), key=lambda window: int(window.get("i", 0))):
            if _is_chart(window):
                charts.setdefault((str(window["title"]), _x_title(window)), {}).setdefault(name, window)
    shared = [sources for sources in charts.values() if len(sources) > 1]
    merged = [_table(environments, labels, colors, bool(shared)), *(_chart(each, labels, colors) for each in shared)]
    # To the page "has_compare" says that it is not a window of one of the environments.
    more = {"command": "window", "inflate": True, "has_compare": True, "version": 1, "comment": ""}
    return [{**window, **more, "i": i} for i, window in enumerate(merged)]


def labels_of(environments: Environments) -> dict[str, str]:
    """What each run is called: preset and seed, its folder too where that is not enough; else its environment."""
    found: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name, windows in environments.items():
        metas = [trace.get("meta") for window in windows.values() if _is_chart(window) for trace in _traces(window)]
        meta = next((meta for meta in metas if isinstance(meta, Mapping) and "label" in meta), {})
        found[name], folders[name] = str(meta.get("label", name)), str(meta.get("folder") or name)
    twice = {label for label in found.values() if list(found.values()).count(label) > 1}
    found = {name: f"{label} ({folders[name]})" if label in twice else label for name, label in found.items()}
    twice = {label for label in found.values() if list(found.values()).count(label) > 1}  # folders of the same name
    return {name: name if label in twice else label for name, label in found.items()}


def _chart(sources: Mapping[str, Held], labels: Mapping[str, str], colors: Mapping[str, str]) -> dict[str, Any]:
    """One chart of several runs' windows, by environment."""
    kept = {name: _compared(window) for name, window in sources.items()}
    lines = list(dict.fromkeys(str(trace.get("name", "")) for traces in kept.values() for trace in traces))
    data = []
    for name, traces in kept.items():
        for trace in traces:
            line = str(trace.get("name", ""))
            dash = DASHES[lines.index(line) % len(DASHES)]
            data.append(
                {
                    "type": "scatter",
                    "name": html.escape(f"{labels[name]}: {line}" if line else labels[name]),
                    "x": trace.get("x", []),
                    "y": _finite(trace.get("y", [])),
                    "mode": trace.get("mode", "lines"),
                    "line": {"color": colors[name], "dash": dash, "width": 2},
                    "marker": {"color": colors[name], "size": 6},
                    "meta": {"label": labels[name], "compared": True},
                }
            )
    # With its axes, if one of them has any: a run that has just begun says only when there will be data.
    base = next((window for name, window in sources.items() if any(len(t.get("x", [])) for t in kept[name])), None)
    first = next(iter(sources.values()))
    layout = dict((base or first)["content"].get("layout", {}))
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    if len(data) > BELOW:
        legend = {"x": 1.02, "y": 1, "font": {"size": 9}}
    layout |= {"showlegend": base is not None, "legend": legend}
    yaxis = layout.get("yaxis")
    if base is not None and isinstance(yaxis, Mapping) and yaxis.get("type") == "log":
        layout["yaxis"] = {**yaxis, **log_axis(y for trace in data for y in trace["y"] if y is not None)}
    facts = [(name, labels[name], window.get("contentID")) for name, window in sources.items()]
    return {
        "id": f"{first['id']}{COMPARED}",
        "title": first["title"],
        "type": "plot",
        "content": {"data": data, "layout": layout},
        "width": WIDTH,
        "height": HEIGHT,
        "contentID": _digest(facts),
    }


def _compared(window: Held) -> list[Held]:
    """The traces of a window that are drawn beside another run's; all, where that would be none."""
    traces = _traces(window)
    kept = [trace for trace in traces if (trace.get("meta") or {}).get("compared", True)]
    return kept or list(traces)


def _table(
    environments: Environments, labels: Mapping[str, str], colors: Mapping[str, str], shared: bool
) -> dict[str, Any]:
    """Which run has which colour, how it stands, and the way to its page."""
    rows = "".join(
        f"<tr><td style='color:{colors[name]};font-size:20px;padding-right:8px'>&#9644;</td>"
        f"<td style='padding-right:14px'>{html.escape(labels[name])}</td>"
        f"<td style='padding-right:14px'>{_state(windows)}</td>"
        f"<td><a href='/env/{quote(name)}'>{html.escape(name)}</a></td></tr>"
        for name, windows in environments.items()
    )
    note = "" if shared else "<p>These have no chart in common: other games are counted in other units.</p>"
    content = text_pane("", "", f"<table style='font-size:13px'>{rows}</table>{note}")["data"][0]["content"]
    return {
        "id": f"runs{COMPARED}",
        "title": "Runs",
        "type": "text",
        "content": content,
        "width": WIDTH,
        "height": HEIGHT,
        "contentID": _digest(content),
    }


def state_of(windows: Mapping[str, Held]) -> str | None:
    """The state that an environment's Run window says; None where it says none."""
    said = re.search(r"data-state='(\w+)'", str(windows.get("run", {}).get("content", "")))
    return said[1] if said is not None and said[1] in STATES else None


def _state(windows: Mapping[str, Held]) -> str:
    state = state_of(windows)
    return state_badge(state) if state is not None else ""


def _is_run(window: Held) -> bool:
    """Whether a window is one of a page to compare: not of a comparison, nor of an empty page."""
    return _is_chart(window) and not window.get("has_compare") and not str(window.get("id", "")).endswith(COMPARED)


def _is_chart(window: Held) -> bool:
    content = window.get("content")
    return window.get("type") == "plot" and bool(window.get("title")) and isinstance(content, Mapping)


def _traces(window: Held) -> Sequence[Held]:
    """A chart's lines. Whatever else people draw on the server, heat maps say, is left where it is."""
    data = window["content"].get("data", [])
    return [trace for trace in data if isinstance(trace, Mapping) and trace.get("type", "scatter") == "scatter"]


def _x_title(window: Held) -> str:
    axis = window["content"].get("layout", {}).get("xaxis") or {}
    title = axis.get("title") if isinstance(axis, Mapping) else ""
    return str(title.get("text", "") if isinstance(title, Mapping) else title or "")


def _finite(values: Sequence[Any]) -> list[Any]:
    # Others' windows may hold NaN or infinity, which no browser reads.
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- between panes and what is held of them


def held(pane: Pane, revision: object) -> dict[str, Any]:
    """A pane as the server will hold it."""
    kind = str(pane["data"][0]["type"])
    content = pane["data"][0]["content"] if kind == "text" else {"data": pane["data"], "layout": pane["layout"]}
    window = {"id": pane["win"], "type": "text" if kind == "text" else "plot", "contentID": str(revision)}
    return {**window, **pane["opts"], "content": content}


def pane_of(window: Held) -> Pane:
    """The pane that a server will hold as this window."""
    data, layout = [{"type": "text", "content": window["content"]}], {}
    if window["type"] == "plot":
        data, layout = window["content"]["data"], window["content"]["layout"]
    opts = {**options(window["title"]), "width": window["width"], "height": window["height"]}
    return {"data": data, "win": window["id"], "layout": layout, "opts": opts}

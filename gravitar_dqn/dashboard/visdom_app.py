"""Visdom's web application with pages of our own: a list of runs, comparisons in two colours, runs that have died.

Only our server's process imports this: it loads Visdom. Written for Visdom 0.2.4 and 0.3.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote, urlsplit

import tornado.ioloop
import tornado.web
import tornado.websocket
from visdom.server.handlers import socket_handlers, web_handlers
from visdom.utils import server_utils

from gravitar_dqn.dashboard.compare import merge, state_of
from gravitar_dqn.dashboard.pages import entitled, runs_page
from gravitar_dqn.dashboard.panes import run_pane
from gravitar_dqn.dashboard.registry import registered
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.folder import is_held
from gravitar_dqn.run.status import Standing, standing

CLOSED = "closed"
HERE = ("127.0.0.1", "localhost", "::1")
SECONDS = 3.0  # between two looks at what has changed

App = Any  # Visdom's application: `state`, its environments by name; `subs`, the open pages' sockets by id


def install(app: App, server: str) -> None:
    """Put our pages in front of Visdom's, and look every few seconds at what has changed.

    `server` is the HTTP header of that name on the front page, by which others know us.
    """
    # Of every handler, Visdom's too: none has one of its own.
    setattr(tornado.web.RequestHandler, "prepare", refuse_strangers)  # noqa: B010
    comparisons = app.settings["comparisons"] = Comparisons(app)
    ours = {"app": app}
    app.add_handlers(
        ".*",
        [
            (r"/", RunsPage, {"server": server}),
            (r"/env/(.*)", EnvironmentPage, ours),
            (r"/compare/(.*)", ComparisonPage, ours),
            (r"/socket", Socket, ours),
        ],
    )
    tornado.ioloop.PeriodicCallback(comparisons.refresh, 1000 * SECONDS).start()
    tornado.ioloop.PeriodicCallback(lambda: look_after_runs(app), 1000 * SECONDS).start()


def refuse_strangers(handler: tornado.web.RequestHandler) -> None:
    """Answer 403 to what other web pages ask through the browser of whoever sits here.

    Their requests name them as their origin; or, where their name was made to lead to this machine, as our host.
    """
    host, origin = handler.request.host, handler.request.headers.get("Origin")
    if urlsplit(f"//{host}").hostname not in HERE or (origin is not None and urlsplit(origin).netloc != host):
        raise tornado.web.HTTPError(403)


# ---------------------------------------------------------------- runs that have ended without a word


def look_after_runs(app: App) -> None:
    """Redraw how a run stands where its page says that it runs, and it does not."""
    for environment, run_dir in registered().items():
        # What lies on the disk only, with a film of megabytes, is looked at when somebody opens it.
        held = app.state.get(environment)
        if isinstance(held, dict) or getattr(held, "_raw_dict", None) is not None:
            look_after(app, environment, run_dir)


def look_after(app: App, environment: str, run_dir: Path) -> None:
    """The same for one run that the server has."""
    if state_of(windows_of(app, environment)) != "running" or is_held(run_dir):
        return
    with suppress(UserError, OSError, ValueError):
        pane = run_pane(standing(run_dir))
        handler = SimpleNamespace(
            state=app.state,
            subs=app.subs,
            env_path=app.env_path,
            storage=getattr(app, "storage", None),  # 0.3.0's
            write=lambda answer: None,
        )
        server_utils.register_window(handler, server_utils.window(pane), environment)  # type: ignore[no-untyped-call]
        web_handlers.SaveHandler.wrap_func(handler, {"data": [environment]})  # type: ignore[no-untyped-call]


def windows_of(app: App, environment: str) -> Mapping[str, Any]:
    """An environment's windows by id; none where its file is damaged."""
    with suppress(KeyError, ValueError):
        return cast(Mapping[str, Any], app.state[environment]["jsons"])
    return {}


# ---------------------------------------------------------------- comparisons


class Comparisons:
    """The pages on which several runs are ticked, and what each of them has been sent."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._shown: dict[str, dict[str, str]] = {}  # socket -> window -> contentID

    def begin(self, sid: str, environments: tuple[str, ...]) -> None:
        """Show a page these environments."""
        socket = self._app.subs[sid]
        socket.eid = environments  # a tuple: Visdom itself sends such a page nothing
        self._shown[sid] = {}
        self._send(sid)
        socket.write_message(json.dumps({"command": "layout"}))

    def refresh(self) -> None:
        """Send every such page what has changed."""
        for sid in list(self._shown):
            try:
                if isinstance(self._app.subs[sid].eid, tuple):
                    self._send(sid)
                    continue
            except Exception:  # a page that was closed, or other people's windows: the other pages go on
                pass
            del self._shown[sid]

    def close(self, sid: str, window: str) -> None:
        """A person closed a window: it does not come back by itself."""
        self._shown.get(sid, {})[window] = CLOSED

    def _send(self, sid: str) -> None:
        socket, shown = self._app.subs[sid], self._shown[sid]
        there = [environment for environment in socket.eid if environment in self._app.state]
        for window in merge({environment: windows_of(self._app, environment) for environment in there}):
            if shown.get(window["id"]) not in (window["contentID"], CLOSED):
                socket.write_message(json.dumps(window))
                shown[window["id"]] = window["contentID"]


# ---------------------------------------------------------------- pages


class VisdomPage(tornado.web.RequestHandler):
    """What Visdom's page of an environment and that of a comparison share."""

    def show(self, names: list[str]) -> None:
        """Visdom's page with these environments ticked."""
        page = self.render_string(
            "index.html",  # 0.2.4 wants all of these, 0.3.0 reads the address instead
            items=sorted(cast(App, self.application).state),
            active_item="+".join(names),
            user="",
            wrap_socket=cast(App, self.application).wrap_socket,
        )
        title = " + ".join(names)
        self.finish(entitled(page.decode(), f"compare {title}" if len(names) > 1 else title))


class EnvironmentPage(VisdomPage, web_handlers.EnvHandler):
    def get(self, environment: str) -> None:
        # A run that has just begun is drawn in a moment. Other names that we do not know are none of ours.
        if environment in cast(App, self.application).state or re.fullmatch(r"[\w.-]+", environment, re.ASCII):
            self.show([environment])
        else:
            self.redirect("/")

    def post(self, environment: str) -> None:
        app = cast(App, self.application)
        if environment in app.state and (run_dir := registered().get(environment)) is not None:
            look_after(app, environment, run_dir)
        super().post(environment)


class ComparisonPage(VisdomPage, web_handlers.CompareHandler):
    def get(self, names: str) -> None:
        known = self._known(names)
        if len(known) > 1 and known == names.split("+"):
            self.show(known)
        else:
            where = "compare/" if len(known) > 1 else "env/" if known else ""
            self.redirect(f"/{where}{'+'.join(quote(name, safe='') for name in known)}")

    def post(self, names: str) -> None:
        sid = json.loads(self.request.body)["sid"]
        if sid in cast(App, self.application).subs:
            self.settings["comparisons"].begin(sid, tuple(self._known(names)))

    def _known(self, names: str) -> list[str]:
        return [name for name in dict.fromkeys(names.split("+")) if name in cast(App, self.application).state]


class Socket(socket_handlers.SocketHandler):
    def on_message(self, message: str | bytes) -> None:
        said = json.loads(message)
        if said.get("eid", "") is not None:
            super().on_message(message)  # type: ignore[no-untyped-call]
        # A comparison is no environment: its page closes and moves windows of the environment `null`, and Visdom would
        # hang up on it.
        elif said.get("cmd") == "close":
            self.settings["comparisons"].close(self.sid, said.get("data"))


class RunsPage(tornado.web.RequestHandler):
    """The server's front page."""

    def initialize(self, server: str) -> None:
        self._server = server

    def get(self) -> None:
        self.set_header("Server", self._server)
        self.flush()  # who only asks whether it is us need not wait for the files to be read
        app = cast(App, self.application)
        homes = registered()
        runs: list[tuple[float, str, Standing]] = []
        for environment in app.state:
            with suppress(KeyError, UserError, OSError, ValueError):
                begun = (homes[environment] / "config.json").stat().st_mtime
                runs.append((begun, environment, standing(homes[environment])))
        runs.sort(key=lambda run: run[:2], reverse=True)
        listed = [(environment, run) for _, environment, run in runs]
        others = sorted(set(app.state) - {environment for environment, _ in listed})
        if "main" in others and not windows_of(app, "main"):  # Visdom's own, which is always there
            others.remove("main")
        self.finish(runs_page(listed, others))

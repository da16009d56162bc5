"""What our server adds to Visdom's web application: it answers this machine only, and says which runs have died.

Only our server's process imports this: it loads Visdom. Written for Visdom 0.2.4 and 0.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import tornado.ioloop
import tornado.web
from visdom.server.handlers import web_handlers
from visdom.utils import server_utils

from gravitar_dqn.dashboard.panes import run_pane, state_of
from gravitar_dqn.dashboard.registry import registered
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.folder import is_held
from gravitar_dqn.run.status import standing

HERE = ("127.0.0.1", "localhost", "::1")
SECONDS = 3.0  # between two looks at the runs

App = Any  # Visdom's application: `state`, its environments by name; `subs`, the open pages' sockets by id


def install(app: App, server: str) -> None:
    """Make Visdom's application ours.

    `server` is the HTTP header of that name in every answer, by which others know us.
    """

    def name_server(handler: tornado.web.RequestHandler) -> None:
        handler.set_header("Server", server)

    # Of every handler, Visdom's too: none has one of its own.
    setattr(tornado.web.RequestHandler, "set_default_headers", name_server)  # noqa: B010
    setattr(tornado.web.RequestHandler, "prepare", refuse_strangers)  # noqa: B010
    app.add_handlers(".*", [(r"/env/(.*)", EnvironmentPage, {"app": app})])
    tornado.ioloop.PeriodicCallback(lambda: look_after_runs(app), 1000 * SECONDS).start()


def refuse_strangers(handler: tornado.web.RequestHandler) -> None:
    """Answer 403 to what other web pages ask through the browser of whoever sits here.

    Their requests name them as their origin; or, where their name was made to lead to this machine, as our host.
    """
    host, origin = handler.request.host, handler.request.headers.get("Origin")
    if urlsplit(f"//{host}").hostname not in HERE or (origin is not None and urlsplit(origin).netloc != host):
        raise tornado.web.HTTPError(403)


class EnvironmentPage(web_handlers.EnvHandler):
    """Visdom's page of an environment, which asks for its windows by POST."""

    def post(self, environment: str) -> None:
        app = cast(App, self.application)
        if environment in app.state and (run_dir := registered().get(environment)) is not None:
            look_after(app, environment, run_dir)
        super().post(environment)


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

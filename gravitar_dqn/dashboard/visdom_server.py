"""Finding, starting and stopping a Visdom server on 127.0.0.1."""

from __future__ import annotations

import fcntl
import http.client
import importlib.abc
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from gravitar_dqn.dashboard.visdom_files import browser_files, cache_dir, installed_visdom
from gravitar_dqn.errors import UserError

if TYPE_CHECKING:
    import tornado.web

HOST = "127.0.0.1"
DEFAULT_PORT = 8097
PORTS_TRIED = 10
OURS = "gravitar_dqn"  # the HTTP header "Server" of our own server's answers


def probe(port: int, timeout: float = 1.0) -> Literal["visdom", "free", "taken"]:
    """Who holds the port: a Visdom server that answers, nobody, or something else (a hung server too)."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        if answer.getheader("Server") == OURS or b"<title>visdom</title>" in answer.read(2**18):
            return "visdom"
        return "taken"
    except ConnectionRefusedError:
        return "free"
    except (OSError, http.client.HTTPException):
        return "taken"
    finally:
        connection.close()


def find_or_start_server(port: int = DEFAULT_PORT, wait: float = 10.0) -> str | None:
    """The URL of a Visdom server on this machine, started in the background when none answers.

    Tries `port` and, where something else holds it, the next nine. A server started here outlives the run, so that
    several runs share it. Returns within seconds: None, after one line on stderr, when there can be no server.
    """
    try:
        for candidate in range(port, min(port + PORTS_TRIED, 65536)):
            state = probe(candidate)
            if state == "free":
                _start(candidate, wait)
            if state != "taken":
                return f"http://{HOST}:{candidate}"
        raise UserError(
            f"other programs hold the ports {port} to {candidate}; choose another with scripts/dashboard.py --port"
        )
    except (UserError, OSError) as error:
        print(f"warning: no dashboard: {error}", file=sys.stderr)
        return None


def _start(port: int, wait: float) -> None:
    """Start a server in a session of its own, so that Ctrl-C in the training terminal does not reach it."""
    installed_visdom()
    log = cache_dir() / f"server-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(Path(__file__).resolve().parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "gravitar_dqn", "dashboard", "--port", str(port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with suppress(OSError):  # it may have ended
        os.setpriority(os.PRIO_PROCESS, server.pid, 10)  # drawing must not take the processor from training
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        exited = server.poll() is not None
        if probe(port) == "visdom":  # ours, or that of another run which was quicker
            return
        if exited and probe(port) == "free":
            lines = log.read_text(errors="replace").splitlines()
            said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(said[-1] if said else f"its server stopped at once, see {log}")
        time.sleep(0.1)
    # Still fetching its browser files, then: the dashboard's thread waits for it, training does not.
    print(f"the dashboard's server is still being prepared (log: {log})", file=sys.stderr)


def serve(port: int = DEFAULT_PORT) -> None:
    """Run a Visdom server on 127.0.0.1 until it is stopped by Ctrl-C or SIGTERM; one that is ours may run already."""
    state = probe(port)
    if state == "visdom" and is_ours(port):
        print(
            f"the dashboard's server runs already, at http://{HOST}:{port} "
            f"(scripts/dashboard.py --port {port} --stop stops it)"
        )
        return
    if state != "free":
        raise UserError(
            f"port {port} is taken; choose another --port, or stop what holds it "
            f"(if training started it: scripts/dashboard.py --port {port} --stop)"
        )
    static = browser_files()
    try:
        application = _application(port, static)
    except Exception as error:  # a broken or unsuitable installation; its import may raise anything
        raise UserError(f"visdom does not start here: {type(error).__name__}: {error}") from error
    import tornado.httpserver
    import tornado.ioloop
    import tornado.netutil

    try:
        sockets = tornado.netutil.bind_sockets(port, address=HOST, family=socket.AF_INET)
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); choose another --port") from None
    with _pid_file(port):
        server = tornado.httpserver.HTTPServer(application, max_buffer_size=2**28)
        server.add_sockets(sockets)
        loop = tornado.ioloop.IOLoop.current()
        signal.signal(signal.SIGTERM, lambda *_: loop.add_callback_from_signal(loop.stop))
        print(f"Visdom server at http://{HOST}:{port} (Ctrl-C stops it)", flush=True)
        try:
            loop.start()
        finally:
            server.stop()  # the port is free before the lock is


class WithoutTorch(importlib.abc.MetaPathFinder):
    """Makes `import torch` fail: Visdom would load it for nothing, which takes a second and 200 MB.

    None in `sys.modules` would do so too, but scipy 1.18, which Visdom loads, takes that for torch itself. What
    asks `importlib.util.find_spec` for torch gets this error too, not None.
    """

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch":
            raise ModuleNotFoundError("the dashboard's server does without torch", name=fullname)


def _application(port: int, static: Path) -> tornado.web.Application:
    """Visdom's server with our files, and without what only its developers need."""
    sys.meta_path.insert(0, WithoutTorch())
    import tornado.websocket
    from visdom.server import app as visdom
    from visdom.server.handlers import socket_handlers

    from gravitar_dqn.dashboard import visdom_app

    # Visdom switches on tornado's debug mode: this keeps it from restarting at an upgrade and from showing tracebacks.
    visdom.tornado_settings.update(
        static_path=str(static),
        template_path=str(static),
        autoreload=False,
        serve_traceback=False,
        static_hash_cache=True,
    )
    # Visdom lets any web page that is open in the browser talk to it; tornado's own rule is "same origin only".
    for handler in (socket_handlers.SocketHandler, socket_handlers.VisSocketHandler):
        setattr(handler, "check_origin", tornado.websocket.WebSocketHandler.check_origin)  # noqa: B010
    # Visdom 0.2.4 fails to show a page where the user has no name, in a container say.
    os.environ.setdefault("LOGNAME", "nobody")
    environments = str(cache_dir() / "environments") + os.sep
    application: tornado.web.Application = visdom.Application(port=port, env_path=environments)  # type: ignore[no-untyped-call]
    application.settings["debug"] = False
    visdom_app.install(application, OURS)
    # A page that asks for what is not there, or a client that hangs up, is no news in this terminal.
    logging.disable(logging.ERROR)
    return application


@contextmanager
def _pid_file(port: int) -> Iterator[None]:
    """Hold a locked file with our process id while we serve. The lock ends with the process: it cannot be stale."""
    path = cache_dir() / f"server-{port}.pid"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def stop_server(port: int = DEFAULT_PORT, timeout: float = 5.0) -> bool:
    """Stop the server that this package runs on the port; False when there is none."""
    with suppress(FileNotFoundError), (cache_dir() / f"server-{port}.pid").open() as file:
        pid = _locked_by(file)
        if pid is None:
            return False
        deadline = time.monotonic() + timeout
        os.kill(pid, signal.SIGTERM)
        while _locked_by(file) == pid:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)  # a stopped process gets no SIGTERM
            time.sleep(0.05)
        return True
    return False


def is_ours(port: int) -> bool:
    """Whether the server on the port is one of this package."""
    with suppress(OSError), (cache_dir() / f"server-{port}.pid").open() as file:
        return _locked_by(file) is not None
    return False


def _locked_by(file: IO[str]) -> int | None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return int(file.read() or 0) or None
    fcntl.flock(file, fcntl.LOCK_UN)
    return None

"""Visdom's browser files and server: with and without npm, internet, a free port and Visdom itself."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import injected
from visdom_helpers import ROOT, Server, environ, free_port, pretend_prepared, wait_until

from gravitar_dqn.cli import commands
from gravitar_dqn.dashboard import visdom_files, visdom_server
from gravitar_dqn.dashboard.visdom_files import browser_files, prepared_files
from gravitar_dqn.dashboard.visdom_server import find_or_start_server, probe, stop_server
from gravitar_dqn.errors import UserError


def dashboard(words: list[str]) -> int:
    """`dashboard.py` with these arguments, in this process; its exit code."""
    return commands.run(commands.dashboard_command, words, "dashboard.py")


# Stands in for npm: packs every package it is asked for with one file, dist/a.js.
FAKE_NPM = """\
#!{python}
import io, pathlib, sys, tarfile, time
folder = pathlib.Path(sys.argv[sys.argv.index("--pack-destination") + 1])
time.sleep({seconds})
for spec in sys.argv:
    name, at, version = spec.rpartition("@")
    if at:
        with tarfile.open(folder / (name + "-" + version + ".tgz"), "w:gz") as archive:
            member = tarfile.TarInfo("package/dist/a.js")
            member.size = len({data!r})
            archive.addfile(member, io.BytesIO({data!r}))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in which nothing is prepared yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if prepared_files() is not None:
        pytest.skip("visdom has its browser files in its own package here")
    return tmp_path / "cache" / "gravitar_dqn"


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A free port, with a cache in which servers can start at once; they are stopped at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pretend_prepared(tmp_path / "cache")
    port = free_port()
    yield port
    for near in range(port, port + 10):
        stop_server(near)


def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes = b"good", seconds: float = 0) -> None:
    """Make npm a script of ours that returns `data`, where the file that was tested is b"good"."""
    version = visdom_files.installed_visdom()[1]
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir(exist_ok=True)
    npm.write_text(FAKE_NPM.format(python=sys.executable, seconds=seconds, data=data))
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))
    digest = hashlib.sha256(b"good").hexdigest()
    assets = tmp_path / "assets.csv"
    assets.write_text(
        "visdom,npm_package,version,member_of_package,destination_under_static,sha256\n"
        f"{version},one,1.0,dist/a.js,js/one.js,{digest}\n{version},two,2.0,dist/a.js,css/deep/two.css,{digest}\n"
    )
    monkeypatch.setattr(visdom_files, "ASSETS", assets)


def test_the_module_is_light() -> None:
    code = "import sys; from gravitar_dqn.dashboard import thread, visdom_server; print([m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "visdom", "tornado", "numpy"} & set(eval(loaded))


# Browser files.


def test_files_from_npm_are_laid_out_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path, monkeypatch)
    static = browser_files()
    assert static.parent == cache
    assert (static / "js/one.js").read_bytes() == (static / "css/deep/two.css").read_bytes() == b"good"
    assert (static / "index.html").is_file()
    assert (static / "version.built").read_text() == visdom_files.installed_visdom()[1]
    assert list(cache.iterdir()) == [static]
    monkeypatch.setenv("PATH", "")  # not asked again
    assert browser_files() == prepared_files() == static


def test_a_file_that_was_not_tested_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_npm(tmp_path, monkeypatch, data=b"evil")
    assert dashboard(["--prepare"]) != 0
    said = capsys.readouterr().err
    assert said.startswith("error: dist/a.js of one@1.0 is not the file that was tested (its sha256 differs): refused")
    assert said.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_without_npm_visdom_downloads_into_the_same_place(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", "")

    def download(root: Path) -> None:
        for name in ("js/one.js", "css/deep/two.css"):
            (root / "static" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "static" / name).write_bytes(b"from elsewhere")

    monkeypatch.setattr(visdom_files, "_fill_by_visdom", download)
    assert (browser_files() / "js/one.js").read_bytes() == b"from elsewhere"


def test_no_npm_and_no_internet_is_one_clear_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_npm(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(
        visdom_files, "_fill_by_visdom", lambda root: visdom_files._run([sys.executable, "-c", "1/0"], root)
    )
    assert dashboard(["--prepare"]) == 2
    said = capsys.readouterr().err
    assert "npm is not installed; visdom's own download failed" in said
    assert said.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_a_download_that_hangs_is_given_up_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visdom_files, "FETCH_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        visdom_files._run(["sh", "-c", "sleep 77 & echo $! > child; wait"], tmp_path)
    assert time.monotonic() - started < 5
    child = int((tmp_path / "child").read_text())
    wait_until(
        lambda: not Path(f"/proc/{child}").exists() or b"Z" in Path(f"/proc/{child}/stat").read_bytes().split()[2:3]
    )


def test_a_killed_preparation_leaves_nothing_half(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path, monkeypatch, seconds=60)
    command = [sys.executable, "-m", "gravitar_dqn", "dashboard", "--prepare"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: cache.is_dir() and list(cache.glob("preparing-*/packed")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert prepared_files() is None
    fake_npm(tmp_path, monkeypatch)
    assert browser_files() == prepared_files()


def test_the_listed_files_belong_to_known_versions() -> None:
    rows = visdom_files.ASSETS.read_text().splitlines()
    assert rows[0] == "visdom,npm_package,version,member_of_package,destination_under_static,sha256"
    assert {row.split(",")[0] for row in rows[1:]} == {"0.2.4", "0.3.0"}
    assert all(len(row.split(",")[-1]) == 64 and ".." not in row and "://" not in row for row in rows[1:])


# Ports and servers.


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--port", "abc"], "abc"),
        (["--port", "0"], "--port is 0: it must be finite and between 1 and 65535"),
        (["--port", "65536"], "65536"),
        (["x"], "x"),
    ],
)
def test_a_bad_argument_is_one_line(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard(argv) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_taken_port_is_named_with_what_would_do(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        command = [sys.executable, "scripts/dashboard.py", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: port {port} is taken; choose another --port, or stop what holds it "
        f"(if training started it: scripts/dashboard.py --port {port} --stop)\n"
    )


def test_a_server_is_started_once_shared_and_stopped(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_or_start_server(port) == f"http://127.0.0.1:{port}"
    pid = int((visdom_files.cache_dir() / f"server-{port}.pid").read_text())
    assert os.getsid(pid) != os.getsid(0)  # Ctrl-C in this terminal does not reach it
    started = time.monotonic()
    assert find_or_start_server(port) == f"http://127.0.0.1:{port}"
    assert time.monotonic() - started < 1
    assert stop_server(port)
    assert probe(port) == "free"
    assert not stop_server(port)
    assert dashboard(["--port", str(port), "--stop"]) == 0
    assert capsys.readouterr().out == f"there is no server of this package on port {port}\n"


@pytest.mark.faults
def test_a_hung_server_is_passed_over_and_can_be_stopped(port: int) -> None:
    injected("Visdom hanging")
    assert find_or_start_server(port) == f"http://127.0.0.1:{port}"
    os.kill(int((visdom_files.cache_dir() / f"server-{port}.pid").read_text()), signal.SIGSTOP)
    started = time.monotonic()
    assert find_or_start_server(port) == f"http://127.0.0.1:{port + 1}"
    assert time.monotonic() - started < 10
    assert stop_server(port, timeout=0.2)
    assert probe(port) == "free"


@pytest.mark.faults
def test_a_port_held_by_something_else_is_passed_over(port: int) -> None:
    injected("port taken")

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<title>something else</title>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert probe(port) == "taken"
        assert find_or_start_server(port) == f"http://127.0.0.1:{port + 1}"
        other.shutdown()


def test_no_port_left_is_one_warning(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(visdom_server, "probe", lambda port: "taken")
    assert find_or_start_server(port) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: no dashboard: other programs hold the ports {port} to {port + 9}; ")
    assert said.count("\n") == 1


def test_without_visdom_there_is_one_warning(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_or_start_server(port) is None
    assert (
        capsys.readouterr().err
        == "warning: no dashboard: visdom is not installed; install it with this package's dependencies\n"
    )
    with pytest.raises(UserError):
        browser_files()


def test_a_server_that_cannot_start_says_why(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The real list of files, an npm that fails, and a visdom whose own download fails too.
    broken = tmp_path / "broken" / "visdom"
    (broken / "static").mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('no internet')")
    version = visdom_files.installed_visdom()[1]
    (broken.parent / f"visdom-{version}.dist-info").mkdir()
    (broken.parent / f"visdom-{version}.dist-info" / "METADATA").write_text(f"Name: visdom\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", f"{broken.parent}{os.pathsep}{ROOT}")
    monkeypatch.setenv("PATH", str(tmp_path))
    started = time.monotonic()
    assert find_or_start_server(free_port()) is None
    assert time.monotonic() - started < 10
    said = capsys.readouterr().err
    assert said.startswith(
        f"warning: no dashboard: the browser files of visdom {version} could not be fetched (npm is not "
    )
    assert said.count("\n") == 1


def test_the_front_page_is_visdoms_and_says_whose_server_it_is(server: Server) -> None:
    with urllib.request.urlopen(server.url, timeout=5) as page:
        assert page.headers["Server"] == visdom_server.OURS
        assert b"<title>visdom</title>" in page.read()


def test_pages_are_shown_to_a_user_without_a_name(tmp_path: Path, port: int) -> None:
    nameless = textwrap.dedent(
        """
        import pwd
        from gravitar_dqn.dashboard.visdom_server import serve

        def getpwuid(uid):
            raise KeyError(uid)

        pwd.getpwuid = getpwuid
        """
    )
    env = environ(tmp_path / "cache")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        env.pop(name, None)
    command = [sys.executable, "-c", f"{nameless}\nserve({port})"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: probe(port) == "visdom", 30)
            for path in ("", "env/main"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as page:
                    assert page.status == 200
        finally:
            process.terminate()


# What the server lets others do.


@pytest.mark.parametrize(("origin", "status"), [("http://127.0.0.1:{}", 101), ("http://elsewhere.example", 403)])
def test_only_its_own_page_may_open_a_websocket(server: Server, origin: str, status: int) -> None:
    request = f"""\
        GET /socket HTTP/1.1
        Host: 127.0.0.1:{server.port}
        Origin: {origin.format(server.port)}
        Connection: Upgrade
        Upgrade: websocket
        Sec-WebSocket-Version: 13
        Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==

        """
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        connection.sendall(textwrap.dedent(request).replace("\n", "\r\n").encode())
        assert connection.recv(1000).startswith(f"HTTP/1.1 {status} ".encode())


def test_it_listens_on_this_machine_only_and_shows_no_tracebacks(server: Server) -> None:
    if sys.platform == "linux":  # where all of 127.* is this machine
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", server.port), 5)
    answer = server.post("events", {"data": 5})
    assert "Traceback" not in json.dumps(answer)


def test_foreground_prints_its_address_and_ends_at_ctrl_c(tmp_path: Path, port: int) -> None:
    command = [sys.executable, "scripts/dashboard.py", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"Visdom server at http://127.0.0.1:{port} (Ctrl-C stops it)\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program on this machine
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),  # a name that was made to lead here
    ],
)
def test_other_web_pages_can_neither_draw_nor_read(server: Server, headers: dict[str, str], status: int) -> None:
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    for method, path in (("GET", "/"), ("POST", "/env_state"), ("GET", "/env/main")):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request(method, path, "{}" if method == "POST" else None, headers)
        assert connection.getresponse().status == status, (method, path)
        connection.close()

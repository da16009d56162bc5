"""Visdom's browser files, fetched once, checked and kept, so that its server needs no internet.

At its first start Visdom downloads some 25 browser files (jQuery, Plotly, ...) into its own package, and breaks where
it cannot. Here they come from npm, are checked against the hashes in `visdom_assets.csv`, and live in a cache folder.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gravitar_dqn.errors import UserError

ASSETS = Path(__file__).with_name("visdom_assets.csv")
FETCH_SECONDS = 60.0  # longest wait for each of the two ways to fetch browser files


def cache_dir() -> Path:
    """Where browser files, saved environments, logs and pid files live."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "gravitar_dqn"


def browser_files() -> Path:
    """The folder of static files for the installed Visdom; fetched on the first call, at once on every later one."""
    if (prepared := prepared_files()) is not None:
        return prepared
    package, version = installed_visdom()
    target = cache_dir() / f"visdom-{version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob("preparing-*"):  # by a preparation that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="preparing-", dir=target.parent) as scratch:
        root = Path(scratch)
        shutil.copytree(package / "static", root / "static", ignore=shutil.ignore_patterns("*.map"))
        _fill(root, version)
        page = root / "static" / "index.html"  # asks for an icon that Visdom does not have
        page.write_text(page.read_text().replace('href="favicon.png"', 'href="data:,"'))
        (root / "static" / "version.built").write_text(version)
        try:
            # One rename, so that whoever looks finds all of the files or none, also when two prepare at once.
            (root / "static").rename(target)
        except OSError:
            if not (target / "version.built").exists():
                raise
    return target


def prepared_files() -> Path | None:
    """The folder of static files if nothing has to be fetched: ours, or Visdom's own where it once downloaded them."""
    package, version = installed_visdom()
    for static in (cache_dir() / f"visdom-{version}", package / "static"):
        with suppress(OSError):
            if (static / "version.built").read_text().strip() == version:
                return static
    return None


def installed_visdom() -> tuple[Path, str]:
    # Found without importing it: Visdom's import loads torch.
    spec = importlib.util.find_spec("visdom")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("visdom is not installed; install it with this package's dependencies")
    return Path(next(iter(spec.submodule_search_locations))), importlib.metadata.version("visdom")


def _fill(root: Path, version: str) -> None:
    """Put the browser files under root/static: from npm when they are known, else by Visdom's own download."""
    with ASSETS.open(newline="") as file:
        assets = [row for row in csv.DictReader(file) if row["visdom"] == version]
    reasons = []
    if assets:
        try:
            return _fill_from_npm(root, assets)
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(_reason("npm", error))
    try:
        _fill_by_visdom(root)
        missing = [row for row in assets if not (root / "static" / row["destination_under_static"]).is_file()]
        if not missing:
            return None
        reasons.append(f"visdom's own download left out {missing[0]['destination_under_static']}")
    except (OSError, subprocess.SubprocessError) as error:
        reasons.append(_reason("visdom's own download", error))
    raise UserError(
        f"the browser files of visdom {version} could not be fetched ({'; '.join(reasons)}); "
        "run scripts/dashboard.py --prepare once with internet access"
    )


def _reason(what: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{what} is not installed"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{what} took longer than {error.timeout:.0f} s"
    return f"{what} failed"


def _fill_from_npm(root: Path, assets: list[dict[str, str]]) -> None:
    """Fetch all packages in one npm call and lay out the members we need, each checked against its hash."""
    packed = root / "packed"
    packed.mkdir()
    specs = sorted({f"{row['npm_package']}@{row['version']}" for row in assets})
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--fetch-retries=1", "--fetch-retry-mintimeout=500"]
    _run([*command, "--pack-destination", str(packed), *specs], cwd=root)
    wanted = {
        (f"{row['npm_package']}-{row['version']}.tgz", f"package/{row['member_of_package']}"): row for row in assets
    }
    for name in sorted({name for name, _ in wanted}):
        with tarfile.open(packed / name) as archive:
            for member in archive:
                row = wanted.pop((name, member.name), None)
                if row is not None and (file := archive.extractfile(member)) is not None:
                    _lay_out(root / "static" / row["destination_under_static"], file.read(), row)
    if wanted:
        raise subprocess.SubprocessError(f"npm left out {next(iter(wanted))}")


def _lay_out(destination: Path, data: bytes, row: dict[str, str]) -> None:
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise UserError(
            f"{row['member_of_package']} of {row['npm_package']}@{row['version']} is not the file that was tested "
            "(its sha256 differs): refused; check where npm gets its packages"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.write_bytes(data)


def _fill_by_visdom(root: Path) -> None:
    code = "import sys; from visdom.server.build import download_scripts; download_scripts(install_dir=sys.argv[1])"
    output = _run([sys.executable, "-c", code, str(root)], cwd=root)
    if "while downloading" in output:  # it logs a failed file and goes on
        raise subprocess.SubprocessError(output)


def _run(command: list[str], cwd: Path) -> str:
    """Run a command with all of its children for at most FETCH_SECONDS; its output."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=FETCH_SECONDS)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return output.decode(errors="replace")

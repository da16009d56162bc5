#!/usr/bin/env bash
# Makes .venv with the versions pinned in scripts/constraints.txt. Run again it does nothing.
#
#   PYTHON=python3.12 ./scripts/bootstrap.sh    chooses another Python (3.11 or newer)
set -euo pipefail

say() { printf 'bootstrap: %s\n' "$*"; }
fail() { say "$2" >&2; exit "$1"; }
probe() {  # "3.11 /usr/bin/python3.11": the version, and the interpreter behind a virtual environment
    "$1" -c 'import sys
print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], getattr(sys, "_base_executable", sys.executable)))' 2>/dev/null
}

asked=${PYTHON:-}
case $asked in /* | "") ;; */*) asked=$PWD/$asked ;; esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Without PYTHON an existing .venv keeps its Python, so that plain reruns do not undo PYTHON=python3.12.
read -r have have_base <<<"$(probe .venv/bin/python)" || true
if [[ -z $asked && -n $have ]]; then
    version=$have python=$have_base
else
    asked=${asked:-python3}
    read -r version python <<<"$(probe "$asked")" || true
    [[ -n $version ]] || fail 2 "no Python found as '$asked'; install 3.11 or newer, or name one: PYTHON=python3.12 $0"
fi
if ((${version%.*} < 3 || (${version%.*} == 3 && ${version#*.} < 11))); then
    fail 2 "Python $version is too old (3.11 or newer is needed); name another: PYTHON=python3.12 $0"
fi

state=.venv/.bootstrap  # "installing ..." until everything is there, then "done ..."
key="$version $(cat pyproject.toml scripts/constraints.txt | cksum) $PWD"
old=$(cat "$state" 2>/dev/null || true)
if [[ $have == "$version" && $old == "done $key" ]]; then
    say ".venv is up to date (Python $version)"
    exit 0
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail 2 "Python $version has no venv module; install it (Debian, Ubuntu: apt-get install python$version-venv) or set PYTHON"

# An install that was cut short leaves packages that only look whole, and a moved .venv runs from its old place: start
# again. A finished .venv, or one made by hand, is only brought up to date.
trap 'say "interrupted; run it again" >&2; exit 130' INT TERM
if [[ $have != "$version" || $old == installing* || ($old == done* && $old != *" $PWD") ]]; then
    say "making .venv with Python $version"
    rm -rf .venv.old
    if [[ -e .venv || -L .venv ]]; then mv .venv .venv.old; fi  # deleting takes seconds: never leave half of one
    rm -rf .venv.old
    mkdir .venv
    echo "installing $key" >"$state"
    "$python" -m venv .venv
fi
echo "installing $key" >"$state"

say "installing the pinned packages; this takes a few minutes (details: .venv/bootstrap.log)"
# pip reads the one name or the other for the packages that a build needs, depending on its age. A relative path,
# because pip splits these variables at spaces.
export PIP_CONSTRAINT=scripts/constraints.txt PIP_BUILD_CONSTRAINT=scripts/constraints.txt
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PIP_TARGET PIP_PREFIX PYTHONPATH PYTHONHOME
(
    .venv/bin/python -m pip --version || .venv/bin/python -m ensurepip
    .venv/bin/python -m pip install -e '.[dev]'
) >.venv/bootstrap.log 2>&1 </dev/null || {
    tail -n 15 .venv/bootstrap.log >&2
    fail 1 "the packages could not be installed (all of pip's output: .venv/bootstrap.log); run it again to retry"
}
echo "done $key" >"$state"

say "preparing the dashboard's browser files"
.venv/bin/python scripts/dashboard.py --prepare </dev/null || say "training works all the same, without a dashboard"

say "done. Train:  .venv/bin/python scripts/train.py gravitar-ram      Test:  .venv/bin/python -m pytest -n auto"

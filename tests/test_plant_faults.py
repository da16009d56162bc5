"""The tool that plants faults: its table names tests for every module, and its faults reach a test's processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plant_faults
import pytest
from run_helpers import ROOT


def test_every_module_has_tests_and_every_entry_is_there() -> None:
    named = set(plant_faults.PPO_TESTS.split())
    for module in plant_faults.all_modules():
        named |= set(plant_faults.guards_of(module))
    assert [name for name in sorted(named) if not (ROOT / "tests" / f"test_{name}.py").exists()] == []
    entries = [*plant_faults.GUARDS, *plant_faults.CORE]
    assert [entry for entry in entries if not (plant_faults.PACKAGE / entry).exists()] == []


def test_faults_that_change_nothing_are_found_again() -> None:
    """The lines are in their modules; whether the change is one that the tool would plant, it says itself."""
    for module, before, _ in plant_faults.equivalent_faults():
        source = " ".join((plant_faults.PACKAGE / module).read_text().split())
        assert before in source, f"{module} has no line {before}"


@pytest.mark.parametrize(
    ("module", "before", "swaps"),
    [
        (
            "runtime/clock.py",
            "self._next = (now // self._period + 1) * self._period",
            [("//", "*"), ("+", "-"), ("1", "0"), ("1", "2"), (") *", ") /")],
        ),
        (
            "runtime/clock.py",
            "if self._period == 0 or now < self._next:",
            [("==", "!="), ("0", "1"), ("0", "-1"), ("or", "and"), ("<", "<=")],
        ),
        (
            "run/files.py",
            "file.seek(max(len(header), path.stat().st_size - tail))",
            [("max", "min"), ("- tail", "+ tail"), ("file.seek(max(len(header), path.stat().st_size - tail))", "pass")],
        ),
    ],
)
def test_the_faults_of_a_line(module: str, before: str, swaps: list[tuple[str, str]]) -> None:
    changed = {fault.after for fault in plant_faults.Planter(module).faults() if fault.before == before}
    assert changed == {before.replace(old, new) for old, new in swaps}


def test_a_process_imports_the_package_beside_these_tests() -> None:
    """No process but this test's own sees the fault that the next test plants."""
    code = "from gravitar_dqn.run import checkpoint; print(checkpoint.__file__, *checkpoint.READABLE)"
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(ROOT / "gravitar_dqn" / "run" / "checkpoint.py"), "2", "3"]


@pytest.mark.slow
def test_a_fault_is_noticed_in_a_process_and_not_judged_twice(tmp_path: Path) -> None:
    module = plant_faults.PACKAGE / "run" / "checkpoint.py"
    source = module.read_text()
    line = source.partition("READABLE = ")[0].count("\n") + 1
    out = tmp_path / "faults"
    tool = [sys.executable, plant_faults.__file__, "--modules", "run/checkpoint.py", "--lines", f"{line}-{line}"]
    tool += ["--tests", "plant_faults", "--out", str(out)]
    for _ in range(2):
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        faults = [json.loads(text) for text in out.read_text().splitlines()]
        assert [fault["noticed"] for fault in faults] == [True, True], told
        assert {fault["by"].partition("::")[2] for fault in faults} == {
            "test_a_process_imports_the_package_beside_these_tests"
        }
        assert "run/checkpoint.py                  2       2   100%" in told
    assert module.read_text() == source

"""Plants one fault at a time in the package and counts how many of them the tests notice.

    taskset -c 0 python tests/plant_faults.py --group core --sample 300 --seed 1 --part 1/2 --times times --out faults
    python tests/plant_faults.py --modules agents/dqn.py --lines 180-200 --list

A fault is one changed operator, comparison, constant, name, index, keyword or call. Its line is printed when all tests
pass in spite of it: then either the two lines mean the same, which tests/equivalent_faults.txt can say, or a test is
missing. The tests run in a copy of the tree that has the changed module, and this copy is first on the path of every
process that they start. Libraries are imported once; each fault has a fork of this process. Tests run fastest first, up
to the first that fails, and one that takes many times as long as without the fault has failed.

Why not mutmut: version 3 forks too, and its faults reach a test's processes. But (at 3.8) it changes only functions
without a decorator, where 79 % of our faults lie: no setting's default, no preset, nothing under `@torch.no_grad()`. It
runs no test for a function that none calls in pytest's own process. And its faults are others: None in place of each
argument, which nearly any test notices, but never the online network in place of the target network.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

import pytest
from filelock import FileLock

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "gravitar_dqn"
EQUIVALENT = TESTS / "equivalent_faults.txt"
COPIED = "gravitar_dqn scripts tests pyproject.toml README.md".split()
LIBRARIES = (
    "torch torch._dynamo torch.utils.data numpy gymnasium gymnasium.vector ale_py cv2 tyro tqdm line_profiler"
    " safetensors.torch filelock imageio_ffmpeg hypothesis.strategies hypothesis.extra.numpy matplotlib.pyplot"
).split()  # what the tests import besides the package

# The learning path: modules, and folders of them. The group `rest` is all else.
CORE = """losses.py replay.py encoders.py networks.py rnd.py loop.py training.py agents/ envs/ runtime/execution.py
    runtime/memory.py""".split()
PPO_TESTS = "actor_critic auxiliary_tasks ppo_oracle randal_faults ppo randal_trainer"
# The tests of each module, named by itself or by its folder; few files, as each is imported for every fault.
GUARDS = {
    "__init__.py": "player randal_trainer",
    "__main__.py": "dashboard_server",
    "agents/": PPO_TESTS,
    "agents/__init__.py": "new_agent dqn_oracle ppo_oracle",
    "agents/base.py": "dqn_oracle ppo_oracle dqn ppo new_agent resume",
    "agents/dqn.py": "dqn_oracle dqn execution resume",
    "agents/ppo.py": f"{PPO_TESTS} resume",
    "benchmark/": "benchmark",
    "benchmark/peers.py": "benchmark execution",
    "cli/": "cli config evaluation trained recording",
    "config.py": "config cli resume trained",
    "dashboard/": "dashboard dashboard_panes dashboard_compare dashboard_server",
    "dashboard/visdom_app.py": "dashboard_server visdom_server",
    "dashboard/visdom_files.py": "visdom_server",
    "dashboard/visdom_server.py": "visdom_server",
    "encoders.py": "networks execution actor_critic auxiliary_tasks rnd ppo dqn",
    "envs/": "envs evaluation dqn",
    "envs/ram.py": "envs networks dqn",
    "errors.py": "cli telemetry trained",
    "evaluation/": "evaluation player trained evaluator",
    "evaluation/acting.py": "evaluation dqn_oracle player trained",
    "evaluation/background.py": "evaluator recording",
    "evaluation/evaluator.py": "evaluator",
    "evaluation/overlay.py": "overlay recording",
    "evaluation/scores.py": "evaluation dqn_oracle",
    "evaluation/video.py": "recording",
    "loop.py": "loop dqn_oracle telemetry dqn ppo resume",
    "losses.py": "losses actor_critic dqn_oracle ppo_oracle replay auxiliary_tasks rnd randal_faults",
    "networks.py": "networks actor_critic dqn_oracle ppo_oracle rnd auxiliary_tasks execution ppo dqn",
    "presets.py": "config trained dqn_oracle ppo_oracle cli",
    "randal/": "randal_trainer randal_faults",
    "replay.py": "replay dqn_oracle auxiliary_tasks ppo dqn resume",
    "rnd.py": "dqn_oracle ppo_oracle rnd randal_faults ppo dqn",
    "run/": "runs checkpoint telemetry export",
    "run/checkpoint.py": "checkpoint evaluator resume faults",
    "run/csv_log.py": "telemetry resume faults",
    "run/folder.py": "runs config cli resume",
    "run/logs.py": "logs telemetry",
    "run/status.py": "runs dashboard_panes evaluator",
    "run/telemetry.py": "telemetry recording",
    "runtime/clock.py": "evaluator evaluation randal_trainer",
    "runtime/distributed.py": "distributed",
    "runtime/execution.py": "execution checkpoint dqn resume",
    "runtime/memory.py": "replay cli",
    "runtime/processes.py": "sweep evaluation visdom_server distributed",
    "tools/": "sweep",
    "tools/export.py": "export",
    "tools/plot.py": "plot",
    "training.py": "cli recording resume evaluator new_agent faults",
}

SWAPS = """Add + -, Sub - +, Mult * /, Div / *, Pow ** *, FloorDiv // *, Mod % //, BitAnd & |, BitOr | &, LShift << >>,
    RShift >> <<, And and or, Or or and, Lt < <=, LtE <= <, Gt > >=, GtE >= >, Eq == !=, NotEq != =="""
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    getattr(ast, name): (old, new) for name, old, new in (swap.split() for swap in SWAPS.split(","))
}
OPERATORS |= {
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
DROPPED_SIGNS: dict[type[ast.AST], str] = {ast.Not: "not ", ast.Invert: "~", ast.USub: "-"}
ALWAYS_THERE = (
    "min max minimum maximum mean sum any all argmax argmin zeros ones zeros_like ones_like floor ceil".split()
)
PAIRS = """min max, minimum maximum, mean sum, any all, argmax argmin, zeros ones, zeros_like ones_like, floor ceil,
    q_network target_network, predictor target, terminations truncations, terminated truncated, dones terminations,
    rewards int_rewards, obs next_obs, indices last_indices, values_ext values_int, returns_ext returns_int,
    advantages_ext advantages_int, new_log_probs old_log_probs, values returns, next_q next_q_online, q_values next_q,
    obs_rms reward_rms, optimizer rnd_optimizer, global_step episodes, gamma gae_lambda, num_envs num_steps, low high,
    actor critic, played valid, ages valid, row stale, stale ready, width height, time env, count total"""
SIBLINGS: dict[str, list[str]] = {}
for one, other in (pair.split() for pair in PAIRS.split(",")):
    SIBLINGS.setdefault(one, []).append(other)
    SIBLINGS.setdefault(other, []).append(one)
DROPPED_CALLS = set("detach clone abs sqrt square exp log clamp clamp_ tanh relu flip any contiguous item".split())
# On a CPU in fp32 these keywords change nothing, or only what a mistake of the caller would do.
WITHOUT_EFFECT = set("device non_blocking pin_memory strict fused capturable memory_format persistent changes".split())
COSMETIC = {"make_look", "describe_device", "__repr__"}  # functions
NOT_CODE = {"annotation", "returns", "decorator_list", "type_params"}  # fields of a node


@dataclass(frozen=True)
class Fault:
    """One change of one module."""

    module: str
    line: int
    before: str
    after: str
    source: bytes  # of the changed module

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What tells it from all others."""
        return self.module, self.line, self.before, self.after

    @property
    def text(self) -> tuple[str, str, str]:
        """What it is found by again after edits of the file."""
        return self.module, self.before, self.after


class Planter:
    """Finds the faults that can be planted in one module. Positions are bytes, as in `ast`."""

    def __init__(self, module: str) -> None:
        self.module, self.source = module, (PACKAGE / module).read_bytes()
        self.tree = ast.parse(self.source)
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.attributes = {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}

    def faults(self) -> list[Fault]:
        """All, each text once, in the order of the lines."""
        found = {self._fault(*edit) for edit in self._edits(self.tree, set())}
        return sorted(found, key=lambda fault: (fault.line, fault.before, fault.after, fault.source))

    def _fault(self, start: int, end: int, new: str) -> Fault:
        changed = self.source[:start] + new.encode() + self.source[end:]
        line = self.source.count(b"\n", 0, start) + 1
        tail = self.source.index(b"\n", end)
        before, after = self.source[self.starts[line - 1] : tail], changed[self.starts[line - 1] : tail + len(changed)]
        after = after[: len(before) + len(changed) - len(self.source)]
        before, after = (b" ".join(text.split()) for text in (before, after))
        return Fault(self.module, line, before.decode(), after.decode(), changed)

    def _span(self, node: Any) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        return self.source[slice(*self._span(node))].decode()

    def _edits(self, node: ast.AST, names: set[str]) -> Iterator[tuple[int, int, str]]:
        """Edits (start, end, new text) of the node and below; `names` are those in the function around it."""
        if self._is_skipped(node):
            return
        if isinstance(node, ast.FunctionDef):
            inside = list(ast.walk(node))
            names = {item.id for item in inside if isinstance(item, ast.Name)}
            names |= {item.arg for item in inside if isinstance(item, ast.arg)}
        yield from self._own_edits(node, names)
        for field, value in ast.iter_fields(node):
            if field not in NOT_CODE:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._edits(child, names)

    def _is_skipped(self, node: ast.AST) -> bool:
        match node:
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                return True
            case ast.FunctionDef(name=name):
                return name in COSMETIC
            case ast.Assign(targets=[ast.Name(id=name)]):
                return name == "__all__"
            case ast.Call():  # messages
                return self._text(node.func).startswith(("log.", "warnings.", "self.messages.", "UserError"))
            case ast.keyword(arg=name):
                return name in WITHOUT_EFFECT or name == "dim"  # see below
        return False

    def _own_edits(self, node: ast.AST, names: set[str]) -> Iterator[tuple[int, int, str]]:
        match node:
            case ast.BinOp(left=left, op=op, right=right) | ast.AugAssign(target=left, op=op, value=right):
                if not any(isinstance(side, ast.JoinedStr) or is_text(side) for side in (left, right)):
                    yield from self._swapped_operators([left, right], [op])
                if isinstance(node, ast.AugAssign) and isinstance(left, ast.Attribute):
                    yield *self._span(node), "pass"
            case ast.Compare(left=left, ops=ops, comparators=others):
                yield from self._swapped_operators([left, *others], ops)
            case ast.BoolOp(op=op, values=values):
                yield from self._swapped_operators(values, [op] * (len(values) - 1))
            case ast.UnaryOp(op=op) if type(op) in DROPPED_SIGNS:
                start, _ = self._span(node)
                yield start, start + len(DROPPED_SIGNS[type(op)]), ""
            case ast.Constant(value=bool(value)):
                yield *self._span(node), str(not value)
            case ast.Constant(value=int(value)):
                yield *self._span(node), str(value + 1)
                yield *self._span(node), str(value - 1)
            case ast.Constant(value=float(value)):  # an epsilon so much that it shows
                yield *self._span(node), str(value * (1000 if value < 1e-3 else 2) if value else 1.0)
            case ast.Slice(lower=None, upper=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(n))), step=None):
                yield *self._span(node), f"{n}:"
            case ast.Slice(lower=ast.Constant(value=int(n)), upper=None, step=None):
                yield *self._span(node), f":-{n}"
            case ast.Name(id=name, ctx=ast.Load()):
                for sibling in SIBLINGS.get(name, []):
                    if sibling in names or {"min", "max"} == {name, sibling}:
                        yield *self._span(node), sibling
            case ast.Attribute(attr=name, ctx=ast.Load()):
                _, end = self._span(node)
                for sibling in SIBLINGS.get(name, []):
                    if sibling in self.attributes or sibling in ALWAYS_THERE:
                        yield end - len(name), end, sibling
            case ast.Expr(value=ast.Call()) if not self._is_skipped(node.value):
                yield *self._span(node), "pass"
            case ast.Call():
                yield from self._simpler_calls(node)
            case ast.If(test=test) | ast.IfExp(test=test) if isinstance(test, (ast.Name, ast.Attribute)):
                yield *self._span(test), f"not {self._text(test)}"
            case ast.With(items=[ast.withitem(context_expr=context)]) if self._text(context) == "torch.no_grad()":
                yield self._span(node)[0], self._span(context)[1], "if True"
            case ast.FunctionDef(decorator_list=decorators):
                for decorator in decorators:
                    if self._text(decorator) == "torch.no_grad()":
                        (start, end), (head, _) = self._span(decorator), self._span(node)
                        yield start - 1, head, self.source[end:head].decode().lstrip()

    def _swapped_operators(self, values: Sequence[ast.AST], ops: Sequence[ast.AST]) -> Iterator[tuple[int, int, str]]:
        for left, op, right in zip(values, ops, values[1:], strict=False):
            if type(op) in OPERATORS:
                old, new = OPERATORS[type(op)]
                place = self.source.index(old.encode(), self._span(left)[1], self._span(right)[0])
                yield place, place + len(old), new

    def _simpler_calls(self, node: ast.Call) -> Iterator[tuple[int, int, str]]:
        """A method that is not called, a copy that is not made, a keyword left out."""
        end = self._span(node)[1]
        if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_CALLS:
            yield self.source.rindex(b".", 0, self._span(node.func)[1]), end, ""
        if self._text(node.func) == "copy.deepcopy":
            yield *self._span(node), self._text(node.args[0])
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in WITHOUT_EFFECT:
                start, stop = self._span(keyword)
                if keyword.arg == "dim" and isinstance(keyword.value, ast.Constant):  # another that exists
                    yield *self._span(keyword.value), "0" if keyword.value.value else "1"
                head = self.source[:start].rstrip()
                tail = self.source[stop:].lstrip()
                if head.endswith(b","):
                    yield len(head) - 1, stop, ""
                else:
                    yield start, len(self.source) - len(tail.removeprefix(b",").lstrip()), ""


def is_text(node: ast.AST) -> bool:
    """Whether the node is a string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def equivalent_faults() -> set[tuple[str, str, str]]:
    """(module, line, changed line) of the faults that change nothing."""
    blocks = [block.splitlines() for block in EQUIVALENT.read_text().strip().split("\n\n")]
    return {(block[0], block[1][2:], block[2][2:]) for block in blocks if not block[0].startswith("#")}


def all_modules() -> list[str]:
    """Of the package, but those that are only a docstring."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if len(ast.parse(path.read_bytes()).body) > 1]
    return [path.relative_to(PACKAGE).as_posix() for path in paths]


def guards_of(module: str) -> list[str]:
    """The names of the test files that guard the module."""
    return (GUARDS.get(module) or GUARDS[module.rpartition("/")[0] + "/"]).split()


def is_core(module: str) -> bool:
    """Whether the module is on the learning path."""
    return any(module == entry or (entry.endswith("/") and module.startswith(entry)) for entry in CORE)


class Order:
    """Pytest plugin: the fastest tests first, none that takes longer than `longest`, each with a time limit.

    Args:
        seconds: of computing, its processes' included, that each test took without a fault; a test that is not in it
            is left out. None: measure them.
        longest: of them.
        running: the file that names the test that runs.
    """

    def __init__(self, seconds: dict[str, float] | None, longest: float, running: Path) -> None:
        self.known, self.longest, self.running = seconds, longest, running
        self.measured: dict[str, float] = {}

    def pytest_collection(self) -> None:
        """The examples of Hypothesis are the same every time; after conftest.py, before any test is imported."""
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)  # none is made smaller
        settings.register_profile("faults", derandomize=True, database=None, deadline=None, phases=phases)
        settings.load_profile("faults")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort and leave out."""
        if (known := self.known) is not None:
            items[:] = [item for item in items if item.nodeid in known and known[item.nodeid] <= self.longest]
            items.sort(key=lambda item: known[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Time one test; one that fails has no time."""
        started, failures = sum(os.times()[:4]), item.session.testsfailed
        self.running.write_text(item.nodeid)
        limit_time(300.0 if self.known is None else self.known[item.nodeid])
        result = yield
        if item.session.testsfailed == failures:
            self.measured[item.nodeid] = round(sum(os.times()[:4]) - started, 2)
        return result


def limit_time(seconds: float) -> None:
    """End this process once it has computed for 4 times as long and 10 s, or has waited for a multiple of that."""
    signal.setitimer(signal.ITIMER_PROF, 4 * seconds + 10)
    signal.setitimer(signal.ITIMER_REAL, 12 * seconds + 60)  # the machine may be busy


class Tree:
    """A copy of the tree, in which the tests run. Two of them do not meet: each has its own temporary files and cache.

    Bytecode is checked by the hash of its source: modules change faster than a clock's tick.
    """

    def __init__(self, home: Path) -> None:
        self.root, self.temporary, self.running, self.log = (home / name for name in ("tree", "t", "running", "log"))
        for name in COPIED:
            copy = shutil.copytree if (TESTS.parent / name).is_dir() else shutil.copy
            self.root.mkdir(exist_ok=True)
            copy(TESTS.parent / name, self.root / name)
        compileall.compile_dir(self.root, quiet=1, force=True, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        sys.path[:] = [str(self.root), *(path for path in sys.path if Path(path).resolve() != TESTS)]
        tempfile.tempdir = str(self.temporary)
        os.environ |= {
            "PYTHONPATH": str(self.root),
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis"),
            "OMP_NUM_THREADS": "1",  # threads do not survive a fork
        }
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what tests leave behind comes here
        for library in LIBRARIES:
            importlib.import_module(library)
        importlib.import_module("torch").set_num_threads(1)
        gc.freeze()

    def measure(self, name: str) -> dict[str, float]:
        """How long each test of this file takes without a fault. Those that fail are left out, and named."""
        if self._run([name], None, float("inf")) != 0:
            print(f"warning: some tests fail without a fault, and are left out\n{self.log.read_text()[-3000:]}")
        return json.loads(self.log.with_suffix(".json").read_text())

    def judge(self, fault: Fault, names: Sequence[str], seconds: dict[str, float], longest: float) -> dict[str, Any]:
        """Whether these tests notice the fault, and which does."""
        place, began = self.root / "gravitar_dqn" / fault.module, time.monotonic()
        original = place.read_bytes()
        place.write_bytes(fault.source)
        self.running.write_text("import")
        try:
            code = self._run(names, seconds, longest)
        finally:
            place.write_bytes(original)
        noticed = code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        by = self.running.read_text() + (f" (exit code {code})" if code != 1 else "") if noticed else ""
        found = {"module": fault.module, "line": fault.line, "before": fault.before, "after": fault.after}
        return found | {"noticed": noticed, "seconds": round(time.monotonic() - began, 1), "by": by}

    def check(self, module: str, names: Sequence[str], seconds: dict[str, float], longest: float) -> None:
        """Exit if these tests notice a change that is none."""
        unchanged = Fault(module, 0, "", "", (PACKAGE / module).read_bytes())
        if by := self.judge(unchanged, names, seconds, longest)["by"]:
            sys.exit(f"without a fault in {module}, {by} fails\n{self.log.read_text()[-3000:]}")

    def _run(self, names: Sequence[str], seconds: dict[str, float] | None, longest: float) -> int:
        """Exit code of pytest in a fork of this process; 0 when all tests pass."""
        self.temporary.mkdir(exist_ok=True)
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                os.setpgid(0, 0)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                limit_time(60 if seconds is None else 5)  # to find the tests
                sys.dont_write_bytecode = seconds is not None  # pytest keeps the tests' own from the first run
                os.chdir(self.root)
                output = os.open(self.log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(output, 1)
                os.dup2(output, 2)
                words = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.temporary / 'tests'}"]
                words += [f"tests/test_{name}.py" for name in names] + ([] if seconds is None else ["-x"])
                code = int(pytest.main(words, plugins=[order := Order(seconds, longest, self.running)]))
                if seconds is None:
                    self.log.with_suffix(".json").write_text(json.dumps(order.measured))
            finally:
                os._exit(code)
        try:
            while (ended := os.waitpid(-1, 0))[0] != pid:
                pass  # what a test left, and that has ended
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            end_children()
            shutil.rmtree(self.temporary, ignore_errors=True)
        code = os.waitstatus_to_exitcode(ended[1])
        if code == pytest.ExitCode.USAGE_ERROR:
            sys.exit(self.log.read_text())
        return code


def end_children() -> None:
    """Kill this process's children, and theirs, which then are this one's."""
    while True:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def measured(tree: Tree, names: list[str], path: Path) -> dict[str, float]:
    """Seconds of each test by the file `path`, to which those of test files that it does not have are added."""

    def kept() -> dict[str, float]:
        return json.loads(path.read_text()) if path.exists() else {}

    for name in names:
        if not any(test.startswith(f"tests/test_{name}.py::") for test in kept()):
            found = tree.measure(name)
            with FileLock(f"{path}.lock"):  # another part adds to it too
                path.with_suffix(".new").write_text(json.dumps(kept() | found))
                path.with_suffix(".new").replace(path)
    return kept()


def judged(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The faults of the file, by their module, line, and texts."""
    found = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {tuple(fault[name] for name in ("module", "line", "before", "after")): fault for fault in found}


def draw(modules: list[str], options: argparse.Namespace) -> list[Fault]:
    """The faults to plant, none twice and none that changes nothing."""
    faults = [fault for module in modules for fault in Planter(module).faults()]
    known = equivalent_faults()
    if not options.lines:
        for module, before, after in sorted(known - {fault.text for fault in faults}):
            if module in modules:
                print(f"warning: {EQUIVALENT.name} has a block that is no fault\n{module}\n- {before}\n+ {after}")
    faults = [fault for fault in faults if fault.text not in known]
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        faults = [fault for fault in faults if first <= fault.line <= last]
    if options.sample or options.minutes < float("inf"):
        random.Random(options.seed).shuffle(faults)
    faults = faults[: options.sample]
    for fault in faults:
        ast.parse(fault.source)  # one that Python cannot read would be noticed without a test
    return faults


def report(found: list[dict[str, Any]], modules: list[str]) -> None:
    """The table of all that was judged."""
    planted = Counter(fault["module"] for fault in found)
    noticed = Counter(fault["module"] for fault in found if fault["noticed"])
    print(f"\n{'module':28}{'planted':>8}{'noticed':>8}{'share':>7}")
    for module in [module for module in modules if planted[module]]:
        print(f"{module:28}{planted[module]:8}{noticed[module]:8}{noticed[module] / planted[module]:7.0%}")
    total = max(planted.total(), 1)
    print(f"{'total':28}{planted.total():8}{noticed.total():8}{noticed.total() / total:7.0%}")
    print(f"{sum(fault['seconds'] for fault in found) / total:.1f} s for each fault")


def main() -> None:
    """The command."""
    every = all_modules()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=["core", "rest"], help="the learning path, or all else; default: both")
    parser.add_argument("--modules", nargs="+", metavar="NAME", choices=every, help="only these")
    parser.add_argument("--lines", metavar="A-B", help="only faults in these lines")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th of them, from the I-th on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, in random order")
    parser.add_argument("--longest", type=float, default=float("inf"), help="leave out tests that compute for longer")
    parser.add_argument("--tests", nargs="+", metavar="NAME", help="the test files to run, not the table's")
    parser.add_argument("--times", type=Path, help="keep in this file how long each test takes; parts can share it")
    parser.add_argument("--out", type=Path, help="add a line of JSON for each fault; those already in it are done")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    options = parser.parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # not before the tests' processes are

    modules = options.modules or [m for m in every if options.group is None or is_core(m) == (options.group == "core")]
    faults = draw(modules, options)
    if options.list:
        for fault in faults:
            print(f"{fault.module}:{fault.line}\n  - {fault.before}\n  + {fault.after}")
        print(f"{len(faults)} faults")
        return

    with tempfile.TemporaryDirectory(prefix="plant_") as folder:
        tree, checked = Tree(Path(folder)), False
        times, out = options.times or Path(folder) / "times", options.out or Path(folder) / "out"
        part, parts = map(int, options.part.split("/"))
        for fault in faults[part - 1 :: parts]:
            if time.monotonic() - started > 60 * options.minutes:
                break
            if fault.key in judged(out):
                continue
            names = options.tests or guards_of(fault.module)
            seconds = measured(tree, names, times)
            if not checked:
                tree.check(fault.module, names, seconds, options.longest)
                checked = True
            found = tree.judge(fault, names, seconds, options.longest)
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            if not found["noticed"]:
                print(f"\n{fault.module}:{fault.line}\n  - {fault.before}\n  + {fault.after}", flush=True)
        done = judged(out)
        report([done[fault.key] for fault in faults if fault.key in done], modules)


if __name__ == "__main__":
    main()

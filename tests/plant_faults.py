"""Plants one fault at a time in the modules of the learning path and counts how many of them the tests notice.

    taskset -c 1 python tests/plant_faults.py --modules functional.py rnd.py --sample 100 --seed 1 --minutes 20
    python tests/plant_faults.py --modules agents/dqn.py --lines 180-200 --list

A fault is one changed operator, comparison, constant, name, index, keyword or call. Its line is printed when all tests
pass in spite of it: then either the two lines mean the same, which tests/equivalent_faults.txt can say, or a test is
missing. mutmut and cosmic-ray do the same, but start a new interpreter for every fault, which takes seconds to import
torch. Here the libraries are imported once, and a fork of this process for every fault imports the package, the changed
module from memory. Processes that a test starts by a command line see the unchanged package. Tests run fastest first,
up to the first that fails. A test that computes for 4 times as long as without the fault, and 10 s more, has failed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "gravitar_dqn"
EQUIVALENT = TESTS / "equivalent_faults.txt"
LIBRARIES = (
    "torch torch._dynamo torch.utils.data numpy gymnasium gymnasium.vector ale_py cv2 tyro tqdm line_profiler"
    " safetensors.torch filelock imageio_ffmpeg hypothesis.strategies hypothesis.extra.numpy matplotlib.pyplot"
).split()  # what the tests import besides the package

PPO_TESTS = "actor_critic auxiliary_tasks ppo_oracle randal_faults ppo randal_trainer"
GUARDS = {  # the tests of each module, the fastest files first
    "functional.py": "functional actor_critic dqn_oracle ppo_oracle replay auxiliary_tasks rnd randal_faults",
    "rnd.py": "dqn_oracle ppo_oracle rnd randal_faults ppo dqn",
    "replay.py": "replay dqn_oracle auxiliary_tasks ppo dqn resume",
    "networks.py": "networks actor_critic dqn_oracle ppo_oracle rnd auxiliary_tasks execution ppo dqn",
    "encoders.py": "networks execution actor_critic auxiliary_tasks rnd ppo dqn",
    "loop.py": "loop dqn_oracle telemetry dqn ppo resume",
    "envs.py": "envs evaluation dqn",
    "ram_envs.py": "envs networks dqn",
    "execution.py": "execution checkpoint dqn resume",
    "evaluation.py": "evaluation dqn",
    "agents/base.py": "dqn_oracle ppo_oracle dqn ppo new_agent resume",
    "agents/dqn.py": "dqn_oracle dqn execution resume",
    "agents/ppo.py": f"{PPO_TESTS} resume",
    "agents/ppo_parts.py": PPO_TESTS,
    "agents/ppo_views.py": PPO_TESTS,
    "agents/auxiliary_tasks.py": PPO_TESTS,
    "agents/randal.py": "randal_trainer randal_faults",
    "agents/randal_trainer.py": "randal_trainer randal_faults",
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
COSMETIC = {"charts", "make_look", "describe_device", "__repr__"}  # functions
NOT_CODE = {"annotation", "returns", "decorator_list", "type_params"}  # fields of a node


@dataclass(frozen=True)
class Fault:
    """One change of one module."""

    module: str
    line: int
    before: str
    after: str
    source: bytes  # of the changed module


class Planter:
    """Finds the faults that can be planted in one module. Positions are bytes, as in `ast`."""

    def __init__(self, module: str) -> None:
        self.module, self.source = module, (PACKAGE / module).read_bytes()
        self.tree = ast.parse(self.source)
        self.meaning = ast.dump(self.tree)
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.attributes = {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}

    def faults(self) -> list[Fault]:
        """All, each text once, in the order of the lines."""
        found = {self._fault(*edit) for edit in self._edits(self.tree, set())}
        return sorted((fault for fault in found if fault), key=lambda fault: (fault.line, fault.before, fault.after))

    def _fault(self, start: int, end: int, new: str) -> Fault | None:
        changed = self.source[:start] + new.encode() + self.source[end:]
        if ast.dump(ast.parse(changed)) == self.meaning:
            return None
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
                return name == "__all__" or name.endswith("CHARTS")
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


class ChangedModule(SourceFileLoader):
    """Import hook: the one changed module comes from memory, and from no cached bytecode."""

    def __init__(self, fault: Fault) -> None:
        name = fault.module.removesuffix(".py").replace("/", ".")
        super().__init__(f"gravitar_dqn.{name}", str(PACKAGE / fault.module))
        self.source = fault.source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The finder's half of the hook."""
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        """The loader's half."""
        return compile(self.source, self.path, "exec")


class Order:
    """Pytest plugin: the fastest tests first, none that takes longer than `longest`, each with a time limit.

    Args:
        seconds: of computing, its processes' included, that each test took without a fault; a first run fills it in.
        longest: of them.
    """

    def __init__(self, seconds: dict[str, float], longest: float) -> None:
        self.known, self.seconds, self.longest = dict(seconds), seconds, longest

    def pytest_collection(self) -> None:
        """The examples of Hypothesis are the same every time; after conftest.py, before any test is imported."""
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)  # none is made smaller
        settings.register_profile("faults", derandomize=True, database=None, deadline=None, phases=phases)
        settings.load_profile("faults")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort and leave out."""
        if self.known:
            items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))
            items[:] = [item for item in items if self.known.get(item.nodeid, 0.0) <= self.longest]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Time one test."""
        started = sum(os.times()[:4])
        limit_time(self.known.get(item.nodeid, 300.0))
        result = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - started
        return result


def limit_time(seconds: float) -> None:
    """End this process once it has computed for 4 times as long and 10 s, or has waited for a multiple of that."""
    signal.setitimer(signal.ITIMER_PROF, 4 * seconds + 10)
    signal.setitimer(signal.ITIMER_REAL, 12 * seconds + 90)  # the machine may be busy


def run_tests(files: Sequence[str], fault: Fault | None, seconds: dict[str, float], longest: float, log: Path) -> int:
    """Exit code of pytest in a fork of this process; 0 when all tests pass. Fills `seconds` if it is empty."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setpgid(0, 0)
            limit_time(60)
            output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if fault is not None:
                sys.meta_path.insert(0, ChangedModule(fault))
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={log.parent / 'tests'}"]
            code = int(pytest.main([*options, *files], plugins=[Order(measured := dict(seconds), longest)]))
            log.with_suffix(".json").write_text(json.dumps(measured))
        finally:
            os._exit(code)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the tests left running
    code = os.waitstatus_to_exitcode(status)
    if not seconds and code == 0:
        seconds.update(json.loads(log.with_suffix(".json").read_text()))
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(log.read_text())
    return code


def files_of(module: str) -> list[str]:
    """Those that guard the module and are there."""
    return [str(path) for name in GUARDS[module].split() if (path := TESTS / f"test_{name}.py").exists()]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", metavar="NAME", choices=GUARDS, default=list(GUARDS))
    parser.add_argument("--lines", metavar="A-B", help="only faults in these lines")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, in random order")
    parser.add_argument("--longest", type=float, default=float("inf"), help="leave out tests that compute for longer")
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    options = parser.parse_args()
    started = time.monotonic()

    known = equivalent_faults()
    faults = [fault for module in options.modules for fault in Planter(module).faults()]
    faults = [fault for fault in faults if (fault.module, fault.before, fault.after) not in known]
    if options.lines:
        first, last = map(int, options.lines.split("-"))
        faults = [fault for fault in faults if first <= fault.line <= last]
    if options.sample or options.minutes < float("inf"):
        random.Random(options.seed).shuffle(faults)
        faults = faults[: options.sample]
    if options.list:
        for fault in faults:
            print(f"{fault.module}:{fault.line}\n  - {fault.before}\n  + {fault.after}")
        print(f"{len(faults)} faults")
        return

    missing = {name for module in options.modules for name in GUARDS[module].split()}
    for name in sorted(name for name in missing if not (TESTS / f"test_{name}.py").exists()):
        print(f"warning: there is no tests/test_{name}.py")
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.gettempdir()
    sys.path.insert(0, str(PACKAGE.parent))
    for library in LIBRARIES:
        importlib.import_module(library)
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        seconds: dict[str, float] = {}
        files = list(dict.fromkeys(file for module in options.modules for file in files_of(module)))
        if run_tests(files, None, seconds, float("inf"), log) != 0:
            sys.exit(f"the tests fail without a fault\n{log.read_text()[-4000:]}")
        left = sum(second <= options.longest for second in seconds.values())
        print(f"{len(seconds)} tests pass without a fault in {sum(seconds.values()):.0f} s; {left} are run", flush=True)
        planted, noticed = Counter[str](), Counter[str]()
        began = time.monotonic()
        for fault in faults:
            if time.monotonic() - started > 60 * options.minutes:
                break
            code = run_tests(files_of(fault.module), fault, seconds, options.longest, log)
            planted[fault.module] += 1
            noticed[fault.module] += code != 0
            if code == 0:
                print(f"\n{fault.module}:{fault.line}\n  - {fault.before}\n  + {fault.after}", flush=True)

    print(f"\n{'module':28}{'planted':>8}{'noticed':>8}{'share':>7}")
    for module in [module for module in options.modules if planted[module]]:
        print(f"{module:28}{planted[module]:8}{noticed[module]:8}{noticed[module] / planted[module]:7.0%}")
    total, found = planted.total(), noticed.total()
    print(f"{'total':28}{total:8}{found:8}{found / max(total, 1):7.0%}")
    print(f"{(time.monotonic() - began) / max(total, 1):.1f} s for each fault; {len(faults) - total} not reached")


if __name__ == "__main__":
    main()

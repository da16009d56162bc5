"""The package is read from the files that import nothing of it to the one that imports all: imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "gravitar_dqn"

# Each module may import from the layers above its own.
LAYERS = [
    {"errors", "ram_envs", "charts", "processes", "functional", "dashboard", "benchmark"},
    {"config", "files", "logs", "execution", "encoders", "dashboard.visdom_files"},
    {"distributed"},
    {"serialization", "memory", "replay", "checkpoint", "benchmark.options", "dashboard.registry", "dashboard.tail"},
    {"worker"},
    {"envs", "presets", "loop"},
    {"networks"},
    {"rnd", "run_dir", "telemetry", "agents.base", "agents.auxiliary_tasks", "sweep_plan"},
    {"agents.dqn", "agents.ppo_parts", "trained", "runs"},
    {"agents.ppo_views", "plot", "export", "arguments", "dashboard.panes"},
    {"agents.ppo", "dashboard.compare", "dashboard.connection", "dashboard.pages"},
    {"agents", "dashboard.visdom_app"},
    {"evaluation", "overlay", "dashboard.board", "dashboard.visdom_server"},
    {"recording", "player", "dashboard.view"},
    {"evaluator", "dashboard.thread", "dashboard.draw"},
    {"training"},
    {"agents.randal", "benchmark.contenders", "sweep"},
    {"agents.randal_trainer", "benchmark.peers"},
    {"benchmark.measure", "benchmark.worker"},
    {"benchmark.scale"},
    {"benchmark.suite"},
    {"cli"},
    {"__main__"},
]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = PACKAGE.name if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix(f"{PACKAGE.name}.") for name in names if name.startswith(f"{PACKAGE.name}.")}
    return inside & set(MODULES)


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}
GRAPH = {name: imports(path) for name, path in MODULES.items()}
GRAPH["agents"] |= {"agents.dqn", "agents.ppo"}  # by name, when they are asked for


def test_the_graph_is_the_packages() -> None:
    assert {"agents", "config", "dashboard.thread", "recording", "loop"} <= GRAPH["training"]
    assert "training" in GRAPH["cli"], "imports inside functions count"
    assert GRAPH["config"] == {"errors"}


def test_imports_have_no_cycle() -> None:
    left = dict(GRAPH)
    while left:
        ready = [name for name, needed in left.items() if not needed & set(left)]
        assert ready, f"these import each other: {sorted(left)}"
        for name in ready:
            del left[name]


def test_imports_agree_with_the_layers() -> None:
    depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert set(GRAPH) == set(depth), "a module without a layer, or a layer without its module"
    upward = [f"{name} -> {other}" for name, needed in GRAPH.items() for other in needed if depth[other] >= depth[name]]
    assert upward == []


def test_settings_and_command_line_load_neither_torch_nor_the_games() -> None:
    code = "import sys; import gravitar_dqn.config, gravitar_dqn.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    names = set(loaded.stdout.split())
    assert "gravitar_dqn.cli" in names
    assert names & {"torch", "gymnasium", "ale_py", "numpy", "cv2", "visdom", "tornado"} == set()

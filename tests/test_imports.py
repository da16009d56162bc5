"""Settings and the command line are there at once: they load nothing heavy. Who may import whom: pyproject.toml."""

import subprocess
import sys

from run_helpers import ROOT


def test_settings_and_command_line_load_neither_torch_nor_the_games() -> None:
    code = "import sys; import gravitar_dqn.config, gravitar_dqn.cli.commands; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(loaded.stdout.split())
    assert "gravitar_dqn.cli.commands" in names
    assert names & {"torch", "gymnasium", "ale_py", "numpy", "cv2", "visdom", "tornado"} == set()

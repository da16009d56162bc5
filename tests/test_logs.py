"""What of the log a person at a terminal sees."""

import logging

import pytest

from gravitar_dqn.run.logs import TerminalHandler, show_log


@pytest.fixture(autouse=True)
def silent() -> None:
    package = logging.getLogger("gravitar_dqn")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, TerminalHandler)]


def test_lines_appear_on_standard_error_once_and_warnings_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("gravitar_dqn.anything")
    log.info("before")
    assert "before" not in capsys.readouterr().err
    show_log()
    show_log()
    log.info("%d games", 3)
    log.warning("no more videos")
    said = capsys.readouterr()
    assert said.err == "3 games\nwarning: no more videos\n" and said.out == ""


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise OSError(5, "Input/output error")

    show_log()
    monkeypatch.setattr("sys.stderr", Gone())
    logging.getLogger("gravitar_dqn.anything").info("nobody reads this")

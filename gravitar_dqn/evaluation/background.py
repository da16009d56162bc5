"""Another process that does one thing at a time for a run, in processor time that nobody else wants.

Orders and answers are lines of JSON. The run never waits: it asks now and then whether there is an answer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from gravitar_dqn.errors import UserError

log = logging.getLogger(__name__)

Table = dict[str, Any]


class Worker:
    """The process, as the run sees it. It is started by the first order. A failure is one warning, and the last of it.

    Args:
        module: the module that it runs, which calls `serve`.
        ended: the error when the process ends by itself.
        consequence: what every warning begins with.
    """

    def __init__(self, module: str, ended: str, consequence: str = "") -> None:
        self._module, self._ended, self._consequence = module, ended, consequence
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[Table] = queue.SimpleQueue()
        self.busy = False  # an order was given, and its answer not taken
        self.failed = False

    @property
    def free(self) -> bool:
        """Whether it can take an order."""
        return not (self.busy or self.failed)

    def order(self, order: Table) -> None:
        """Hand over an order while the worker is free; OSError when it cannot be started or has ended."""
        assert self.free
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # Ctrl-C is for the training process. Not a session of its own: Linux shares processor time out among
                # sessions first, and idle priority would count within this one only.
                process_group=0,
            )
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        print(json.dumps(order), file=self._process.stdin, flush=True)
        self.busy = True

    def _listen(self, answers: Any) -> None:
        for line in answers:
            self._answers.put(json.loads(line))
        self._answers.put({"error": self._ended})

    def answer(self, timeout: float = 0.0) -> Table | None:
        """The answer to the last order; None while there is none, and where it failed."""
        try:
            answer = self._answers.get(timeout > 0, timeout)
        except queue.Empty:
            return None
        self.busy = False
        if "error" in answer:
            self.give_up(answer["error"])
            return None
        return answer

    def give_up(self, reason: object) -> None:
        """Warn of a failure, and take no more orders."""
        log.warning("%s%s", self._consequence, reason)
        self.failed = True

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve(carry_out: Callable[[Table], Table]) -> Table | None:
    """Be the process: answer orders until the run closes it or has gone. Returns the last order.

    It takes only processor time that nobody else wants: training comes first.
    """
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.nice(19)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    order: Table | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = carry_out(order)
        except (UserError, OSError) as error:
            answer = {"error": str(error)}
        except Exception as error:  # whatever it is, nobody else would hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except OSError:  # the run was killed
            break
    return order

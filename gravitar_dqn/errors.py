"""The error that is a user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what would do."""

    exit_code = 2


class NotFinite(UserError):
    """Training has met NaN or infinity, and stops."""

    exit_code = 3


class OutOfMemory(UserError):
    """The device has less memory than was asked of it."""


class NotSaved(UserError):
    """Training ended, but what it ended with could not be written."""

    exit_code = 4


class RankLost(UserError):
    """Another process of a distributed run has ended or is silent."""

    exit_code = 5


class Interrupted(UserError):
    """A signal came before there was anything to tell."""


class SettingError(UserError):
    """A setting that cannot work: its name, and what is wrong with it."""

    def __init__(self, name: str, complaint: str) -> None:
        super().__init__(f"{name} {complaint}")
        self.name, self.complaint = name, complaint


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean gravitar? " where something like `word` is known; else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""

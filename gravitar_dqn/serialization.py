"""Settings as plain tables: in and out of JSON, compared, and held between their bounds."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gravitar_dqn.config import FREE_FIELDS, RunConfig
from gravitar_dqn.errors import UserError


class SettingError(UserError):
    """A setting is out of its bounds."""

    def __init__(self, name: str, complaint: str) -> None:
        super().__init__(f"{name} {complaint}")
        self.name, self.complaint = name, complaint


def validate(config: RunConfig) -> None:
    """Raise UserError for the first setting that cannot work."""
    check_bounds(config)
    config.check()


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Raise UserError for the first number of a dataclass that is outside its field's bounds."""
    for setting in dataclasses.fields(settings):
        if dataclasses.is_dataclass(inner := getattr(settings, setting.name)):
            check_bounds(inner, f"{prefix}{setting.name}.")
        if "low" not in setting.metadata:
            continue
        value, low, high = getattr(settings, setting.name), setting.metadata["low"], setting.metadata["high"]
        if not (low <= value <= high and math.isfinite(value)):  # a NaN is in no range
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            name = setting.name.replace("_", "-") if prefix == "--" else setting.name
            raise SettingError(f"{prefix}{name}", f"is {value}: it must be finite and {bounds}")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def build(cls: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass of the values in a table; UserError names an unknown, missing or ill-typed setting."""
    if not isinstance(values, Mapping):
        raise UserError(f"setting {prefix.rstrip('.') or 'config'} is not a table of settings")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise UserError(f"unknown setting {prefix}{unknown[0]}: was it written by another version?")
    if missing := sorted(names - set(values)):
        raise UserError(f"setting {prefix}{missing[0]} is missing: was it written by another version?")
    return cls(**{name: _value(hints[name], values[name], prefix + name) for name in names})


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, name + ".")
    if typing.get_origin(hint) is Literal:
        fits, expected = value in typing.get_args(hint), " or ".join(map(str, typing.get_args(hint)))
    elif hint is float:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits, expected = type(value) is hint, hint.__name__
    if not fits:
        raise UserError(f"setting {name} is {value!r}: it must be {expected}")
    return float(value) if hint is float else value


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names: {"env": {"id": 1}} -> {"env.id": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": v for key, v in inner.items()}
    return flat


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What a resume may not change: (before, after) by the name of the setting."""
    after = flatten(to_dict(new))
    return {
        name: (value, after.get(name))
        for name, value in flatten(to_dict(old)).items()
        if value != after.get(name) and name not in FREE_FIELDS
    }

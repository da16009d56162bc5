"""Settings as plain tables: in and out of JSON, compared, and held between their bounds."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gravitar_dqn.config import FREE_FIELDS, RunConfig
from gravitar_dqn.errors import SettingError, UserError


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


def build(default: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass `default` with the values in a table; UserError names an unknown or ill-typed setting."""
    if not isinstance(values, Mapping):
        raise UserError(f"setting {prefix.rstrip('.') or 'config'} is not a table of settings")
    hints = typing.get_type_hints(type(default))
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(default)}):
        raise UserError(f"unknown setting {prefix}{unknown[0]}: was it written by another version?")
    changed = {
        name: _value(hints[name], value, prefix + name, getattr(default, name)) for name, value in values.items()
    }
    return dataclasses.replace(default, **changed)


def _value(hint: Any, value: Any, name: str, default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(default, value, name + ".")
    if typing.get_origin(hint) is Literal:
        fits, expected = value in typing.get_args(hint), " or ".join(map(str, typing.get_args(hint)))
    elif hint is float:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits, expected = type(value) is hint, hint.__name__
    if not fits:
        raise SettingError(name, f"is {value!r}: it must be {expected}")
    return float(value) if hint is float else value


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names: {"env": {"id": 1}} -> {"env.id": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": v for key, v in inner.items()}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` made flat: {"env.id": 1} -> {"env": {"id": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, last = name.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[last] = value
    return nested


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What a resume may not change: (before, after) by the name of the setting."""
    after = flatten(to_dict(new))
    return {
        name: (value, after.get(name))
        for name, value in flatten(to_dict(old)).items()
        if value != after.get(name) and name not in FREE_FIELDS
    }

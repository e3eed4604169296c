"""Between ConfigDicts, which users edit and override, and frozen dataclasses, which the code reads.

The dataclasses hold the defaults and their documentation. `to_config_dict` fills a ConfigDict from one, so that
`config_flags` finds every key there; `from_config_dict` is the one way back, and the only place that checks keys and
types. Nothing else in the code reads a ConfigDict.
"""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llmlab.core.errors import UserError, nearest

T = TypeVar("T")


def to_config_dict(section: Any) -> ConfigDict:
    """A ConfigDict with a key for every field of the dataclass `section`, nested dataclasses included."""
    hints = typing.get_type_hints(type(section))
    return ConfigDict({f.name: _plain(getattr(section, f.name), hints[f.name]) for f in dataclasses.fields(section)})


def from_config_dict(cls: type[T], config: Any, section: str) -> T:
    """The dataclass `cls` that `config` (a ConfigDict or dict) describes; missing keys keep their default.

    Raises:
      UserError: an unknown or ill-typed key, named in full (`model.widht`), with the nearest valid one.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in config:
        if key not in names:
            raise UserError(f"unknown config key {section}.{key}: {nearest(key, names)}")
    values = {key: _checked(hints[key], config[key], f"{section}.{key}") for key in config}
    return cls(**values)


def to_json(section: Any) -> Any:
    """The same as plain JSON values (dicts, lists, numbers, strings)."""
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return {f.name: to_json(getattr(section, f.name)) for f in dataclasses.fields(section)}
    if isinstance(section, (ConfigDict, dict)):
        return {key: to_json(section[key]) for key in section}
    if isinstance(section, (tuple, list)):
        return [to_json(item) for item in section]
    return section


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """One line per leaf in which two JSON configs differ: `optimizer.learning_rate: 0.001 -> 0.003`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}".lstrip("."))
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


def _plain(value: Any, hint: Any = None) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_config_dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    if value is None:
        (type_,) = [a for a in typing.get_args(hint) if a is not type(None)]
        return placeholder(type_)
    return value


def _checked(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint` wants it, or a UserError that names `key`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [a for a in arguments if a is not type(None)]
        return _checked(hint, value, key)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{key}={value!r} is not a choice: {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        items = (value,) if isinstance(value, (str, dict, ConfigDict)) else value
        if not isinstance(items, (tuple, list)):
            raise UserError(f"{key}={value!r} should be a list, such as ({value!r},)")
        return tuple(_checked(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, (dict, ConfigDict)):
            raise UserError(f"{key}={value!r} should be a section with keys, not a value")
        return from_config_dict(hint, value, key)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise UserError(f"{key}={value!r} should be {hint.__name__}, not {type(value).__name__}")
    return value

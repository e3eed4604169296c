"""ConfigDicts in, dataclasses out; every mistake is one line that names the key."""

import dataclasses
from typing import Literal

import pytest

from llmlab.core.config import differences, from_config_dict, to_config_dict, to_json
from llmlab.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    width: int = 3
    kind: Literal["a", "b"] = "a"
    window: int | None = None
    on: bool = False
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()


def test_round_trip():
    section = Section(width=7, window=4, inner=Inner(names=("x", "y")), parts=(Inner(rate=1.0),))
    assert from_config_dict(Section, to_config_dict(section), "section") == section
    assert from_config_dict(Section, to_json(section), "section") == section


def test_an_absent_value_can_be_set_later():
    config = to_config_dict(Section())
    assert config.window is None
    config.window = 5
    assert from_config_dict(Section, config, "section").window == 5


@pytest.mark.parametrize(
    "given, words",
    [
        ({"widht": 1}, "unknown config key section.widht: did you mean 'width'"),
        ({"inner": {"rat": 1}}, "unknown config key section.inner.rat: did you mean 'rate'"),
        ({"width": "3"}, "section.width='3' should be int, not str"),
        ({"width": True}, "section.width=True should be int, not bool"),
        ({"width": 1.5}, "section.width=1.5 should be int, not float"),
        ({"kind": "c"}, "section.kind='c' is not a choice"),
        ({"inner": 3}, "section.inner=3 should be a section"),
        ({"inner": {"names": 3}}, r"section.inner.names=3 should be a list"),
        ({"inner": {"names": [1]}}, r"section.inner.names\[0\]=1 should be str"),
    ],
)
def test_mistakes_name_the_key(given, words):
    with pytest.raises(UserError, match=words):
        from_config_dict(Section, given, "section")


def test_one_value_may_stand_for_a_list_of_one_and_an_int_for_a_float():
    read = from_config_dict(Section, {"inner": {"names": "x", "rate": 2}}, "section")
    assert read.inner == Inner(rate=2.0, names=("x",))


def test_differences_name_each_leaf():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
    assert differences(old, new) == ["a.c: 2 -> 3", "d: '(absent)' -> 4"]

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from llmlab.core.errors import UserError
from llmlab.scaling.grid import LONGEST_NAME, Grid, check_keys, parse_sweep, typed

CONFIG = {"model": {"width": 128, "pattern": ("global",)}, "optimizer": {"learning_rate": 1e-3}, "run": {"best": ""}}


def test_a_grid_is_every_combination_the_last_key_fastest():
    grid = parse_sweep("model.width=128,256;optimizer.learning_rate=1e-3,3e-3")
    assert grid.settings() == [
        {"model.width": "128", "optimizer.learning_rate": "1e-3"},
        {"model.width": "128", "optimizer.learning_rate": "3e-3"},
        {"model.width": "256", "optimizer.learning_rate": "1e-3"},
        {"model.width": "256", "optimizer.learning_rate": "3e-3"},
    ]
    assert [grid.name(settings) for settings in grid.settings()] == [
        "width=128,learning_rate=0.001",
        "width=128,learning_rate=0.003",
        "width=256,learning_rate=0.001",
        "width=256,learning_rate=0.003",
    ]


@pytest.mark.parametrize(
    "text, values",
    [
        (" model.width = 128 , 256 ; ", ("128", "256")),
        ("k=('a','b'),('c',)", ("('a','b')", "('c',)")),
        ("k=[1,2],{3;4},(5,[6,7])", ("[1,2]", "{3;4}", "(5,[6,7])")),
        ("k='a,b',\"c;d\"", ("a,b", "c;d")),
        ("k='',x", ("", "x")),
        ("k='(',')'", ("(", ")")),
        ("k=a=b", ("a=b",)),
    ],
)
def test_brackets_and_quotes_keep_a_value_together(text, values):
    assert next(iter(parse_sweep(text).values.values())) == values


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names no key"),
        (" ; ", "names no key"),
        ("model.width", "should be KEY=VALUE"),
        ("=3", "should be KEY=VALUE"),
        ("a=1;a=2", "a is given twice"),
        ("a=", "empty value"),
        ("a=1,,2", "write a=1,…"),
        ("a=1,2,", "empty value"),
        ("a=1,2,1", "the value 1 twice"),
        ("a=1e-3,0.001", "twice"),
        ("a=(1,2", r"'\)' is missing"),
        ("a='1", "is missing"),
        ("a=1)", r"'\)' closes nothing"),
        ("a=(1]", r"'\]' closes nothing"),
    ],
)
def test_what_cannot_be_a_grid_is_an_error_of_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_sweep(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, message",
    [
        ("model.widht", "did you mean 'model.width'"),
        ("width", "did you mean 'model.width'"),
        ("optimiser.learning_rate", "did you mean 'optimizer.learning_rate'"),
        ("model", "model is a section: name one of its keys, such as model\\."),
        ("zzz", "print_config"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, message):
    for config in (CONFIG, ConfigDict(CONFIG)):
        with pytest.raises(UserError, match=message):
            check_keys(Grid({key: ("1",)}), config)


def test_every_leaf_of_the_config_can_be_swept():
    keys = ["model.width", "model.pattern", "optimizer.learning_rate", "run.best"]
    check_keys(Grid(dict.fromkeys(keys, ("1",))), ConfigDict(CONFIG))


def test_numbers_are_numbers_and_the_rest_is_text():
    assert [typed(text) for text in ("128", "1e-3", "-2", "True", "(1,)", "")] == [128, 0.001, -2, "True", "(1,)", ""]


def test_names_are_short_where_they_can_be():
    assert (
        Grid({"a.x": ("1",), "b.x": ("2",), "b.y": ("3",)}).name({"a.x": "1", "b.x": "2", "b.y": "3"})
        == "a.x=1,b.x=2,y=3"
    )


def test_one_name_however_a_number_is_written():
    assert {parse_sweep(f"o.rate={text}").name({"o.rate": text}) for text in ("0.001", "1e-3", "1E-03")} == {
        "rate=0.001"
    }


@given(st.lists(st.text(max_size=60), min_size=2, max_size=8, unique_by=typed))
def test_names_are_safe_for_a_file_system_and_never_shared(values):
    grid = Grid({"a.b": tuple(values)})
    names = [grid.name(settings) for settings in grid.settings()]
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9._+=,~-]+", name) for name in names)


def test_a_name_too_long_for_a_file_system_is_cut_and_still_its_own():
    keys = {f"section.quite_a_long_key_{i}": ("1", "2") for i in range(9)}
    grid = Grid(keys)
    names = [grid.name(settings) for settings in grid.settings()]
    assert len(set(names)) == 2**9
    assert max(map(len, names)) <= LONGEST_NAME + 9

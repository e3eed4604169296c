"""The data section refuses what cannot work, in one line that names the key; and loads no heavy library."""

import subprocess
import sys

import pytest

from llmlab.core.config import from_config_dict, to_config_dict
from llmlab.core.errors import UserError
from llmlab.data import DataConfig, MixturePart, text


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"sequence_length": 0}, r"data\.sequence_length=0 should be at least 1"),
        ({"batch_size": -1}, r"data\.batch_size=-1"),
        ({"workers": -2}, r"data\.workers=-2"),
        ({"held_out": 1.0}, r"data\.held_out=1\.0 is the share .* above 0 and below 1"),
        ({"held_out": 0.0}, r"data\.held_out=0\.0 is the share that every run is evaluated on"),
        ({"packing": "best-fit"}, r"data\.packing='best-fit'.*did you mean 'best_fit'"),
        ({"source": "json"}, r"data\.source='json'.*did you mean 'jsonl'"),
        ({"files": "a.txt"}, r"data\.files=\('a\.txt',\) is not read when data\.source='python'"),
        ({"mixture": (MixturePart(),)}, r"data\.mixture is set.*data\.source=mixture"),
        ({"sequence_lenght": 8}, r"sequence_lenght.*did you mean 'sequence_length'"),
    ],
)
def test_impossible_values_name_their_key(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        text(**fields)
    assert "\n" not in str(caught.value)


def test_a_mixture_needs_parts_and_positive_weights():
    with pytest.raises(UserError, match=r"data\.mixture is empty"):
        text("mixture").parts()
    with pytest.raises(UserError, match=r"data\.mixture\.weight=0"):
        MixturePart(weight=0)


def test_one_pattern_is_a_list_of_one():
    assert text("text", files="a.txt").files == ("a.txt",)


def test_the_section_survives_the_door():
    parts = (MixturePart(weight=2.0, source="jsonl", files=("a",), field="body"), MixturePart(source="python"))
    config = text("mixture", mixture=parts, sequence_length=64)
    assert from_config_dict(DataConfig, to_config_dict(config), "data") == config


def test_all_that_tokenises_loads_no_heavy_library():
    heavy = ("jax", "grain", "pyarrow", "datasets")
    code = f"import sys, llmlab.data.prepare; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

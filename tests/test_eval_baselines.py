import lzma
import shutil
import subprocess

import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.eval import baselines
from llmlab.eval.baselines import xz_bits_per_byte

RNG = np.random.default_rng(0)
WORDS = ["attention ", "is ", "all ", "you ", "need\n", "été ", "    return x\n"]
TEXTS = ["".join(RNG.choice(WORDS, size)) for size in (3, 200, 5000, 40_000)]


def test_it_is_the_size_of_preset_9_over_the_bytes_of_the_text():
    bits = 8 * sum(len(lzma.compress(text.encode(), preset=9)) for text in TEXTS)
    assert xz_bits_per_byte(TEXTS) == bits / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz on this machine")
def test_it_is_what_xz_9_writes_file_by_file(tmp_path):
    size = 0
    for text in TEXTS:
        (tmp_path / "text").write_text(text)
        size += len(
            subprocess.run(["xz", "-9", "-c", "-T1", tmp_path / "text"], capture_output=True, check=True).stdout
        )
    assert xz_bits_per_byte(TEXTS) == 8 * size / sum(len(text.encode()) for text in TEXTS)


def test_each_text_is_compressed_alone_so_repeating_it_does_not_help():
    assert xz_bits_per_byte([TEXTS[1]] * 4) == xz_bits_per_byte([TEXTS[1]])


def test_bytes_are_texts_too_and_threads_change_nothing():
    assert xz_bits_per_byte(iter([text.encode() for text in TEXTS]), threads=3) == xz_bits_per_byte(TEXTS, threads=1)


def test_progress_counts_bytes_up_to_the_end():
    seen = []
    xz_bits_per_byte(TEXTS, progress=seen.append)
    assert seen == np.cumsum([len(text.encode()) for text in TEXTS]).tolist()


def test_no_text_is_an_error():
    for texts in ([], [""]):
        with pytest.raises(UserError, match="no text"):
            xz_bits_per_byte(texts)


def test_the_dictionary_never_exceeds_that_of_preset_9(monkeypatch):
    sizes = []
    monkeypatch.setattr(baselines.lzma, "compress", lambda content, format, filters: sizes.append(filters) or b"")
    baselines._xz_size(b"x" * 10)
    baselines._xz_size(memoryview(np.empty(2**26 + 1, np.uint8)))
    assert [filters[0]["dict_size"] for filters in sizes] == [4096, 2**26]

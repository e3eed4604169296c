"""Long work goes on without a reader, and SIGTERM before its first step is an ending with a code of its own."""

import os
import signal
import subprocess
import sys

import pytest

from llmlab.core.errors import StoppedAndSaved
from llmlab.core.long_work import leaving_on_sigterm, outliving_readers

SPEAKS = """
import sys, time
from llmlab.core.long_work import outliving_readers

def speak():
    for i in range(200):
        print("a line that nobody reads", i, flush=True)
        print("nor this one", file=sys.stderr, flush=True)
        time.sleep(0.001)
    open(sys.argv[1], "w").write("done")

if sys.argv[2] == "outlive":
    speak = outliving_readers()(speak)
speak()
"""


@pytest.mark.parametrize("mode", ["outlive", "as it is"])
def test_work_outlives_its_reader(tmp_path, mode):
    done = tmp_path / "done"
    command = [sys.executable, "-c", SPEAKS, str(done), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    code = process.wait(timeout=60)
    assert (code == 0, done.exists()) == ((True, True) if mode == "outlive" else (False, False))


def test_the_streams_are_as_they_were_afterwards():
    before = sys.stdout, sys.stderr
    with outliving_readers():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_sigterm_is_an_ending_and_afterwards_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedAndSaved, match="same command"), leaving_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before

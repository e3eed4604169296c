"""Checkpoints against real kills, a disk that is really full, and two real processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import DiskFull
from llmlab.workdir.checkpoints import Checkpoints, good_steps

SAVES_UNTIL_KILLED = """
import sys, jax, jax.numpy as jnp
from llmlab.workdir.checkpoints import Checkpoints
saver = Checkpoints(sys.argv[1], keep=2)
step = saver.latest() or 0
fill = jax.jit(lambda step: {"step": step, "w": jnp.full((600, 1000), step, jnp.float32)})
if step:
    shapes = {"step": jax.ShapeDtypeStruct((), jnp.int32), "w": jax.ShapeDtypeStruct((600, 1000), jnp.float32)}
    state = saver.restore(step, shapes)
    assert int(state["step"]) == step and bool((state["w"] == step).all()), "restored another state than was saved"
print("from", step, flush=True)
while True:
    step += 1
    saver.save(step, fill(jnp.int32(step)))
    saver.check()
    print("at", step, flush=True)
"""


@pytest.mark.slow
def test_kill_dash_9_at_any_moment_loses_nothing_that_was_committed(tmp_path):
    rng, committed = random.Random(0), 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_UNTIL_KILLED, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        first = process.stdout.readline()
        assert first.startswith("from"), process.communicate()[1]
        assert int(first.split()[1]) >= committed, "an older checkpoint than one that was committed"
        time.sleep(0.3 + rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        # A save returns only once the one before it is committed.
        committed = max([int(line.split()[1]) - 1 for line in rest.splitlines()], default=committed)
        assert committed >= 1
    saver = Checkpoints(tmp_path)
    assert saver.latest() >= committed
    saver.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of Orbax's threads, as they die.
def test_a_disk_that_is_really_full_stops_clearly_and_goes_on_once_there_is_room(small_disk, capfd):
    disk = small_disk("12m")
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    saver = Checkpoints(disk / "checkpoints", keep=5)
    saver.save(1, state, wait=True)
    (disk / "hog").write_bytes(b"x" * 6_000_000)
    with pytest.raises(DiskFull, match="no room left to save"):
        saver.save(2, state, wait=True)
    saver.close()
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["1"]
    assert capfd.readouterr().err == "", "Orbax logs what is raised anyway"
    (disk / "hog").unlink()
    saver = Checkpoints(disk / "checkpoints")
    assert saver.latest() == 1
    found = saver.restore(1, {"w": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    np.testing.assert_array_equal(found["w"], state["w"])
    saver.save(2, state, wait=True)
    assert saver.latest() == 2
    saver.close()


TWO_PROCESSES = """
import os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llmlab.core.errors import DiskFull
from llmlab.workdir import checkpoints
saver = checkpoints.Checkpoints(sys.argv[1], keep=2)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
value = np.arange(64, dtype=np.float32).reshape(8, 8)

def array(step, spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback((8, 8), sharding, lambda index: value[index] + step)

for step in (1, 2, 3):
    saver.save(step, {"w": array(step, ("data", "fsdp")), "r": array(step, ())}, {"loss": 1.0 / step})
    saver.check()
saver.wait()
if jax.process_index() == 0:
    os.truncate(os.path.join(sys.argv[1], "3", "_METADATA"), 5)
saver.close()
saver = checkpoints.Checkpoints(sys.argv[1], keep=2)
assert saver.latest() == 2, saver.latest()
abstract = {n: jax.ShapeDtypeStruct((8, 8), np.float32, sharding=array(0, s).sharding)
            for n, s in (("w", ("fsdp", None)), ("r", (None, "data")))}
found = saver.restore(2, abstract)
for leaf in found.values():
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index] + 2)

def full(*a, **k):
    raise OSError(28, "No space left on device")

checkpoints.manifest.write = full
saver.save(4, {"w": array(4, ())})
try:
    saver.wait()
except DiskFull as error:
    print("DiskFull on", jax.process_index(), flush=True)
saver.close()
assert saver.latest() == 2
print("done", jax.process_index(), flush=True)
"""


@pytest.mark.slow
def test_two_processes_agree_on_one_checkpoint_and_fail_together(tmp_path, free_port):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "checkpoints"), str(rank), str(free_port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for rank, output in enumerate(outputs):
        assert f"done {rank}" in output, output
        assert f"DiskFull on {rank}" in output, output
    assert good_steps(tmp_path / "checkpoints") == [2]


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]

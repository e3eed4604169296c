"""Two gigabytes of shards onto eight devices: no more than the devices hold, and twice the largest tensor."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# 536M parameters in float32, 2.1 GB; the largest tensor is the embedding, 131 MB.
MODEL = "llama(width=1024, layers=28, heads=16, kv_heads=4, mlp_width=4864, vocab_size=32000, max_positions=512)"
SAVE = f"""
import sys, jax, numpy as np
from llmlab.model import hf
from llmlab.model.config import llama
from llmlab.model.cost import abstract_params
from llmlab.model.transformer import make_model
model = make_model({MODEL})
params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(model))
hf.save(model, params, sys.argv[1], shard_bytes=300 * 2**20)
"""
LOAD = """
import json, re, sys, threading, time
import jax
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model import hf

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

partition = make_partition(MeshConfig(fsdp=4, tensor=2))
jax.block_until_ready(jax.jit(lambda: jax.numpy.ones((8, 8)), out_shardings=partition.sharding("batch", None))())
highest, done = 0, threading.Event()

def watch():
    global highest
    while not done.is_set():
        highest = max(highest, anonymous())
        time.sleep(0.002)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model, params = hf.load(sys.argv[1], partition=partition)
jax.block_until_ready(params)
done.set()
thread.join()
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(json.dumps({"raised": highest - before, "held": held, "devices": jax.device_count()}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_streams(tmp_path):
    folder = tmp_path / "out"
    subprocess.run([sys.executable, "-c", SAVE, str(folder)], check=True)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 5
    assert sum(file.stat().st_size for file in files) > 2e9
    out = subprocess.run([sys.executable, "-c", LOAD, str(folder)], check=True, capture_output=True, text=True)
    seen = json.loads(out.stdout)
    print(seen)
    assert seen["devices"] == 8
    assert seen["held"] > 2e9
    assert seen["raised"] < seen["held"] + 2 * 32000 * 1024 * 4

"""Eight fake devices, strict ranks, and warnings as errors: set before jax starts."""

import importlib.metadata
import os
import subprocess

# Tests compile far more than they compute: most of LLVM's optimisation would cost more than it saves, and so would
# the fusion emitters, whose code takes twice as long to compile as the classical one.
FLAGS = "--xla_force_host_platform_device_count=8"
FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other emitters, nor this flag
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("LLMLAB_CACHE", os.path.join(os.path.dirname(__file__), ".cache"))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of its own of this size, `"64m"`, that really fills up.

    Only root may mount one. Everybody else still runs the tests in which a write is made to fail with ENOSPC.
    """
    folders = []

    def mount(size: str):
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk; a write that fails for want of room is tested for everybody")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)

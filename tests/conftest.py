"""Eight fake devices, strict ranks, and warnings as errors: set before jax starts."""

import os

# Tests compile far more than they compute: most of LLVM's optimisation would cost more than it saves.
FLAGS = "--xla_force_host_platform_device_count=8"
FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("LLMLAB_CACHE", os.path.join(os.path.dirname(__file__), ".cache"))

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

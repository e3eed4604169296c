"""Several processes as one machine: JAX's own multi-controller runtime, found in the environment of the launcher.

The same command runs under `srun`, `mpirun` or a Kubernetes JobSet; explicit flags win over what is detected.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np

from llmlab.core.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")


def detect(environment: Mapping[str, str]) -> str | None:
    """Which launcher started several of us ("SLURM", "Open MPI", …), or None when this process is alone."""

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    by_hand = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID")
    if count("JAX_NUM_PROCESSES") > 1 and all(name in environment for name in by_hand):
        return "JAX_COORDINATOR_ADDRESS"
    if count("SLURM_NTASKS") > 1 and "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        return "SLURM"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if count("PMI_SIZE") > 1:
        return "MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "TPU pod"
    return None


def connect(coordinator: str = "", processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes, if there are any. Call once, before anything asks JAX for its devices.

    Args:
      coordinator: host:port of process 0. With `processes` and `process_id` it wins over what the environment says;
        all three or none.

    Raises:
      UserError: only some of the three are given, or the others cannot be reached.
    """
    explicit = (bool(coordinator), processes > 0, process_id >= 0)
    if any(explicit) and not all(explicit):
        raise UserError("--coordinator, --processes and --process_id belong together: give all three, or none")
    launcher = "flags" if all(explicit) else detect(os.environ)
    if launcher is None:
        return
    arguments: dict = {}
    if launcher == "flags":
        arguments = dict(coordinator_address=coordinator, num_processes=processes, process_id=process_id)
    elif launcher == "JAX_COORDINATOR_ADDRESS":
        arguments = dict(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    elif launcher == "MPI":
        arguments = dict(cluster_detection_method="mpi4py")
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"could not join the processes that {launcher} describes: {first_line(error)}") from error
    log.info("%s: process %d of %d", launcher, jax.process_index(), jax.process_count())


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every process; where it fails on one, all of them stop, instead of waiting for that one.

    Raises:
      UserError: it failed on another process; or whatever it raised on this one.
    """
    if jax.process_count() == 1:
        return action()
    from jax.experimental.multihost_utils import process_allgather

    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    failed_P = np.asarray(process_allgather(np.int32(error is not None)))
    if error is not None:
        raise error
    if failed_P.any():
        raise UserError(f"process {int(np.argmax(failed_P))} stopped: its own message says why")
    return result


def leave_if_several(code: int) -> None:
    """Ends this process at once if it is one of several: an orderly end would wait minutes for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(2)  # With it goes the service that they all need: those that stop too do so by themselves.
        os._exit(code)


def lost_another(error: BaseException) -> bool:
    """Whether `error` only says that another process of this run has ended."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "heartbeat timeout")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in signs)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

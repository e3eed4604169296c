"""The mesh and the table of rules."""

import jax
import pytest

from llmlab.core.distributed import connect, detect
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, Partition, Rules, make_partition


@pytest.mark.parametrize(
    "config, shape",
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=-1, fsdp=1), (8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
        (MeshConfig(tensor=2, sequence=2), (1, 2, 2, 2)),
    ],
)
def test_one_axis_takes_what_is_left(config, shape):
    assert config.shape(8) == shape


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="tensor=3 does not fit 8 devices"):
        MeshConfig(tensor=3).shape(8)
    with pytest.raises(UserError, match="at most once"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(UserError, match="names no mesh axis 'tensr': did you mean 'tensor'"):
        MeshConfig(rules=Rules(mlp=("tensr",)))


def test_a_mesh_axis_used_twice_is_refused():
    partition = Partition(make_partition(MeshConfig(tensor=2)).mesh, Rules(embed=("tensor",)))
    with pytest.raises(UserError, match="two axes"):
        partition.spec(("embed", "mlp"))


def test_sharding_follows_the_rules():
    partition = make_partition(MeshConfig(data=2, fsdp=2, tensor=2))
    assert partition.spec(("layers", "embed", "mlp")) == jax.P(None, "fsdp", "tensor")
    assert partition.spec(("batch", "time", None)) == jax.P(("data", "fsdp"), "sequence", None)
    assert (partition.size("batch"), partition.with_whole_batch().size("batch")) == (4, 1)


@pytest.mark.parametrize(
    "environment, launcher",
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, None),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS",
        ),
    ],
)
def test_launchers_are_known_by_their_environment(environment, launcher):
    assert detect(environment) == launcher


def test_half_a_set_of_host_flags_is_refused():
    with pytest.raises(UserError, match="belong together"):
        connect("localhost:1")

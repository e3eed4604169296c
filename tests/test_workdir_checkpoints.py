import errno
import functools
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from llmlab.core.errors import DiskFull, UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.workdir import checkpoints as module
from llmlab.workdir.checkpoints import (
    Checkpoints,
    good_steps,
    latest_step,
    restore_subtree,
    retained,
    saved_arrays,
)

ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 100)))


class Guard(NamedTuple):
    window_W2: jax.Array
    skipped: jax.Array


@functools.cache
def make_state(seed=0, ema=False):
    """A state like a run's: nested weights, an optax state, None and an empty dict, scalars, several dtypes."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    trainable = {
        "embedding": {"tokens_VD": weight(32, 16)},
        "layers": {"0": {"up_DF": weight(2, 16, 24)}},
        "head": {"norm_D": weight(16).astype(jnp.bfloat16)},
    }
    moments = jax.eval_shape(ADAMW.init, trainable)
    return {
        "step": jnp.int32(seed),
        "trainable": trainable,
        "frozen": {},
        "optimizer": jax.tree.map(lambda leaf: jnp.asarray(rng.integers(0, 9, leaf.shape), leaf.dtype), moments),
        "ema": jax.tree.map(lambda w: jnp.asarray(np.asarray(w) * 0.5, w.dtype), trainable) if ema else None,
        "guard": Guard(weight(8, 2), jnp.int32(3)),
    }


def on(mesh, state):
    """`state` over a mesh: matrices split along their last two axes, the rest replicated."""
    partition = make_partition(MeshConfig(**mesh))

    def place(leaf):
        spec = (None,) * (leaf.ndim - 2) + ("fsdp", ("data", "tensor")) if leaf.ndim >= 2 and leaf.shape[-1] > 2 else ()
        return jax.device_put(leaf, jax.sharding.NamedSharding(partition.mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


@pytest.fixture
def warnings_seen(caplog):
    caplog.set_level(logging.WARNING, logger="llmlab")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = make_state(ema=True)
    saver = Checkpoints(tmp_path)
    saver.save(5, state, wait=True)
    found = saver.restore(5, abstract_of(state))
    assert_same_bits(found, state)
    assert isinstance(found["guard"], Guard)
    saver.close()


def test_none_and_empty_parts_are_the_readers(tmp_path):
    state = make_state(ema=False)
    saver = Checkpoints(tmp_path)
    saver.save(5, state, wait=True)
    found = saver.restore(5, abstract_of(state))
    assert found["ema"] is None
    assert found["frozen"] == {}
    assert_same_bits(found, state)
    saver.close()


MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}]


@pytest.mark.parametrize("mesh, other", [(MESHES[0], MESHES[1]), (MESHES[1], MESHES[2]), (MESHES[2], MESHES[0])])
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, mesh, other):
    plain = make_state()
    saver = Checkpoints(tmp_path)
    saver.save(1, on(mesh, plain), wait=True)
    target = on(other, make_state(seed=9))
    found = saver.restore(1, abstract_of(target))
    assert_same_bits(found, plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    saver.close()


def test_the_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    rng = np.random.default_rng(0)
    expected = {"step": np.int32(0), "w": rng.standard_normal((1000, 1000)).astype(np.float32)}
    state = jax.tree.map(jnp.array, expected)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    saver = Checkpoints(tmp_path)
    saver.save(1, state)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    saver.wait()
    assert_same_bits(saver.restore(1, abstract_of(state)), expected)
    saver.close()


def test_what_was_restored_may_be_donated(tmp_path):
    state = make_state()
    saver = Checkpoints(tmp_path)
    saver.save(1, state, wait=True)
    restored = saver.restore(1, abstract_of(state))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)(restored)
    assert_same_bits(doubled, jax.tree.map(lambda x: x + x, state))
    saver.close()


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    release, order = threading.Event(), []
    write = module.manifest.write

    def slow_write(*args, **kwargs):
        release.wait(10)
        order.append("committed")
        write(*args, **kwargs)

    monkeypatch.setattr(module.manifest, "write", slow_write)
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state())
    order.append("returned")
    assert latest_step(tmp_path) is None
    release.set()
    saver.wait()
    assert order == ["returned", "committed"]
    assert latest_step(tmp_path) == 1
    saver.close()


def test_a_part_restores_alone_by_tree_or_by_name(tmp_path):
    state = make_state(ema=True)
    saver = Checkpoints(tmp_path)
    saver.save(2, state, wait=True)
    saver.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state["ema"])
    assert_same_bits(restore_subtree(tmp_path, 2, {"ema": abstract})["ema"], state["ema"])
    name = "trainable.head.norm_D"
    one = restore_subtree(tmp_path, 2, {name: jax.ShapeDtypeStruct((16,), jnp.float32)})
    assert_same_bits(one[name], state["trainable"]["head"]["norm_D"].astype(jnp.float32))
    assert saved_arrays(tmp_path, 2)[name] == ((16,), "bfloat16")


def test_another_shape_or_structure_is_refused_by_name(tmp_path):
    saver = Checkpoints(tmp_path)
    saver.save(1, make_state(), wait=True)
    narrow = {"embedding": {"tokens_VD": jax.ShapeDtypeStruct((32, 8), jnp.float32)}}
    with pytest.raises(UserError, match=r"trainable\.embedding\.tokens_VD is \(32, 16\) in .*/1 and \(32, 8\) here"):
        restore_subtree(tmp_path, 1, {"trainable": narrow})
    with pytest.raises(UserError, match=r"holds no ema\.embedding"):
        saver.restore(1, abstract_of(make_state(ema=True)))
    smaller = abstract_of(make_state()) | {"guard": None}
    with pytest.raises(UserError, match=r"holds guard\.window_W2, which this run has not"):
        saver.restore(1, smaller)
    wider = abstract_of(make_state())
    wider["trainable"]["head"]["norm_D"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    with pytest.raises(UserError, match=r"holds trainable\.head\.norm_D as bfloat16, this run as float32"):
        saver.restore(1, wider)
    saver.close()


def test_every_torn_file_makes_the_one_before_count(tmp_path, warnings_seen):
    saver = Checkpoints(tmp_path / "whole")
    for step in (10, 20):
        saver.save(step, make_state(step), wait=True)
    saver.close()
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "20").rglob("*") if p.is_file()]
    assert len(names) > 5

    for number, (name, tear) in enumerate((name, tear) for name in names for tear in (cut, flip, Path.unlink)):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        tear(folder / name)
        seen = len(warnings_seen())
        assert latest_step(folder) == 10, (name, tear)
        assert good_steps(folder) == [10], (name, tear)
        assert "ignoring a torn checkpoint" in warnings_seen()[seen], (name, tear)
        assert "\n" not in warnings_seen()[seen]
    assert latest_step(tmp_path / "whole") == 20


def test_a_torn_step_can_be_saved_again_and_a_whole_one_is_left_as_it_is(tmp_path):
    saver = Checkpoints(tmp_path)
    for step in (10, 20):
        saver.save(step, make_state(step), wait=True)
    saver.close()
    os.truncate(tmp_path / "20" / "_METADATA", 3)
    saver = Checkpoints(tmp_path)
    assert saver.latest() == 10
    saver.save(20, make_state(21), wait=True)
    assert_same_bits(saver.restore(20, abstract_of(make_state())), make_state(21))
    saver.save(20, make_state(22), wait=True)
    assert_same_bits(saver.restore(20, abstract_of(make_state())), make_state(21))
    saver.close()


def test_a_torn_step_is_not_restored(tmp_path):
    saver = Checkpoints(tmp_path)
    saver.save(10, make_state(), wait=True)
    saver.close()
    os.truncate(tmp_path / "10" / "_METADATA", 3)
    saver = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="10 is not whole"):
        saver.restore(10, abstract_of(make_state()))
    saver.close()


def test_leftovers_of_a_killed_run_are_cleaned_up_at_the_next_start(tmp_path, warnings_seen):
    saver = Checkpoints(tmp_path)
    saver.save(10, make_state(), wait=True)
    saver.close()
    shutil.copytree(tmp_path / "10", tmp_path / "20")
    (tmp_path / "20" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "10", tmp_path / "30.orbax-checkpoint-tmp")
    saver = Checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]
    assert warnings_seen() == [f"removing checkpoint {tmp_path / '20'}: its save was cut short"]
    saver.close()


def test_a_torn_step_never_pushes_out_a_whole_one(tmp_path):
    saver = Checkpoints(tmp_path, keep=3)
    for step in (10, 20, 40):
        saver.save(step, make_state(), wait=True)
    saver.close()
    for step in (20, 40):
        flip(next(path for path in (tmp_path / str(step)).rglob("d/*") if path.stat().st_size > 1000))
    saver = Checkpoints(tmp_path, keep=2)
    assert saver.latest() == 10
    saver.save(30, make_state(), wait=True)
    assert good_steps(tmp_path) == [10, 30]
    saver.save(40, make_state(), wait=True)
    assert good_steps(tmp_path) == [30, 40]
    saver.close()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"keep": 1}, {60}),
        ({"keep": 2}, {50, 60}),
        ({"keep": 9}, {10, 20, 30, 40, 50, 60}),
        ({"keep": 1, "keep_every": 20}, {20, 40, 60}),
        ({"keep": 2, "keep_every": 30}, {30, 50, 60}),
        ({"keep": 1, "best": "eval/loss"}, {30, 60}),
        ({"keep": 1, "best": "never/measured"}, {60}),
        ({"keep": 1, "keep_every": 40, "best": "eval/loss"}, {30, 40, 60}),
    ],
)
def test_what_is_kept(options, expected):
    losses = {10: {"eval/loss": 5.0}, 20: {}, 30: {"eval/loss": 2.0}, 40: {"eval/loss": 3.0}, 50: {}, 60: {}}
    assert retained(losses, **options) == expected


def test_old_ones_go_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path, keep=2, keep_every=30, best="eval/loss")
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan"), 50: 2.5}
    for step, loss in losses.items():
        saver.save(step, make_state(step), {"eval/loss": loss}, wait=True)
    assert good_steps(tmp_path) == [20, 30, 40, 50]
    write, at_commit = module.manifest.write, []
    monkeypatch.setattr(
        module.manifest, "write", lambda *a, **k: (at_commit.append(good_steps(tmp_path)), write(*a, **k))
    )
    saver.save(60, make_state(60), {"eval/loss": 0.5}, wait=True)
    assert at_commit == [[20, 30, 40, 50]]
    assert good_steps(tmp_path) == [30, 50, 60]
    saver.close()


def test_a_full_disk_is_raised_at_the_next_check_and_the_partial_step_is_removed(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path)
    saver.save(10, make_state(10), wait=True)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing x [OS error 28: No space left on device]")

    monkeypatch.setattr(module.manifest, "write", full)
    saver.save(20, make_state(20))
    saver._join()
    with pytest.raises(DiskFull, match=r"no room left to save .*/20"):
        saver.check()
    saver.check()
    monkeypatch.undo()
    assert saver.latest() == 10
    assert [path.name for path in tmp_path.iterdir()] == ["10"]
    saver.save(20, make_state(20), wait=True)
    assert saver.latest() == 20
    saver.close()


@pytest.mark.parametrize("surfaces", ["check", "wait", "save", "latest"])
def test_any_other_failure_keeps_its_reason(tmp_path, monkeypatch, surfaces):
    saver = Checkpoints(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "manifest.json")

    monkeypatch.setattr(module.manifest, "write", refuse)
    saver.save(10, make_state())
    saver._join()
    with pytest.raises(PermissionError, match="Permission denied"):
        {"save": lambda: saver.save(20, make_state())}.get(surfaces, getattr(saver, surfaces))()
    assert list(tmp_path.iterdir()) == []
    saver.close()


def test_a_save_that_cannot_even_begin_raises_at_once_and_the_next_one_works(tmp_path):
    donated = jnp.ones((4, 4))
    donated.delete()
    saver = Checkpoints(tmp_path)
    with pytest.raises(RuntimeError, match="deleted"):
        saver.save(10, {"w": donated})
    assert saver.latest() is None
    saver.save(11, {"w": jnp.ones((4, 4))}, wait=True)
    assert saver.latest() == 11
    saver.close()


def test_a_failure_that_nobody_asked_for_is_logged_at_the_end(tmp_path, monkeypatch, warnings_seen):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "manifest.json")

    monkeypatch.setattr(module.manifest, "write", refuse)
    saver = Checkpoints(tmp_path)
    saver.save(10, make_state())
    saver.close()
    assert "the last save failed: [Errno 13] Permission denied" in warnings_seen()[0]


def test_keep_must_leave_something():
    with pytest.raises(UserError, match=r"run\.keep=0"):
        Checkpoints("unused", keep=0)


def test_no_folder_has_no_checkpoint(tmp_path):
    assert latest_step(tmp_path / "none") is None
    assert good_steps(tmp_path / "none") == []

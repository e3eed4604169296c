"""Checkpoints: Orbax, in this one module, with a manifest that tells a whole one from a torn one.

A checkpoint is a flat dict of arrays, named by their path in the state (`optimizer.0.mu.embedding.tokens_VD`): it knows
no tree type, so that NamedTuples, None and empty dicts are the reader's, and any part restores alone onto any mesh.

The order of a save: copy to the host, write beside the older ones, commit by the manifest, delete the older ones. A
kill at any moment leaves the last committed checkpoint as it was.
"""

import logging
import math
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llmlab.core.errors import DiskFull, UserError, is_disk_full
from llmlab.core.paths import clear_when_full
from llmlab.workdir import manifest
from llmlab.workdir.manifest import Manifest, Torn

log = logging.getLogger(__name__)

# What Orbax logs is either progress or an exception that reaches our caller anyway, with its traceback.
logging.getLogger("absl").addFilter(lambda record: f"orbax{os.sep}checkpoint" not in record.pathname)
# Of parallel writes that fail together Orbax raises one. asyncio would log each of the others.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _unless_late(ignored: Any, before: Any = sys.unraisablehook) -> None:
    """sys.unraisablehook, but for writes that end after one of them failed: tensorstore's threads report each."""
    if str(ignored.exc_value) != "Event loop is closed":
        before(ignored)


sys.unraisablehook = _unless_late

_FINE, _FAILED, _DISK_FULL = 0, 1, 2


class Checkpoints:
    """The checkpoints of one run. On several hosts, all call every method, on a directory that they share.

    keep: the newest so many. keep_every: also each whose step is a multiple of it; 0 is none. best: also the one with
    the lowest value of this metric; empty is none.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3, keep_every: int = 0, best: str = ""):
        if keep < 1:
            raise UserError(f"run.keep={keep} should be at least 1, or nothing is left to go on from")
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every, self._best = keep, keep_every, best
        # Weights hardly compress: zstd saves 8 % of the room and doubles the time.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        # Its folders made at once, not in the background: then a failed save leaves no thread that waits for them.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(handler, async_options=options)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._known: dict[int, bool] = {}  # Step -> whether it is whole, of those read or written here.
        if jax.process_index() == 0:
            with clear_when_full(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            _clean(self.directory)
        _agreed(0)  # No host looks before the leftovers are gone.

    def save(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None, *, wait: bool = False
    ) -> None:
        """Saves `state`, a tree of arrays, in the background. Its buffers may be donated as soon as this returns.

        A step that is already there, whole, is left as it is. Waits for the save before, if that is still under way.

        Raises:
          DiskFull, or whatever went wrong: this save or the one before failed.
        """
        self.wait()
        folder = self.directory / str(step)
        if not _agreed(jax.process_index() == 0 and self._is_whole(step)):
            if jax.process_index() == 0:
                self._drop_partial(folder)  # Again: the writers of a failed save may outlive it for a moment.
            arrays = _named(state)
            finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
            about = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in arrays.items()}
            try:
                self._saver.save(folder, args=ocp.args.PyTreeSave(arrays), force=True)
            except Exception as error:
                self._fail(step, error)
                self.check()
            else:
                work = (step, finite, about)
                self._thread = threading.Thread(target=self._commit, args=work, name="commit checkpoint")
                self._thread.start()
        if wait:
            self.wait()

    def latest(self) -> int | None:
        """The newest whole checkpoint, the same on every host; warns of each newer one that is torn."""
        self.wait()
        return _newest_whole(self.directory, self._known)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The state saved at `step`, as `abstract`: a tree of `ShapeDtypeStruct` with the shardings it shall have.

        Raises:
          UserError: the checkpoint is not whole, or holds other arrays than `abstract`.
        """
        self.wait()
        if not _agreed(jax.process_index() == 0 and self._is_whole(step)):
            raise UserError(f"checkpoint {self.directory / str(step)} is not whole: restore another step")
        folder, wanted = self.directory / str(step), _named(abstract)
        saved = manifest.read(folder).arrays
        _check_fits(folder, saved, wanted)
        for name, (_, dtype) in saved.items():
            if name not in wanted:
                raise UserError(f"{folder} holds {name}, which this run has not: its config or code has changed")
            if str(wanted[name].dtype) != dtype:
                raise UserError(f"{folder} holds {name} as {dtype}, this run as {wanted[name].dtype}: they must agree")
        return _restored(folder, abstract)

    def check(self) -> None:
        """Raises what a save in the background failed of: cheap, for every step.

        On several hosts only `save` and `wait` raise, so that all hosts leave together and none waits for another.
        """
        if jax.process_count() == 1:
            self._raise(self._failure)

    def wait(self) -> None:
        """Waits for the save under way, and raises what it failed of, on every host."""
        self._join()
        failure = self._failure
        if jax.process_count() > 1:
            own = _FINE if failure is None else _DISK_FULL if isinstance(failure, DiskFull) else _FAILED
            worst = int(np.max(multihost_utils.process_allgather(np.int32(own))))
            if failure is None and worst != _FINE:
                kind = DiskFull if worst == _DISK_FULL else RuntimeError
                failure = kind(f"another host failed to save to {self.directory}: its own message says why")
        self._raise(failure)

    def close(self) -> None:
        """Waits for this host's part of the save under way; logs its failure, so as not to hide an error before."""
        self._join()
        if self._failure is not None:
            log.error("the last save failed: %s", self._failure)
        self._saver.close()

    def _commit(self, step: int, metrics: dict[str, float], arrays: dict[str, list[Any]]) -> None:
        """What follows the copy to the host: in a thread of its own, while training goes on."""
        try:
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(self.directory / str(step), step=step, metrics=metrics, arrays=arrays)
                self._known[step] = True
                self._retire(step)
        except BaseException as error:
            self._fail(step, error)

    def _fail(self, step: int, error: BaseException) -> None:
        folder = self.directory / str(step)
        if is_disk_full(error) and not isinstance(error, DiskFull):
            full = DiskFull(f"no room left to save {folder}: free some space there, then run the same command again")
            full.__cause__ = error
            error = full
        self._failure = error
        # Orbax drops the coroutines of a failed save; the failure itself is raised, so their complaints say nothing.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        if jax.process_index() == 0:
            self._drop_partial(folder)

    def _drop_partial(self, folder: Path) -> None:
        """Makes room: removes what an uncommitted save wrote, as far as it can be removed."""
        for leftover in (folder, *_temporary(self.directory)):
            if not (leftover / manifest.NAME).exists():
                shutil.rmtree(leftover, ignore_errors=True)

    def _retire(self, newest: int) -> None:
        """Deletes what need not be kept now that `newest` is committed; of those before it, what is torn too.

        A later step is a torn one that the run has fallen back behind: it counts for nothing and is saved over.
        """
        steps = [step for step in _steps(self.directory) if step <= newest]
        metrics = {step: found.metrics for step in steps if (found := self._manifest_of(step)) is not None}
        for step in set(steps) - retained(metrics, keep=self._keep, keep_every=self._keep_every, best=self._best):
            _delete(self.directory / str(step))
            self._known.pop(step, None)

    def _manifest_of(self, step: int) -> Manifest | None:
        if self._known.get(step) is False:
            return None
        try:
            return manifest.read(self.directory / str(step))
        except Torn:
            return None

    def _is_whole(self, step: int) -> bool:
        return _whole(self.directory, step, self._known, warn=False)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self, failure: BaseException | None) -> None:
        if failure is not None:
            self._failure = None
            raise failure


def retained(metrics: Mapping[int, Mapping[str, float]], *, keep: int, keep_every: int = 0, best: str = "") -> set[int]:
    """Which of these checkpoints, step -> metrics, to keep: the newest, the multiples, the best."""
    steps = sorted(metrics)
    kept = set(steps[-keep:])
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    measured = [step for step in steps if best in metrics[step]]
    if measured:
        kept.add(min(measured, key=lambda step: metrics[step][best]))
    return kept


def good_steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of the whole checkpoints, in order. Reads all of them; warns of each torn one."""
    directory = Path(directory)
    return [step for step in _steps(directory) if _whole(directory, step, {}, warn=True)]


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest whole checkpoint, the same on every host; warns of each newer one that is torn."""
    return _newest_whole(Path(directory), {})


def saved_arrays(directory: str | os.PathLike[str], step: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of every array of a checkpoint."""
    saved = manifest.read(Path(directory) / str(step)).arrays
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in saved.items()}


def restore_subtree(directory: str | os.PathLike[str], step: int, abstract_subtree: dict[str, Any]) -> dict[str, Any]:
    """Part of the state saved at `step`, such as {"ema": …}, in the dtypes and shardings of `abstract_subtree`.

    A key may also be a whole path: {"ema.head.norm_D": …}. Without a sharding, an array goes to the first device.

    Raises:
      UserError: the checkpoint lacks an array of it, or has it in another shape.
    """
    folder = Path(directory).absolute() / str(step)
    _check_fits(folder, manifest.read(folder).arrays, _named(abstract_subtree))
    return _restored(folder, abstract_subtree)


def _check_fits(folder: Path, saved: Mapping[str, list[Any]], wanted: Mapping[str, Any]) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise UserError(f"{folder} holds no {name}: it was saved by another config")
        if tuple(saved[name][0]) != tuple(leaf.shape):
            raise UserError(f"{name} is {tuple(saved[name][0])} in {folder} and {tuple(leaf.shape)} here")


def _restored(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    wanted = _named(abstract)
    arguments = {
        name: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
            global_shape=leaf.shape,
            dtype=leaf.dtype,
        )
        for name, leaf in wanted.items()
    }
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        arrays = reader.restore(folder, args=request)
    finally:
        reader.close()
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by their path; what holds no array (None, an empty dict) has no name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _newest_whole(directory: Path, known: dict[int, bool]) -> int | None:
    newest = -1
    if jax.process_index() == 0:
        whole: Iterator[int] = (s for s in reversed(_steps(directory)) if _whole(directory, s, known, warn=True))
        newest = next(whole, -1)
    newest = _agreed(newest)
    return None if newest < 0 else newest


def _whole(directory: Path, step: int, known: dict[int, bool], *, warn: bool) -> bool:
    """Whether every byte is as it was saved; each step is read once, then `known`."""
    if step not in known:
        try:
            manifest.verify(directory / str(step))
            known[step] = True
        except Torn as torn:
            known[step] = False
            if warn:
                log.warning("ignoring a torn checkpoint: %s", torn)
    return known[step]


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _temporary(directory: Path) -> list[Path]:
    return list(directory.glob("*.orbax-checkpoint-tmp*"))


def _clean(directory: Path) -> None:
    """Removes what a killed run left half-written or half-deleted; what was committed stays, even if torn since."""
    for leftover in _temporary(directory):
        _delete(leftover)
    for step in _steps(directory):
        if not (directory / str(step) / manifest.NAME).exists():
            log.warning("removing checkpoint %s: its save was cut short", directory / str(step))
            _delete(directory / str(step))


def _delete(folder: Path) -> None:
    """Deletes a checkpoint so that, stopped half-way, it is known for none."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _agreed(value: int) -> int:
    """Process 0's `value`, on every process."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

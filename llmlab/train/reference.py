"""Log-probabilities of every answer by the reference model: computed once, before the first step, and kept.

The reference is what the run begins from. Its log-probabilities lie in the workdir, sealed with the digests of what
they were computed from, so that a run goes on with exactly those it began with.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from llmlab.core.distributed import together
from llmlab.core.mesh import fetch
from llmlab.data.config import DataConfig
from llmlab.data.pipeline import GroupBatch, by_document
from llmlab.data.store import MANIFEST, TokenStore, TornError, mapped, open_sealed, seal
from llmlab.model.types import Model, Params
from llmlab.objective.base import Logprobs
from llmlab.objective.responses import response_logps
from llmlab.workdir.files import Workdir
from llmlab.workdir.open import Base, check_base, weights_of

NAME = "logp.bin"
Split = list[tuple[TokenStore, float]]


def reference_logps(
    workdir: Workdir,
    config: DataConfig,
    splits: dict[str, Split],
    model: Model,
    base: Base,
    logprobs: Logprobs,
    say: Callable[[str], None],
) -> dict[str, list[np.ndarray]]:
    """For each split, of each of its stores the log-probability of every answer, float32 [documents].

    An answer's is the sum over the tokens that the model is to say. `base` names the reference's weights, which are
    only read where something is missing.
    """
    found: dict[str, list[np.ndarray]] = {}
    params: Params | None = None
    for split, parts in splits.items():
        found[split] = []
        for store, _ in parts:
            key = _key(config, store, base, logprobs)
            folder = workdir.path / "reference" / key[:16]
            logps = _known(folder, key)
            if _missing_anywhere(logps is None):
                if params is None:
                    say(f"log-probabilities of the answers by the reference, {base.workdir} at step {base.step} …")
                    together(functools.partial(check_base, base))
                    params = weights_of(base, model)
                logps = _computed(config, store, model, params, logprobs)
                together(functools.partial(_keep, folder, logps, key))
            assert logps is not None
            found[split].append(logps)
    return found


def _computed(config: DataConfig, store: TokenStore, model: Model, params: Params, logprobs: Logprobs) -> np.ndarray:
    partition = model.partition
    logps = jax.jit(lambda params, batch: response_logps(model, params, batch, logprobs=logprobs)[0])

    def of_batch(batch: GroupBatch) -> np.ndarray:
        return fetch(logps(params, batch))

    sharding = None if partition is None else partition.sharding("batch", "time")
    progress = "rows read by the reference" if jax.process_index() == 0 else ""
    return by_document(config, store, of_batch, sharding=sharding, progress=progress)


def _keep(folder: Path, logps: np.ndarray, key: str) -> None:
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        seal(folder, MANIFEST, {NAME: logps.astype("<f4")}, key=key)


def _known(folder: Path, key: str) -> np.ndarray | None:
    try:
        if open_sealed(folder, MANIFEST)["key"] == key:
            return mapped(folder / NAME, np.dtype("<f4"))
    except TornError:
        pass  # computed again
    return None


def _key(config: DataConfig, store: TokenStore, base: Base, logprobs: Logprobs) -> str:
    facts = [store.manifest["fingerprint"], config.packing, config.sequence_length, base.digest, logprobs]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _missing_anywhere(missing: bool) -> bool:
    """The same on every host: all of them compute, or none."""
    if jax.process_count() == 1:
        return missing
    return bool(np.any(process_allgather(np.int32(missing))))

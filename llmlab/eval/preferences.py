"""How often the better of two answers is preferred, by what is wrong with the other."""

import collections
import logging
import os
from typing import Any

import jax
import numpy as np

from llmlab.core.mesh import fetch
from llmlab.data.chat import Example
from llmlab.data.config import DataConfig
from llmlab.data.pipeline import GroupBatch, by_document
from llmlab.data.prepare import prepare_parts
from llmlab.data.sources import Report, documents
from llmlab.data.split import Split
from llmlab.data.store import TokenStore
from llmlab.model.adapters import adapter_of, without_adapter
from llmlab.model.types import Params
from llmlab.objective.preference import PER_TOKEN
from llmlab.objective.responses import response_logps, response_scores
from llmlab.train.reference import reference_logps
from llmlab.workdir.files import Workdir
from llmlab.workdir.open import Base, Opened

log = logging.getLogger(__name__)


def told_apart(
    opened: Opened, workdir: str | os.PathLike[str], data: DataConfig, split: Split, *, quiet: bool = False
) -> dict[str, Any]:
    """{"accuracy": share of pairs, "by_kind": the same for each kind of example, "pairs": how many}, of `split`.

    A pair is told apart where its first answer has the higher reward, as the run's objective has it: the score, of a
    reward model; else how much likelier an answer has become than by the reference, a token with ipo; with orpo and
    simpo, which have none, the mean log-probability of the answer's tokens.
    """
    right: dict[str, list[bool]] = collections.defaultdict(list)
    parts = prepare_parts(data, opened.tokenizer, split, progress=not quiet)
    references = references_of(opened, workdir, data, split, parts)
    for number, ((part, _), (store, _)) in enumerate(zip(data.parts(), parts, strict=True)):
        assert store.judged is not None
        reward = _rewards(opened, data, store, compared=references is not None)
        if references is not None:
            reward = reward - references[number]
        if opened.config["objective"].get("kind") in PER_TOKEN:
            reward = reward / np.maximum(_tokens_said(store), 1)
        first = np.searchsorted(store.judged.groups, np.arange(store.manifest["items"]))
        margin = reward[first] - reward[first + 1]
        kinds = (Example.loads(document.text).kind for document in documents(part, split, Report()))
        for kind, each in zip(kinds, margin.tolist(), strict=True):
            if not np.isnan(each):
                right[kind].append(each > 0)
    every = [each for of_kind in right.values() for each in of_kind]
    by_kind = {kind: float(np.mean(right[kind])) for kind in sorted(right) if kind}
    return {"accuracy": float(np.mean(every)), "by_kind": by_kind, "pairs": len(every)}


def pairs_table(found: dict[str, Any]) -> str:
    """What `told_apart` found, for a person."""
    rows = [("all", found["accuracy"]), *found["by_kind"].items()]
    return "\n".join(
        [f"pairs told apart, of {found['pairs']:,}", *(f"  {kind:12s} {share:7.1%}" for kind, share in rows)]
    )


def references_of(
    opened: Opened,
    workdir: str | os.PathLike[str],
    data: DataConfig,
    split: Split,
    parts: list[tuple[TokenStore, float]],
) -> list[np.ndarray] | None:
    """The reference's log-probabilities of every answer, where the run is compared with one that is no adapter's."""
    if "reference" not in opened.config["objective"]:
        return None
    known = Workdir(workdir).read_config().get("reference")
    if known is None:
        return None
    logprobs = opened.config["objective"]["logprobs"]
    splits: dict[str, list[tuple[TokenStore, float]]] = {split: parts}
    return reference_logps(Workdir(workdir), data, splits, opened.model, Base(**known), logprobs, log.info)[split]


def _tokens_said(store: TokenStore) -> np.ndarray:
    """Of each answer, the tokens that the model is to say."""
    assert store.judged is not None
    said = np.concatenate([[0], np.cumsum(store.judged.marks == 1)])
    return np.diff(said[store.offsets])


def _rewards(opened: Opened, data: DataConfig, store: TokenStore, *, compared: bool) -> np.ndarray:
    """The reward of every answer, or its log-probability where that is `compared` with another's later."""
    model, logprobs = opened.model, opened.config["objective"].get("logprobs", "auto")

    def of_batch(params: Params, batch: GroupBatch) -> jax.Array:
        if model.config.head == "score":
            return response_scores(model, params, batch)[0]
        logp_BPR = response_logps(model, params, batch, logprobs=logprobs)[0]
        if not compared and adapter_of(params) and opened.config["objective"].get("kind") not in ("orpo", "simpo"):
            return logp_BPR - response_logps(model, without_adapter(params), batch, logprobs=logprobs)[0]
        return logp_BPR

    compiled, partition = jax.jit(of_batch), model.partition
    sharding = None if partition is None else partition.sharding("batch", "time")
    return by_document(data, store, lambda batch: fetch(compiled(opened.params, batch)), sharding=sharding)

"""Text to batches: sources, tokenizers, token files, packing, and the pipeline that feeds a training step.

May import `llmlab.core` and libraries. Only `pipeline` may import jax, so that the worker processes that tokenise stay
light; importing this package, or `llmlab.data.config`, loads neither jax nor any reader of data.
"""

import dataclasses
from typing import Any

from llmlab.core.errors import UserError, nearest
from llmlab.data.config import DataConfig, MixturePart

__all__ = ["DataConfig", "MixturePart", "text"]


def text(source: str = "python", **overrides: Any) -> DataConfig:
    """The data section of an experiment: text from `source`, other fields by keyword; see `DataConfig`."""
    names = [field.name for field in dataclasses.fields(DataConfig)]
    for name in overrides:
        if name not in names:
            raise UserError(f"text({name}=...) is no field of the data section: {nearest(name, names)}")
    return DataConfig(source=source, **overrides)  # type: ignore[arg-type]

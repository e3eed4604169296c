"""What each `llmlab VERB` is: its flags, its help, and what it runs. A verb imports what it needs, when it runs."""

from llmlab.verbs import indexing, looking, serving, talking, training
from llmlab.verbs.common import Verb

_ORDER = [
    "train",
    "sample",
    "chat",
    "serve",
    "rank",
    "eval",
    "check",
    "quantise",
    "report",
    "tokenize",
    "convert",
    "sweep",
    "index",
]
_ALL = training.VERBS | talking.VERBS | serving.VERBS | looking.VERBS | indexing.VERBS
VERBS = {name: _ALL[name] for name in _ORDER}

__all__ = ["VERBS", "Verb"]

"""llmlab: from raw text to a language model you can train, resume, measure and sample.

Arrays carry their shape in their name, `tokens_BT`, and einsums use the same letters. The one legend:

    B  batch (rows)            N  query heads             V  vocabulary
    T  query positions         K  key/value heads         E  experts
    S  key positions           G  N / K, queries a key    L  layers
    D  model width             H  head width              P  prompts
    F  feed-forward width      X  runs of a sweep         R  responses to a prompt

A trailing `_` names a scalar or an array of any shape. Imports only go to a lower floor of the house; see the README's
map, and `tests/test_layering.py`, which enforces it.
"""

__version__ = "0.1.0"


def open(workdir: str):
    """Opens what a run left behind: `.model`, `.params`, `.tokenizer`, `.step`, `.config` of its last good checkpoint.

    Raises:
      llmlab.core.errors.UserError: there is no such workdir, or it holds no checkpoint that is whole.
    """
    from llmlab.workdir.open import open_workdir

    return open_workdir(workdir)

"""Floor 3: what is minimised. Each objective is a free function of (model, params, batch) to (loss, metrics).

The loss and every metric are (sum, weight) pairs, so microbatches and devices of any size add up to the whole batch.
"""

from llmlab.objective.next_token import NextTokenConfig, next_token, next_token_loss

# The config section `objective` is the dataclass that its `name` picks here; each knows how to make its loss.
OBJECTIVES = {"next_token": NextTokenConfig}

__all__ = ["OBJECTIVES", "NextTokenConfig", "next_token", "next_token_loss"]

"""Floor 3: what is minimised. Each objective is a free function of (model, params, batch) to (loss, metrics).

The loss and every metric are (sum, weight) pairs, so microbatches and devices of any size add up to the whole batch.

What all share     base: how the rest of the code sees an objective, and the pass through the model
Of tokens          next_token: pretraining and fine-tuning, with neftune's noise
Of responses       preference, kto, reward, steps: each its formulas over arrays, and the objective that takes them to
                   batches; groups and responses: from tokens to responses
"""

from llmlab.objective.base import Loss, Objective
from llmlab.objective.kto import KtoConfig
from llmlab.objective.next_token import NextTokenConfig, next_token, next_token_loss
from llmlab.objective.preference import PreferenceConfig
from llmlab.objective.reward import RewardConfig
from llmlab.objective.steps import StepsConfig

# The config section `objective` is the dataclass that its `name` picks here; each knows how to make its loss.
OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextTokenConfig,
    "preference": PreferenceConfig,
    "kto": KtoConfig,
    "reward": RewardConfig,
    "steps": StepsConfig,
}

__all__ = [
    "OBJECTIVES",
    "KtoConfig",
    "Loss",
    "NextTokenConfig",
    "Objective",
    "PreferenceConfig",
    "RewardConfig",
    "StepsConfig",
    "next_token",
    "next_token_loss",
]

"""How long a model may think before it answers."""

from collections.abc import Sequence

from llmlab.core.errors import UserError
from llmlab.infer.request import Limit
from llmlab.serve.fields import Fields
from llmlab.serve.models import Served
from llmlab.serve.prompts import reading

LEAST, MOST = "min_thinking_tokens", "max_thinking_tokens"
_BESIDE = 3  # the two markers, and a token of the answer


async def budget_for(
    fields: Fields, model: Served, stop_ids: tuple[int, ...], prompt: Sequence[int], room: int, answer: Limit | None
) -> Limit | None:
    """What keeps the thinking within the budget that was asked for, and what follows it to `answer`; without a budget
    that alone.

    Args:
      room: tokens that thinking and answer may have together.

    Raises:
      ApiError: the budget cannot be kept.
    """
    if LEAST not in fields and MOST not in fields:
        return answer
    least = fields.integer(LEAST, 0, 0, model.reach)
    most = fields.integer(MOST, model.reach, 0, model.reach)
    if most < least:
        raise fields.wrong(MOST, f"{most:,} should be at least {LEAST}={least:,}")
    if least and least + _BESIDE > room:
        raise fields.wrong(
            LEAST, f"{least:,} leave nothing of {room:,} tokens for an answer: think less, or write more"
        )
    try:
        thinking = await reading(model.thinking, stop_ids)
    except UserError as error:
        raise fields.wrong(LEAST if LEAST in fields else MOST, str(error)) from None
    return thinking.budget(prompt, least, most, answer)

"""What one request may ask for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """body: bytes of a request. seconds: that one may take; body_seconds: to arrive. prompts: in one request. n: of
    each, samples. turns: of a conversation. stops, stop_length: stop strings, and characters of one. biases: entries
    of logit_bias.
    """

    body: int = 2**20
    seconds: float = 600.0
    body_seconds: float = 30.0
    prompts: int = 256
    n: int = 16
    turns: int = 2048
    stops: int = 16
    stop_length: int = 256
    biases: int = 1024

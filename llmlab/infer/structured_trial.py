"""A process of its own that compiles a structure and makes its first mask, within limits on time and memory.

    python -P structured_trial.py SECONDS BYTES STATES < grammar

What is wrong with the structure comes out as JSON; where there is no answer, it was too much. Imports nothing of ours,
so that it starts soon.
"""

import json
import os
import resource
import sys


def main() -> None:
    """Reads a grammar, and prints what is wrong with it, or ""."""
    os.nice(10)  # those who write now come first
    seconds, size, states = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llguidance

    limits = llguidance.LLParserLimits(max_lexer_states=states, verbose_errors=False)
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, sys.stdin.read(), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print(json.dumps(matcher.get_error()))


if __name__ == "__main__":
    main()

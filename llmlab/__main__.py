"""`python -m llmlab` is `llmlab`."""

from llmlab.cli import main

main()

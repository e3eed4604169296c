"""The verb that answers over HTTP: serve."""

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.errors import UserError
from llmlab.core.flags import none_left
from llmlab.verbs.common import Verb, start_jax
from llmlab.verbs.indexing import finder


def _define_serve(flags: FlagValues, argv: list[str]) -> None:
    f.DEFINE_list("workdir", [], "The run to serve, or several: NAME=DIR,NAME2=DIR2.", flag_values=flags)
    f.DEFINE_string("host", "127.0.0.1", "The address to listen on; by default this machine alone.", flag_values=flags)
    f.DEFINE_integer("port", 8000, "The port; 0 is any that is free.", flag_values=flags)
    f.DEFINE_string("api_key_file", "", "A file with a key a line; every request needs one.", flag_values=flags)
    f.DEFINE_bool("open", False, "Let others in without a key.", flag_values=flags)
    f.DEFINE_integer("slots", 8, "Requests that run at once.", flag_values=flags)
    f.DEFINE_integer("queue", 64, "Requests that may wait; more are refused.", flag_values=flags)
    f.DEFINE_integer("pages", 0, "Pages of 16 tokens in the cache; 0 is enough for all slots.", flag_values=flags)
    f.DEFINE_integer("prefill", 128, "Tokens of a prompt that are read at a time.", flag_values=flags)
    f.DEFINE_bool("int8", False, "Keep keys and values in 8 bits.", flag_values=flags)
    f.DEFINE_float("seconds", 600.0, "The longest that one request may take.", flag_values=flags)
    f.DEFINE_string(
        "index", "", "What `llmlab index` made: passages for who asks with passages=true.", flag_values=flags
    )
    f.DEFINE_integer("passages", 3, "Passages that come with a question.", lower_bound=1, flag_values=flags)
    f.DEFINE_string("preferences", "", "Where votes go; else preferences.jsonl in the workdir.", flag_values=flags)
    f.DEFINE_string(
        "reward",
        "",
        "The run of a reward model, or of one that writes, which chooses the best_of answers.",
        flag_values=flags,
    )


def _serve(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serving needs starlette and uvicorn: pip install 'llmlab[serve]'") from None
    start_jax()
    import llmlab
    from llmlab.infer.engine import EngineConfig
    from llmlab.serve.command import ServeConfig, serve_command
    from llmlab.serve.limits import Limits

    config = ServeConfig(
        workdirs=tuple(flags.workdir),
        host=flags.host,
        port=flags.port,
        key_file=flags.api_key_file,
        open=flags.open,
        queue=flags.queue,
        preferences=flags.preferences,
        reward=flags.reward,
        engine=EngineConfig(slots=flags.slots, pages=flags.pages, prefill=flags.prefill, int8=flags.int8),
        limits=Limits(seconds=flags.seconds),
    )
    serve_command(
        config, llmlab.open, (lambda opened: finder(opened, flags.index, flags.passages)) if flags.index else None
    )


VERBS = {
    "serve": Verb(
        "answer OpenAI's API, and show a page to talk to",
        "--workdir=DIR [--port=8000] [--index=DIR]",
        "Example:  llmlab serve --workdir=runs/assistant/dpo   then open http://127.0.0.1:8000\n"
        "\n"
        "Any client of OpenAI's works:  OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none'). Also there:\n"
        "/v1/completions, /v1/embeddings, /v1/models, /tokenize, /detokenize, /health, /metrics. A request names its\n"
        "model, or gets the first. To let other machines in: --host=0.0.0.0 --api_key_file=FILE.\n"
        "\n"
        "A chat may think longer: min_thinking_tokens and max_thinking_tokens bound its thinking, and best_of=8 draws\n"
        "eight answers and gives the one that most agree with; with --reward=WORKDIR, the one of the highest reward.",
        _define_serve,
        _serve,
    ),
}

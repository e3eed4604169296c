"""Floor 4: a trained model writes, to a prompt or in a conversation.

Tokens             sampling: from logits to a token; generate: a batch in one compiled loop, or one row as a stream;
                   decoder: what of a model both they and the engine need
The engine         engine: requests that come and go; request: what it is asked; engine_run, engine_step, engine_device:
                   requests as arrays, what runs on the device, what lies there; paging: whose pages are whose;
                   speculative: guesses; service: a thread around it, for callers of asyncio
Text               text_stream: tokens to text as they come, up to a stop string; stream: `llmlab sample`
Forms              structured: schemas, expressions and grammars as masks; structured_schema: what of a schema is
                   refused; structured_trial: a process that tries what may be costly; thinking: how long the span
                   before an answer is
Conversations      chat: a reply, and the calls in it; spoken: an answer's parts as they come; tools: what may be called
Retrieval          passages: files in pieces; embed: texts as vectors; retrieval: an index, and questions with passages
People             talk, rank: at a `terminal` they talk, and put answers in order; kept: the rows that come of it

May import core, kernels, data, model, objective and workdir; never train or eval.
"""

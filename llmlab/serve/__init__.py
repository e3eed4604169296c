"""Floor 6: the HTTP API, in the form that clients of OpenAI's expect, and the page to talk to. May import everything
below; never scaling or report.

`app` wires it; `door` is who may come in, and for how long; `fields` reads what was asked; each endpoint has its file.
"""

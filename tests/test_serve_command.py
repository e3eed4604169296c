"""`llmlab serve`: what is refused before anything is read, and a real process from its first line to SIGTERM."""

import asyncio
import json
import re
import signal
import socket
import threading

import httpx
import pytest

from llmlab.core.errors import UserError
from llmlab.serve.command import ServeConfig, is_loopback, listen, named, read_keys, serve_command
from tests.runs import Place
from tests.serve_for_tests import serving


@pytest.mark.parametrize(
    "given, says",
    [
        ({"workdirs": ()}, "--workdir is missing"),
        ({"host": "0.0.0.0"}, "give --api_key_file=FILE"),
        ({"host": "box.example"}, "give --api_key_file=FILE"),
        ({"port": 70000}, "from 0"),
        ({"queue": -1}, "at least 0"),
    ],
)
def test_what_cannot_be_served(given, says):
    with pytest.raises(UserError, match=says):
        ServeConfig(**{"workdirs": ("runs/a",)} | given)


def test_beyond_this_machine_with_a_key_or_when_told_so():
    ServeConfig(("a",), host="0.0.0.0", open=True)
    ServeConfig(("a",), host="::", key_file="keys")
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "10.0.0.1")] == [True] * 3 + [
        False
    ] * 2


def test_names_of_models():
    assert named(("runs/a/", "b=runs/c=d")) == {"a": "runs/a/", "b": "runs/c=d"}
    for wrong in (("=runs/a",), ("a=",), ("x/a", "y/a")):
        with pytest.raises(UserError):
            named(wrong)


def test_keys_in_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# whose\n\n  0123456789abcdef  \nfedcba9876543210\n")
    assert read_keys(str(file)) == ["0123456789abcdef", "fedcba9876543210"]
    for wrong in ("", "short\n", "é" * 20):
        file.write_text(wrong)
        with pytest.raises(UserError, match="at least 16 plain characters"):
            read_keys(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(str(tmp_path / "none"))


def test_a_port_in_use_is_said_before_a_model_is_read():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            serve_command(ServeConfig(("a",), port=taken.getsockname()[1]), lambda folder: pytest.fail("read"))


def test_what_is_sent_does_not_wait_for_more():
    """Nagle's algorithm holds a piece of a stream back until the client has confirmed the one before, up to 40 ms."""
    sent_at_once = []

    async def answer(reader, writer):
        sent_at_once.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def ask():
        async with await asyncio.start_server(answer, sock=listen("127.0.0.1", 0)) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await reader.read()
            writer.close()

    asyncio.run(ask())
    assert len(sent_at_once) == 1
    assert sent_at_once[0]


@pytest.mark.slow
def test_sigterm_finishes_what_was_admitted_and_refuses_the_rest(tmp_path):
    place = Place(tmp_path)
    place.train(tmp_path / "run", "--config.run.steps=4", "--config.model.max_positions=2048")
    with serving(place, tmp_path / "run", "--slots=2") as (url, process, said):
        assert re.search(r"tiny: compiled \d+ shapes in", said), said
        assert "tiny: completions, 2,048 positions, step 4" in said
        began, answers = threading.Barrier(4), []

        def ask():
            asked = {"prompt": "the", "max_tokens": 1500, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=300) as answer:
                chunks = answer.iter_lines()
                first = [next(chunks)]
                began.wait()
                answers.append([line for line in [*first, *chunks] if line])

        threads = [threading.Thread(target=ask) for _ in range(2)]
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "of"}, timeout=300))
        )
        for thread in threads:
            thread.start()
        waiting.start()
        threading.Thread(target=began.wait).start()
        began.wait()
        while 'llmlab_waiting{model="tiny"} 1' not in httpx.get(f"{url}/metrics").text:
            pass
        process.send_signal(signal.SIGTERM)
        while True:
            try:
                assert httpx.get(f"{url}/health", timeout=5).status_code == 200
            except httpx.ConnectError:
                break
        assert process.poll() is None
        for thread in (*threads, waiting):
            thread.join()
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
        assert "what was begun is finished" in rest
    whole = [answer for answer in answers if isinstance(answer, httpx.Response)]
    assert [answer.status_code for answer in whole] == [200]
    for streamed in (answer for answer in answers if isinstance(answer, list)):
        assert streamed[-1] == "data: [DONE]"
        assert json.loads(streamed[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert len(answers) == 3

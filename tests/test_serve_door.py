"""Who gets in, who is turned away, and that whoever leaves takes nothing with them."""

import asyncio
import contextlib
import json
import socket
import threading

import httpx
import openai
import pytest

from llmlab.serve.limits import Limits
from tests.serve_for_tests import CONFIG, opened_model, running, until

KEY = "a-key-of-some-length"
LONG = {"prompt": "the", "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def opened():
    return opened_model()


@pytest.fixture(scope="module")
def server(opened, tmp_path_factory):
    limits = Limits(body=2**16, seconds=30, body_seconds=0.3)
    with running(tmp_path_factory.mktemp("serve"), {"tiny": opened}, queue=1, limits=limits, hosts=("box",)) as made:
        yield made


@pytest.fixture(scope="module")
def keyed(opened, tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve"), {"tiny": opened}, keys=(KEY, "another-key-of-some-length")) as made:
        yield made


def at_rest(service):
    return service.load["running"] == service.load["waiting"] == service.load["pages_used"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server, stream):
    body = json.dumps(LONG | {"stream": stream, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    cancelled = server.service.metrics.finished["cancelled"]
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
        client.sendall(head + body)
        until(lambda: server.service.load["running"] == 4)
    until(lambda: at_rest(server.service))
    assert server.service.metrics.finished["cancelled"] == cancelled + 4


def test_who_comes_when_all_is_full_is_told_when_to_come_again(server):
    answers = []

    def ask():
        answers.append(httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(CONFIG.slots + 1)]
    for thread in threads:
        thread.start()
    until(lambda: server.service.load["running"] + server.service.load["waiting"] == CONFIG.slots + 1)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.completions.create(model="tiny", prompt="a", max_tokens=2)
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * (CONFIG.slots + 1)


@pytest.mark.parametrize(
    "path, body",
    [
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("completions", {"prompt": [1], "response_format": {"type": "regex", "regex": "a+"}}),
    ],
)
def test_who_is_refused_has_cost_nothing(server, monkeypatch, path, body):
    model = server.models["tiny"]
    monkeypatch.setattr(type(model.opened.tokenizer), "encode", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr("llmlab.serve.formats._limit", lambda *_: pytest.fail("compiled"))
    with contextlib.ExitStack() as places:
        asyncio.run(_take_all(places, model.service))
        assert httpx.post(f"{server.url}/v1/{path}", json=body).status_code == 429
    until(lambda: at_rest(server.service))


async def _take_all(places, service):
    places.enter_context(service.admit(service.capacity))


def test_keys(keyed):
    def asked(key):
        with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
            return [model.id for model in client.models.list()]

    assert asked(KEY) == asked("another-key-of-some-length") == ["tiny"]
    for wrong in ("none", KEY[:-1], KEY + "x", "é" * 20):
        with pytest.raises(openai.AuthenticationError):
            asked(wrong) if wrong.isascii() else _raise(keyed, wrong)
    assert httpx.get(f"{keyed.url}/metrics").status_code == 401
    assert httpx.get(f"{keyed.url}/health").status_code == httpx.get(f"{keyed.url}/").status_code == 200


def _raise(keyed, key):
    answer = httpx.get(f"{keyed.url}/v1/models", headers=[(b"Authorization", f"Bearer {key}".encode())])
    assert answer.status_code == 401
    raise openai.AuthenticationError("", response=answer, body=None)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "["}, 403),
        ({"Host": "BOX:1"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:9", "Origin": "http://localhost:9"}, 200),
    ],
)
def test_pages_from_elsewhere_stay_outside(server, headers, status):
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status


def test_the_page_may_run_its_own_script_and_nothing_else(server):
    answer = httpx.get(f"{server.url}/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")


def test_a_body_that_is_too_large_or_never_comes(server):
    assert httpx.post(f"{server.url}/v1/completions", content=b"x" * 2**17).status_code == 413

    def pieces():
        for _ in range(3):
            yield b"x" * 2**15

    assert httpx.post(f"{server.url}/v1/completions", content=pieces()).status_code == 413
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    assert at_rest(server.service)


def test_an_answer_that_takes_too_long(opened, tmp_path):
    with running(tmp_path, {"tiny": opened}, limits=Limits(seconds=0.01)) as server:
        late = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (400, "time_limit")
        lines = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "time_limit"
        assert lines[-1] == "data: [DONE]"
        until(lambda: at_rest(server.service))


def test_an_engine_that_has_stopped_says_so(opened, tmp_path, monkeypatch):
    with running(tmp_path, {"tiny": opened}) as server:
        monkeypatch.setattr(server.service._engine, "step", lambda: 1 / 0)
        for _ in range(2):
            failed = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_stopped")
        assert httpx.get(f"{server.url}/health").status_code == 503

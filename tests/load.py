"""Clients of a server, in a process of their own, so that they and it do not wait for one lock.

    python -m tests.load crowd URL PID RATE SECONDS    so many requests a second, whatever becomes of them
    python -m tests.load steady URL                    one stream after the other, until stdin ends

What came of it is printed as JSON. The crowd sends texts and conversations, short and long, streamed or not; every
fifth client goes away before it has its answer.
"""

import asyncio
import json
import os
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

WORDS = ["the", "of", "and", "a", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with"]


def random_ask(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    body = {"max_tokens": rng.randint(100, 500), "ignore_eos": True, "stream": rng.random() < 0.5}
    text = " ".join(rng.choices(WORDS, k=rng.choice([5, 50, 200])))
    if rng.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    turns = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    return "/v1/chat/completions", body | {"messages": turns}


class Crowd:
    """What came of it. refused: seconds until each refusal, and those in which there was no core for it. ends: how
    often each end was. taken: how many requests the server had, over and over.
    """

    def __init__(self, url: str, pid: int):
        self.refused: list[tuple[float, float]] = []
        self.ends: dict[str, int] = {}
        self.taken: list[int] = []
        self._pids = pid, os.getpid()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._client = httpx.AsyncClient(base_url=url, timeout=300, limits=limits)

    async def run(self, rate: float, seconds: float) -> None:
        """Sends at this rate, and waits for the last answer."""
        rng, watching = random.Random(0), asyncio.create_task(self._watch())
        end = time.perf_counter() + seconds
        async with self._client:
            async with asyncio.TaskGroup() as group:
                while time.perf_counter() < end:
                    group.create_task(self._one(rng))
                    await asyncio.sleep(rng.expovariate(rate))
            watching.cancel()

    async def _one(self, rng: random.Random) -> None:
        path, body = random_ask(rng)
        try:
            async with asyncio.timeout(rng.expovariate(1.0) if rng.random() < 0.2 else None):
                end = await self._asked(path, body)
        except TimeoutError:
            end = "gone"
        self.ends[end] = self.ends.get(end, 0) + 1

    async def _asked(self, path: str, body: dict[str, Any]) -> str:
        begun, waited = time.perf_counter(), self._waited()
        async with self._client.stream("POST", path, json=body) as answer:
            text = (await answer.aread()).decode()
            if answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0:
                self.refused.append((time.perf_counter() - begun, max(map(float.__sub__, self._waited(), waited))))
            if answer.status_code != 200:
                return str(answer.status_code)
        chunks = text.removeprefix("data: ").split("\n\ndata: ")
        if body["stream"] and chunks.pop() != "[DONE]\n\n":
            return "cut"
        return str(json.loads(chunks[-1])["choices"][0]["finish_reason"])

    def _waited(self) -> list[float]:
        """Seconds for which the server's event loop, and this process, could have run, had there been a core."""
        return [int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9 for pid in self._pids]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            text = (await self._client.get("/metrics")).text
            self.taken.append(sum(map(int, re.findall(r"^llmlab_(?:running|waiting){.*} (\d+)$", text, re.MULTILINE))))


def steady(url: str) -> list[list[float]]:
    """Of each request: when it was sent, and when each piece of its text came."""
    asked, done = {"prompt": "the", "max_tokens": 24, "ignore_eos": True, "stream": True}, threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    seen = []
    with httpx.Client(base_url=url, timeout=300) as client:
        while not done.is_set():
            begun = time.monotonic()
            with client.stream("POST", "/v1/completions", json=asked) as answer:
                answer.raise_for_status()
                lines = [(time.monotonic(), line) for line in answer.iter_lines() if line]
            assert '"finish_reason":"length"' in lines[-2][1], lines
            seen.append([begun, *(when for when, _ in lines[:-1])])
            time.sleep(0.01)
    return seen


def main() -> None:
    """Prints what came of it."""
    kind, url, *numbers = sys.argv[1:]
    if kind == "steady":
        print(json.dumps(steady(url)))
        return
    pid, rate, seconds = int(numbers[0]), float(numbers[1]), float(numbers[2])
    crowd = Crowd(url, pid)
    asyncio.run(crowd.run(rate, seconds))
    print(json.dumps({name: value for name, value in vars(crowd).items() if not name.startswith("_")}))


if __name__ == "__main__":
    main()

"""Work beside the event loop: what it gives, and that no more of it is taken in than is said."""

import asyncio
import threading

import pytest

from llmlab.infer.service import Overloaded
from llmlab.serve.beside import Beside


def test_more_than_can_be_waited_for_is_refused():
    async def asked():
        beside, gate = Beside("test", most=2), threading.Event()
        first, second = (asyncio.create_task(beside(gate.wait, 20)) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await beside(str)
        second.cancel()
        await asyncio.wait([second])
        third = asyncio.create_task(beside(divmod, 7, 2))
        await asyncio.sleep(0)
        first.cancel()  # it is on its thread already, and keeps its place
        await asyncio.wait([first])
        with pytest.raises(Overloaded):
            await beside(str)
        gate.set()
        assert await third == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await beside(divmod, 7, 0)
        assert await asyncio.gather(*(beside(abs, -number) for number in range(2))) == [0, 1]

    asyncio.run(asyncio.wait_for(asked(), 20))

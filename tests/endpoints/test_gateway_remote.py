"""How requests are stopped that a server elsewhere answers."""

import asyncio
from collections.abc import Callable

import pytest

from ml_assets.endpoints.gateway.remote import Stoppable


class Late(Exception):
    pass


class Lost(Exception):
    pass


async def run(
    stop: Callable[[Stoppable, Stoppable], None],
) -> tuple[Exception | None, Exception | None, bool]:
    """(what the inner block raised, what the outer one raised, whether the connection was closed) of a task
    in two blocks that others stop while it reads from a connection which takes a while to close."""
    reading, closing = asyncio.Event(), asyncio.Event()
    blocks: list[Stoppable] = []
    closed = False

    async def read() -> None:
        nonlocal closed
        try:
            reading.set()
            await asyncio.sleep(60)
        finally:
            closing.set()
            for _ in range(5):
                await asyncio.sleep(0)
            closed = True

    async def work() -> tuple[Exception | None, Exception | None]:
        task = asyncio.current_task()
        assert task
        outer, inner = Stoppable(task), Stoppable(task)
        blocks.extend([outer, inner])
        lost: Exception | None = None
        try:
            with outer:
                try:
                    with inner:
                        await read()
                except Lost as error:
                    lost = error
                    outer.check()
        except Late as late:
            return lost, late
        return lost, None

    task = asyncio.create_task(work())
    await reading.wait()
    outer, inner = blocks
    stop(outer, inner)
    await closing.wait()
    for block in (outer, inner):  # what comes while it is being closed must not interrupt that
        block.stop(Late() if block is outer else Lost())
    lost, late = await task
    assert not task.cancelling(), "no cancellation is left over for what the task does next"
    return lost, late, closed


def test_the_block_that_is_stopped_raises_the_reason() -> None:
    late = Late()
    assert asyncio.run(run(lambda outer, _: outer.stop(late))) == (None, late, True)


def test_a_reason_that_comes_second_is_kept() -> None:
    lost = Lost()
    inner_raised, outer_raised, closed = asyncio.run(run(lambda _, inner: inner.stop(lost)))
    assert inner_raised is lost and isinstance(outer_raised, Late) and closed


def test_both_at_once() -> None:
    def both(outer: Stoppable, inner: Stoppable) -> None:
        inner.stop(Lost())
        outer.stop(Late())

    inner_raised, outer_raised, closed = asyncio.run(run(both))
    assert isinstance(inner_raised, Lost) and isinstance(outer_raised, Late) and closed


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def cancelled() -> None:
        async def work() -> None:
            task = asyncio.current_task()
            assert task
            with (block := Stoppable(task)):
                block.stop(Late())
                task.cancel()  # a shutdown
                await asyncio.sleep(60)

        await asyncio.create_task(work())

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())

"""Requests that a server elsewhere answers: what the engines for vLLM and for hosted models share."""

import asyncio
import math
from collections.abc import AsyncIterator
from types import TracebackType

import httpx

from ml_assets.endpoints.gateway.engine import Generation, Version
from ml_assets.endpoints.gateway.errors import ApiError


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events. httpx's own `aiter_lines` also ends them at U+2028, U+2029
    and U+0085, which JSON holds as they are."""
    rest = b""
    async for data in response.aiter_bytes():
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r").decode("utf-8", "replace")
    if rest:
        yield rest.rstrip(b"\r").decode("utf-8", "replace")


class Stoppable:
    """A block of a task that others end early: the block then raises what was given to `stop`.

    Of all who stop one task, also by blocks within each other, only the first cancels it. A second
    cancellation would reach the HTTP client while it closes the connection because of the first, and leave
    it open, with a server behind it that goes on computing.
    """

    def __init__(self, task: asyncio.Task[None]):
        self.task = task
        self.why: Exception | None = None
        self._cancelled = False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._cancelled and kind is asyncio.CancelledError and not self.task.uncancel():
            assert self.why
            raise self.why from None

    def stop(self, why: Exception) -> None:
        """End the block. Where another is ending the task already, `why` is only kept, for `check`."""
        self.why = self.why or why
        if not self.task.cancelling():
            self._cancelled = self.task.cancel()

    def check(self) -> None:
        """Raise what `stop` was given, if it was called: to be asked before the task begins anew."""
        if self.why:
            raise self.why


class Work(Stoppable):
    """A request under way; `began` once something of its answer was passed on."""

    began = False


class RemoteRequests:
    """Follows requests, each a task on the event loop. A subclass says in `_answer` how one is answered."""

    def __init__(self) -> None:
        self._work: dict[Generation, Work] = {}

    def waiting(self) -> dict[Version, int]:
        """Requests of whose answer nothing has come, by version."""
        counts: dict[Version, int] = {}
        for request, work in list(self._work.items()):
            counts[request.version] = counts.get(request.version, 0) + (not work.began)
        return counts

    def cancel(self, request: Generation) -> None:
        """Stop a request; the server stops when the connection closes."""
        request.cancelled = True
        if not request.finished and (work := self._work.get(request)):
            work.stop(ApiError(499, "client_disconnected", "the client went away"))

    def _begin(self, request: Generation, most: int) -> None:
        """Begin to answer. Raises ApiError 429 when `most` requests of its version wait."""
        waiting = self.waiting().get(request.version, 0)
        if waiting >= most:
            name = request.version.customization
            message = f"{waiting} requests for {name!r} are waiting already; try again in 2 s"
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "2"})
        task = asyncio.create_task(self._run(request))
        self._work[request] = Work(task)
        task.add_done_callback(lambda _: self._done(request))

    def _done(self, request: Generation) -> None:
        del self._work[request]
        if not request.finished and not request.cancelled:
            request.fail(ApiError(503, "shutting_down", "the gateway is shutting down"))

    async def _run(self, request: Generation) -> None:
        work, late = self._work[request], None
        if math.isfinite(request.deadline):  # by time.monotonic, which is the event loop's clock
            late = asyncio.get_running_loop().call_at(request.deadline, work.stop, request.too_late())
        try:
            with work:
                await self._answer(request)
        except ApiError as error:
            request.fail(error)
        finally:
            if late:
                late.cancel()

    async def _answer(self, request: Generation) -> None:
        """Feed the request to its end. An ApiError is what the client is told."""
        raise NotImplementedError

"""Requests that a server elsewhere answers: what the engines for vLLM and for hosted models share."""

import asyncio
from dataclasses import dataclass

from ml_assets.endpoints.gateway.engine import Generation, Version
from ml_assets.endpoints.gateway.errors import ApiError


@dataclass
class Work:
    """A request under way; `began` once something of its answer was passed on."""

    task: asyncio.Task[None]
    began: bool = False


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
            work.task.cancel()

    def _begin(self, request: Generation, most: int) -> None:
        """Begin to answer. Raises ApiError 429 when `most` requests of its version wait."""
        waiting = self.waiting().get(request.version, 0)
        if waiting >= most:
            name = request.version.customization
            message = f"{waiting} requests for {name!r} are waiting already; try again in 2 s"
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "2"})
        task = asyncio.create_task(self._answer(request))
        self._work[request] = Work(task)
        task.add_done_callback(lambda _: self._done(request))

    def _done(self, request: Generation) -> None:
        del self._work[request]
        if not request.finished and not request.cancelled:
            request.fail(ApiError(503, "shutting_down", "the gateway is shutting down"))

    async def _answer(self, request: Generation) -> None:
        raise NotImplementedError

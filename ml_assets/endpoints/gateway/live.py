"""Requests that one base answers at the same time: one decoder for all versions on it, bounded in memory."""

from typing import TYPE_CHECKING

from ml_assets.endpoints.gateway.errors import ApiError

if TYPE_CHECKING:
    from ml_assets.endpoints.gateway.engine import Generation
    from ml_assets.engine.generation import Row
    from ml_assets.engine.loading import Base

ROWS = 32
"""Requests that one base answers at the same time."""
SHARE = ROWS * 3 // 4
"""Those of one customization, where a base has several: others find room while its answers go on."""
KV_BYTES = 2 * 2**30
"""Keys and values of the requests that are answered on one base."""
PREFIX_BYTES = 512 * 2**20
"""Keys and values of system prompts and other beginnings that are kept for later requests to one base."""


class Live:
    """The requests under way on one base. Only the computing thread uses it."""

    def __init__(self, base: "Base", kv_bytes: int, prefix_bytes: int):
        from ml_assets.engine.generation import Decoder, FallbackDecoder, PrefixCache, token_bytes

        self.cache = PrefixCache(prefix_bytes)
        self.decoder = Decoder(base, cache=self.cache) if base.packs else FallbackDecoder(base)
        self.requests: dict[Row, Generation] = {}
        self._tokens = kv_bytes // token_bytes(base)

    def of_customization(self, name: str) -> int:
        """How many requests of a customization are under way."""
        return sum(request.version.customization == name for request in self.requests.values())

    def join(self, request: "Generation") -> bool:
        """Begin to answer; False when there is no room for it now."""
        from ml_assets.engine.generation import Row

        row = Row(
            request.prompt,
            request.max_new_tokens,
            request.version.adapter_digest,
            request.temperature,
            request.top_p,
            request.seed,
            scored=True,
        )
        if len(self.requests) >= ROWS:
            return False
        if self.requests and self.decoder.tokens_with([row]) > self._tokens:
            return False
        self.decoder.add(row)
        self.requests[row] = request
        return True

    def step(self) -> int:
        """One step of the decoder; returns the tokens that it gave."""
        events = self.decoder.step()
        for row, token, reason in events:
            request = self.requests[row]
            request.feed(token, reason, row.logprob)
            if request.finished:
                self._drop(row)
        return len(events)

    def stop_where(self, now: float) -> None:
        """Give up what nobody waits for any more, or whose time is over."""
        for row, request in list(self.requests.items()):
            if not request.finished and not request.cancelled and request.deadline <= now:
                request.fail(request.too_late())
            if request.finished or request.cancelled:
                request.finished = True
                self._drop(row)

    def fail(self, error: ApiError) -> None:
        for request in self.requests.values():
            if not request.finished:
                request.fail(error)

    def _drop(self, row: "Row") -> None:
        self.decoder.cancel(row)
        del self.requests[row]

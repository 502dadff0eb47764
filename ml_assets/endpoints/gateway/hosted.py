"""Hosted bases as an engine: requests go to the provider's URL, with the examples of the adapter before the
question.

A provider that is busy or fails is asked again, ever later or when it says, as long as the request's time
allows and nothing of the answer was passed on. What a provider says is passed on without the key.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from ml_assets.base_models.hosted import identity
from ml_assets.endpoints.gateway.engine import BaseText, Generation, Version
from ml_assets.endpoints.gateway.errors import ApiError
from ml_assets.endpoints.gateway.remote import RemoteRequests, lines
from ml_assets.engine.hosted import (
    Dialect,
    HostedError,
    Provider,
    Reply,
    Secret,
    asked_for_labels,
    estimate,
    estimate_answer,
    exact_label,
    wait_seconds,
)
from ml_assets.spec import HostedBase

PATH = "/chat/completions"
PROBE_SECONDS = 600.0
"""A fingerprint that was measured is believed for that long, while the provider lists the same model: each
measurement is paid for, and health checks ask every minute."""
CLOSE_SECONDS = 2.0

T = TypeVar("T")
log = logging.getLogger("evergreen.gateway")


class Changed(Exception):
    """The provider serves another revision than the one that was released."""


@dataclass(eq=False)
class HostedText(BaseText):
    """Conversations of a hosted base: only about how many tokens they have is known. `http` is its own, since
    it carries the key."""

    provider: Provider = field(kw_only=True)
    source: HostedBase = field(kw_only=True)
    manifest: Mapping[str, Any] = field(kw_only=True)
    http: httpx.AsyncClient = field(kw_only=True)
    slots: asyncio.Semaphore = field(kw_only=True)
    users: set[Version] = field(default_factory=set)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise NotImplementedError("a hosted base's tokens are not known here")

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        return estimate(self.manifest, messages)

    def is_longer(self, messages: Sequence[Mapping[str, str]], limit: int) -> bool:
        return False  # `count` takes no time


class HostedEngine(RemoteRequests):
    """The client of all providers. State changes on the event loop that `start` was called on; `load` and
    `measure` are for other threads, the rest for the loop. `secret` gives environment variables."""

    def __init__(self, secret: Secret = os.environ.get):
        super().__init__()
        self._secret = secret
        self._texts: dict[str, HostedText] = {}
        self._measured_at: weakref.WeakKeyDictionary[Version, float] = weakref.WeakKeyDictionary()
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._lock = threading.Lock()
        self._closing: set[asyncio.Future[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Call on the event loop."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Requests under way fail."""
        self._closed = True
        with self._lock:
            for call in self._calls:
                call.cancel()
        tasks = [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for text in self._texts.values():
            await text.http.aclose()

    # -- for the loading threads -----------------------------------------------------------------------

    def load(self, version: Version, adapter: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        """Set `version.loaded`. Raises ApiError 409: the adapter is for another base, or the key is not in
        this gateway's environment."""
        if adapter.get("base_identity") != base["identity"]:
            message = f"adapter {version.adapter_digest[:12]}: made for base {adapter.get('base_identity')}"
            raise ApiError(409, "incompatible_adapter", f"{message}, expected {base['identity']}")
        version.loaded = self._call(self._text(version, base))

    def measure(self, version: Version) -> dict[str, list[float]]:
        """The tokens that the provider counts in the probes with the examples, and without. Raises ApiError:
        503 when it does not answer, 409 when it refuses, or lists another model by this name."""
        return self._call(self._measure(version))

    def unload(self, version: Version) -> None:
        """Forget a version that has no request any more; returns at once."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._forget, version)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                work.close()
                raise ApiError(503, "shutting_down", "the gateway is shutting down")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._calls.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ApiError(503, "shutting_down", "the gateway is shutting down") from None
        finally:
            with self._lock:
                self._calls.discard(future)

    async def _text(self, version: Version, manifest: Mapping[str, Any]) -> HostedText:
        digest = version.base_digest
        source = HostedBase(**manifest["source"])
        try:
            provider = Provider.of(manifest["source"], Dialect.of(manifest["dialect"]), self._secret)
        except HostedError as error:
            raise ApiError(409, "no_provider_key", str(error)) from None
        known = self._texts.get(digest)
        if known is not None and known.provider == provider:
            known.users.add(version)
            return known
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=source.at_once)
        self._texts[digest] = HostedText(
            digest,
            None,  # type: ignore[arg-type]
            None,
            manifest["context_length"],
            provider=provider,
            source=source,
            manifest=manifest,
            http=httpx.AsyncClient(limits=limits, **provider.client_options),
            slots=asyncio.Semaphore(source.at_once),
            users={version},
        )
        return self._texts[digest]

    def _forget(self, version: Version) -> None:
        text = version.loaded
        if not isinstance(text, HostedText) or version not in text.users:
            return
        text.users.discard(version)
        if text.users:
            return
        if self._texts.get(text.digest) is text:  # not one with a newer key
            del self._texts[text.digest]
        closing = asyncio.ensure_future(text.http.aclose())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _measure(self, version: Version) -> dict[str, list[float]]:
        text = _text_of(version)
        try:
            # a thread: it is the same code that sensors use
            found = await asyncio.to_thread(identity, text.source, self._secret)
            if found != text.manifest["identity"]:
                raise Changed(f"{text.provider.url} serves another revision of {text.provider.model} now")
            age = time.monotonic() - self._measured_at.get(version, -math.inf)
            if version.measured and age < PROBE_SECONDS:
                return version.measured
            measured: dict[str, list[float]] = {"with": [], "without": []}
            for probe in version.fingerprint["probes"]:
                for kind, messages in (
                    ("with", version.shown(probe["messages"])),
                    ("without", probe["messages"]),
                ):
                    reply = await self._retried(text, messages, 1)
                    measured[kind].append(float(reply.prompt_tokens))
        except Changed as error:
            raise ApiError(409, "provider_changed", str(error)) from None
        except HostedError as error:
            code = "provider_unavailable" if error.transient else "provider_refused"
            raise ApiError(503 if error.transient else 409, code, str(error)) from None
        self._measured_at[version] = time.monotonic()
        return measured

    async def _retried(
        self, text: HostedText, messages: Sequence[Mapping[str, str]], max_tokens: int
    ) -> Reply:
        attempt = 1
        while True:
            try:
                return await self._whole(text, text.provider.body(messages, max_tokens))
            except HostedError as error:
                pause = wait_seconds(error, attempt)
                if pause is None or attempt >= text.provider.attempts:
                    raise
            attempt += 1
            await asyncio.sleep(pause)

    async def _whole(self, text: HostedText, body: Mapping[str, Any]) -> Reply:
        """An answer in one piece."""
        provider, start = text.provider, time.perf_counter()
        try:
            response = await text.http.post(f"{provider.url}{PATH}", json=body)
        except httpx.HTTPError as error:
            raise provider.lost(PATH, error) from None
        provider.check(PATH, response)
        return provider.reply(PATH, provider.json(PATH, response), time.perf_counter() - start)

    # -- requests, on the loop -------------------------------------------------------------------------

    def problem(self, version: Version) -> str | None:
        """Why it can't answer now: nothing is known of a provider before it is asked."""
        return None

    def submit(self, request: Generation, max_queue: int) -> None:
        """Begin to answer a request. Raises ApiError 429 when too many wait."""
        version = request.version
        self._begin(request, max_queue + _text_of(version).source.at_once)

    async def _answer(self, request: Generation) -> None:
        text = _text_of(request.version)
        try:
            async with text.slots:
                await self._attempts(text, request)
        except HostedError as error:
            log.warning("%s: %s", request.version.customization, error)
            raise _for_users(error, self._work[request].began) from None
        except ApiError:
            raise
        except Exception as error:
            # the message could hold anything: what was sent, too
            log.error("%s: a request failed: %s", request.version.customization, type(error).__name__)
            raise ApiError(500, "engine_error", "the model failed on this request") from None

    async def _attempts(self, text: HostedText, request: Generation) -> None:
        work = self._work[request]
        for attempt in range(1, text.provider.attempts + 1):
            work.check()
            try:
                return await self._attempt(text, request)
            except HostedError as error:
                pause = wait_seconds(error, attempt)
                late = pause is None or time.monotonic() + pause >= request.deadline
                if late or attempt == text.provider.attempts or work.began:
                    raise
                log.info("%s: %s; asking again", request.version.customization, error)
            assert pause is not None
            await asyncio.sleep(pause)

    async def _attempt(self, text: HostedText, request: Generation) -> None:
        provider, choices = text.provider, request.version.choices
        messages: Sequence[Mapping[str, str]] = request.messages
        most = request.max_new_tokens
        if choices:
            messages = asked_for_labels(messages, choices)
            most = max(most, *(estimate_answer(text.manifest, label) for label in choices))
        settings: dict[str, Any] = {"temperature": request.temperature}
        if request.temperature > 0:
            settings |= {"top_p": request.top_p, "seed": request.seed & (2**31 - 1)}
        if request.stops and not choices:
            settings["stop"] = request.stops
        if choices or "stream_options" not in provider.dialect.optional:
            reply = await self._whole(text, provider.body(messages, most, **settings))
            request.say(exact_label(reply.text, choices) if choices else reply.text)
            if not request.finished:
                reason = "stop" if choices else reply.finish_reason
                request.end(reason, reply.prompt_tokens, reply.answer_tokens)
            return
        settings |= {"stream": True, "stream_options": {"include_usage": True}}
        await self._stream(text, request, provider.body(messages, most, **settings))

    async def _stream(self, text: HostedText, request: Generation, body: Mapping[str, Any]) -> None:
        """Pass an answer on while it comes."""
        provider, work = text.provider, self._work[request]
        reason: str | None = None
        used: tuple[int, int] | None = None
        try:
            async with text.http.stream("POST", f"{provider.url}{PATH}", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    provider.check(PATH, response)
                async for chunk in _chunks(provider, response):
                    if chunk.get("usage"):
                        used = provider.usage(PATH, chunk["usage"])
                    for choice in chunk.get("choices") or ():
                        said, ended = _delta(provider, choice)
                        reason = ended or reason
                        if said:
                            work.began = True
                            request.say(said)
                        if request.finished:
                            return  # at a stop string: the connection is closed
        except httpx.HTTPError as error:
            raise provider.lost(PATH, error) from None
        if reason is None:
            raise HostedError(f"{provider.url}{PATH}: the answer ended without its end", transient=True)
        if used is None:
            raise provider.wrong(PATH, "usage", "the tokens used, at the end of the stream", None)
        request.end("length" if reason == "length" else "stop", *used)


def _text_of(version: Version) -> HostedText:
    assert isinstance(version.loaded, HostedText), "a version is leased only once it is loaded"
    return version.loaded


async def _chunks(provider: Provider, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream (server-sent events, WHATWG), up to its end."""
    async for line in lines(response):
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            shown = provider.hide(data[:200])
            raise HostedError(
                f"{provider.url}{PATH}: expected JSON in the stream, found {shown!r}", transient=True
            ) from None
        if not isinstance(chunk, dict):
            raise provider.wrong(PATH, "the stream", "JSON objects", chunk)
        if chunk.get("error"):
            said = provider.hide(str(chunk["error"])[:200])
            raise HostedError(f"{provider.url}{PATH}: an error in the stream: {said}", transient=True)
        yield chunk


def _delta(provider: Provider, choice: Any) -> tuple[str, str | None]:
    """(text, why the answer ended) of one choice in a chunk."""
    try:
        said = choice["delta"].get("content") or ""
        ended = choice.get("finish_reason")
    except (KeyError, TypeError, AttributeError):
        raise provider.wrong(PATH, "choices.0.delta", "an object", choice) from None
    if not isinstance(said, str):
        raise provider.wrong(PATH, "choices.0.delta.content", "text", said)
    return said, None if ended is None else str(ended)


def _for_users(error: HostedError, began: bool) -> ApiError:
    """What users are told: nothing of URLs and keys, which are the operator's."""
    if began:
        return ApiError(502, "provider_lost", "the provider was lost while it answered; ask again")
    if error.status == 429:
        after = str(max(1, math.ceil(error.retry_after or 5)))
        message = f"the provider takes no more requests now; try again in {after} s"
        return ApiError(429, "provider_busy", message, headers={"Retry-After": after})
    if error.status in (400, 413, 422):
        said = str(error).partition(f"status {error.status}: ")[2]
        return ApiError(400, "provider_refused_request", f"the provider refuses the request: {said}")
    if error.transient:
        message = "the provider does not answer now"
        return ApiError(503, "provider_unavailable", message, headers={"Retry-After": "5"})
    return ApiError(502, "provider_refused", "the provider refuses this gateway's requests; see its log")

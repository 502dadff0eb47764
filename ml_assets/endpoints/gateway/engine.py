"""The in-process engine: base models in memory, all adapters on them, one thread that computes.

Requests of one adapter version that wait at the same time are decoded as one batch. Every version with work
gets one step in turn, so that a busy customization cannot starve another. A request ends on the version it
began with; a replaced version is detached when its last request is done.
"""

import asyncio
import contextlib
import copy
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore
from ml_assets.endpoints.gateway.errors import ApiError
from ml_assets.endpoints.gateway.text import Detokenizer, StopStrings
from ml_assets.settings import EngineName
from ml_assets.spec import template_columns

if TYPE_CHECKING:
    from ml_assets.endpoints.gateway.vllm import VllmEngine
    from ml_assets.engine.generation import DecodeBatch
    from ml_assets.engine.loading import Base
    from ml_assets.engine.prompting import ChatFormat

ROWS = 8
"""Requests decoded as one batch."""
BATCH_TOKENS = 16384
"""Bound of rows x (prompt + new tokens) of one batch, which bounds the memory of its cache."""
BATCHES = 2
"""Batches of one version at the same time: what arrives during a long answer does not wait for its end."""
ARTIFACT_SUFFIXES = {".json", ".safetensors", ".jinja", ".txt", ".model"}
"""What may be loaded: formats that hold data, not code."""

T = TypeVar("T")
log = logging.getLogger("evergreen.gateway")


@dataclass(eq=False)
class BaseText:
    """Conversations in the tokens of a base. `encode` is for any thread, `tokenizer` for the one that makes
    text of the answers."""

    digest: str
    chat: "ChatFormat"
    tokenizer: Any
    context_length: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation. Raises jinja2.TemplateError when the template refuses it."""
        with self.lock:
            return self.chat.prompt_ids(messages)


@dataclass(eq=False)
class LoadedBase(BaseText):
    """A base in memory. Only the computing thread touches `base`."""

    base: "Base" = field(kw_only=True)


@dataclass(eq=False)
class Version:
    """One adapter on one base, for one customization."""

    customization: str
    base_revision: str
    base_digest: str
    adapter_digest: str
    max_new_tokens: int
    max_prompt_tokens: int | None
    engine: EngineName | None = None
    loaded: BaseText | None = None
    system: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    leases: int = 0
    retired: bool = False

    @property
    def text(self) -> BaseText:
        assert self.loaded is not None, "a version is leased only once it is loaded"
        return self.loaded

    @property
    def ready(self) -> LoadedBase:
        assert isinstance(self.loaded, LoadedBase), "a version of this process is leased once it is loaded"
        return self.loaded

    @property
    def verified(self) -> bool:
        """Whether what was measured last is the fingerprint."""
        return self.fits(self.measured)

    def fits(self, measured: Mapping[str, Sequence[float]]) -> bool:
        """Whether it is the fingerprint: with the adapter, so it is this adapter that answers, and without
        it, so it does so on its own base."""
        from ml_assets.adapters.fingerprint import matches

        bare = matches(self.fingerprint, measured["without"], "without")
        return bare and matches(self.fingerprint, measured["with"])

    def describe(self) -> dict[str, Any]:
        return {
            "customization": self.customization,
            "base_revision": self.base_revision,
            "base_digest": self.base_digest,
            "adapter_digest": self.adapter_digest,
            "engine": self.engine,
        }

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """`messages`, after the system prompt that the adapter was trained with when they bring none."""
        if self.system and not any(message["role"] == "system" for message in messages):
            return [{"role": "system", "content": self.system}, *messages]
        return list(messages)


@dataclass(frozen=True)
class Piece:
    """A part of an answer. `finish_reason` is set in the last one; `tokens` is the count so far."""

    text: str
    tokens: int
    finish_reason: str | None


class Generation:
    """One request in the engine. Iterate over it, once, on the event loop that made it; leaving the iteration
    early cancels the request."""

    def __init__(
        self,
        engine: "Engine",
        version: Version,
        prompt: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stops: Sequence[str],
    ):
        self.version = version
        self.prompt = list(prompt)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = secrets.randbits(63) if seed is None else seed
        self.cancelled = False
        self.finished = False
        self._engine = engine
        tokenizer = version.text.tokenizer
        self._text = Detokenizer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
        self._stops = StopStrings(stops)
        self._tokens = 0
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                item = await self._queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._engine.cancel(self)

    # -- on the computing thread -----------------------------------------------------------------------

    def feed(self, token: int | None, finish_reason: str | None) -> None:
        """Take the outcome of one step."""
        text = ""
        if token is not None:
            self._tokens += 1
            text = self._stops.push(self._text.push(token))
        if finish_reason is not None and not self._stops.found:
            text += self._stops.push(self._text.finish())
            text += self._stops.finish()
        if self._stops.found:
            finish_reason = "stop"
        self.finished = finish_reason is not None
        if text or self.finished:
            self._post(Piece(text, self._tokens, finish_reason))

    def fail(self, error: BaseException) -> None:
        self.finished = True
        self._post(error)

    def _post(self, item: Piece | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


@dataclass(eq=False)
class _Batch:
    decode: "DecodeBatch"
    rows: list[Generation]


class Engine:
    """All that is loaded, and the two threads behind it: one computes, one loads.

    `served` is what answers by customization, `staged` what was loaded and verified beside it, `unserved`
    why a customization of the ledger has no version (`loading`, or the error). Methods are safe to call from
    any thread. Versions whose engine is `vllm` are kept here, too, and computed by `vllm`; `default` is the
    engine of those that name none.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        max_queue: int = 64,
        vllm: "VllmEngine | None" = None,
        default: EngineName = "in_process",
    ):
        self.store = store
        self.max_queue = max_queue
        self.vllm = vllm
        self.default: EngineName = default
        self.served: dict[str, Version] = {}
        self.staged: dict[str, Version] = {}
        self.unserved: dict[str, str] = {}
        self._alive: set[Version] = set()
        self._bases: dict[str, LoadedBase] = {}
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._waiting: dict[Version, deque[Generation]] = {}
        self._live: dict[Version, deque[_Batch]] = {}
        self._seconds = 1.0
        self._closed = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._vllm_loader = ThreadPoolExecutor(1, thread_name_prefix="load-vllm")
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop both threads; requests under way fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for loader in (self._loader, self._vllm_loader):
            loader.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout=10)

    # -- versions --------------------------------------------------------------------------------------

    async def stage(self, version: Version, *, give_way: bool = False) -> Version:
        """Load `version` beside what serves and verify its fingerprint; it does not serve yet.

        Raises ApiError: the artifact is damaged (422), does not fit its base or its name (409), does not
        answer with its fingerprint (409), no vLLM server of its base answers (503), or, with `give_way`,
        another version of the customization is served or staged already (409). What serves is not touched.
        """
        version.engine = version.engine or self.default
        return await asyncio.wrap_future(self._loader_of(version).submit(self._stage, version, give_way))

    def activate(self, customization: str, adapter_digest: str | None) -> Version | None:
        """From now on the staged version answers new requests; with None, nothing does.

        Raises ApiError (409) when that version is neither staged nor serving.
        """
        with self._changed:
            serving, staged = self.served.get(customization), self.staged.get(customization)
            if adapter_digest is None:
                self.served.pop(customization, None)
                self.unserved.pop(customization, None)
                self._retire(serving)
                return None
            if staged is not None and staged.adapter_digest == adapter_digest:
                self.served[customization] = self.staged.pop(customization)
                self.unserved.pop(customization, None)
                self._retire(serving)
                return staged
            if serving is not None and serving.adapter_digest == adapter_digest:
                return serving
        raise ApiError(409, "not_staged", f"{customization}: adapter {adapter_digest[:12]} is not staged")

    def discard(self, customization: str) -> None:
        """Forget the staged version, if there is one."""
        with self._changed:
            self._retire(self.staged.pop(customization, None))

    async def probe(self, customization: str) -> Version:
        """Measure the fingerprint of what serves now; returns that version with the new measurements."""
        with self.lease(customization) as version:
            await asyncio.wrap_future(self._loader_of(version).submit(self._measure, version))
            return version

    @contextlib.contextmanager
    def lease(self, customization: str) -> Iterator[Version]:
        """The version that answers now; it stays loaded inside the block. Raises ApiError 404 or 503."""
        version = self.acquire(customization)
        try:
            yield version
        finally:
            self.release(version)

    def acquire(self, customization: str) -> Version:
        with self._changed:
            version = self.served.get(customization)
            if version is None:
                reason = self.unserved.get(customization)
                if reason is None:
                    message = f"The model {customization!r} does not exist"
                    raise ApiError(404, "model_not_found", message, param="model")
                message = f"The model {customization!r} is not available: {reason}"
                raise ApiError(
                    503, "model_not_available", message, param="model", headers={"Retry-After": "5"}
                )
            version.leases += 1
            return version

    def release(self, version: Version) -> None:
        with self._changed:
            version.leases -= 1
            self._detach_when_unused(version)

    # -- requests --------------------------------------------------------------------------------------

    def submit(
        self,
        version: Version,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stops: Sequence[str] = (),
    ) -> Generation:
        """Queue a request on a leased version. `prompt` and new tokens must fit the base's context.

        Raises ApiError 429 when too many requests of this version wait already, 503 when no vLLM server
        has it.
        """
        request = Generation(self, version, prompt, max_new_tokens, temperature, top_p, seed, stops)
        if version.engine == "vllm":
            self._remote().submit(request, self.max_queue)
            return request
        with self._changed:
            waiting = self._waiting.setdefault(version, deque())
            if len(waiting) >= self.max_queue:
                seconds = max(1, round(self._seconds * len(waiting) / (ROWS * BATCHES)))
                message = f"{len(waiting)} requests for {version.customization!r} are waiting already; "
                message += f"try again in {seconds} s"
                raise ApiError(429, "queue_full", message, headers={"Retry-After": str(seconds)})
            waiting.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Generation) -> None:
        """Stop a request; nothing happens when it is done."""
        if request.version.engine == "vllm":
            self._remote().cancel(request)
            return
        with self._changed:
            request.cancelled = True
            with contextlib.suppress(KeyError, ValueError):
                self._waiting[request.version].remove(request)

    def queue_lengths(self) -> dict[str, int]:
        """Waiting requests by customization."""
        with self._changed:
            lengths = dict.fromkeys(self.served, 0)
            for version, waiting in self._waiting.items():
                lengths[version.customization] = lengths.get(version.customization, 0) + len(waiting)
            for version, n in (self.vllm.waiting() if self.vllm else {}).items():
                lengths[version.customization] = lengths.get(version.customization, 0) + n
            return lengths

    def answering(self) -> tuple[dict[str, Version], dict[str, str]]:
        """(what can answer now, why the other customizations of the ledger can't)."""
        with self._changed:
            served, unserved = dict(self.served), dict(self.unserved)
        for name, version in list(served.items()):
            if version.engine == "vllm" and (problem := self._remote().problem(version)):
                unserved[name] = problem
                del served[name]
        return served, unserved

    # -- the loading thread ----------------------------------------------------------------------------

    def _loader_of(self, version: Version) -> ThreadPoolExecutor:
        """vLLM has its own: a server that is slow to answer must not hold up what is loaded here."""
        return self._vllm_loader if version.engine == "vllm" else self._loader

    def _remote(self) -> "VllmEngine":
        if self.vllm is None:
            message = "its engine is vllm, and this gateway knows no server: set EVERGREEN_VLLM_URLS"
            raise ApiError(409, "no_vllm", message)
        return self.vllm

    def _stage(self, version: Version, give_way: bool = False) -> Version:
        name = version.customization
        if give_way and (name in self.served or name in self.staged):
            raise ApiError(409, "overtaken", f"{name}: another version is served or staged")
        self.discard(name)
        with self._changed:
            self._alive.add(version)
        try:
            self._load(version)
            self._measure(version)
            _verify_fingerprint(version)
        except BaseException as error:
            with self._changed:
                self._retire(version)
            if isinstance(error, ApiError) or not isinstance(error, Exception):
                raise
            raise _as_api_error(error) from error
        with self._changed:
            self.staged[version.customization] = version
        return version

    def _load(self, version: Version) -> None:
        self._compute(lambda: None)  # the process is prepared once the computing thread answers
        from ml_assets.engine.loading import read_json

        adapter = self._open("adapter", version.adapter_digest)
        base = self._open("base_model", version.base_digest)
        manifest = read_json(adapter / "manifest.json")
        for name, expected in (
            ("customization", version.customization),
            ("base_revision", version.base_revision),
        ):
            if manifest.get(name) != expected:
                message = f"adapter {version.adapter_digest[:12]}: {name} is {manifest.get(name)!r}, "
                raise ApiError(409, "incompatible_adapter", f"{message}expected {expected!r}")
        revision = read_json(base / "manifest.json").get("revision")
        if revision != version.base_revision:
            message = f"base {version.base_digest[:12]}: revision is {revision!r}, "
            raise ApiError(409, "incompatible_adapter", f"{message}expected {version.base_revision!r}")
        version.fingerprint = _checked_fingerprint(manifest, adapter)
        system = (manifest.get("prompt") or {}).get("system")
        version.system = system if system and not template_columns(system) else None
        if version.engine == "vllm":
            self._remote().load(version, adapter, base)
            return
        version.loaded = self._loaded_base(version.base_digest, base)
        self._compute(lambda: self._attach(version, adapter))

    def _open(self, kind: str, digest: str) -> Path:
        directory = self.store.open(ArtifactRef(kind, digest))
        for path in directory.rglob("*"):
            if path.is_file() and path.suffix not in ARTIFACT_SUFFIXES:
                raise ArtifactError(f"{path}: not a kind of file that is loaded")
        return directory

    def _loaded_base(self, digest: str, directory: Path) -> LoadedBase:
        with self._changed:
            known = self._bases.get(digest)
        if known is not None:
            return known
        from ml_assets.engine.loading import load_base
        from ml_assets.engine.prompting import ChatFormat

        base = load_base(directory)
        # a tokenizer of its own for requests, so that a long prompt does not hold up the computing thread
        chat = ChatFormat(copy.deepcopy(base.tokenizer), base.manifest.get("eos_token_ids", ()))
        loaded = LoadedBase(digest, chat, base.tokenizer, base.context_length, base=base)
        with self._changed:
            self._bases[digest] = loaded
        return loaded

    def _measure(self, version: Version) -> None:
        """Measure the fingerprint probe by probe, so that answers under way go on in between."""
        if version.engine == "vllm":
            version.measured = self._remote().measure(version)
            return
        from ml_assets.adapters.fingerprint import measure

        base, name = version.ready.base, version.adapter_digest

        def one(probe: Any, adapter: str | None) -> float:
            with base.active(adapter):
                return measure(base, [probe])[0]

        measured: dict[str, list[float]] = {"with": [], "without": []}
        for probe in version.fingerprint["probes"]:
            measured["with"].append(self._compute(lambda probe=probe: one(probe, name)))
            measured["without"].append(self._compute(lambda probe=probe: one(probe, None)))
        version.measured = measured

    def _compute(self, function: Callable[[], T]) -> T:
        """Run `function` on the computing thread, between two steps, and wait for it."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._closed:
                raise ApiError(503, "shutting_down", "the gateway is shutting down")
            self._jobs.append(job)
            self._changed.notify_all()
        return future.result()

    # -- with the lock held ----------------------------------------------------------------------------

    def _retire(self, version: Version | None) -> None:
        if version is not None:
            version.retired = True
            self._detach_when_unused(version)

    def _detach_when_unused(self, version: Version) -> None:
        if version.retired and version.leases == 0 and version in self._alive:
            self._alive.remove(version)
            self._jobs.append(lambda: self._detach(version))
            self._changed.notify_all()

    # -- the computing thread --------------------------------------------------------------------------

    def _work(self) -> None:
        from ml_assets.engine import hardware

        hardware.prepare_process()
        while True:
            with self._changed:
                while not (self._closed or self._jobs or any(self._waiting.values()) or self._live):
                    self._changed.wait()
                jobs, self._jobs = self._jobs, deque()
                closed = self._closed
            self._drop_cancelled()
            for job in jobs:
                job()
            if closed:
                self._fail_all()
                return
            self._admit()
            self._step()

    def _attach(self, version: Version, directory: Path) -> None:
        base = version.ready.base
        if version.adapter_digest not in base.adapters:
            base.attach(version.adapter_digest, directory)

    def _detach(self, version: Version) -> None:
        if version.engine == "vllm":
            with self._changed:
                self._waiting.pop(version, None)
            if self.vllm is not None:
                self.vllm.unload(version)
            return
        loaded = version.loaded
        if not isinstance(loaded, LoadedBase):
            return
        with self._changed:
            self._waiting.pop(version, None)
            same_base = [other for other in self._alive if other.base_digest == loaded.digest]
            if not same_base:
                self._bases.pop(loaded.digest, None)
        used = any(other.adapter_digest == version.adapter_digest for other in same_base)
        if not used and version.adapter_digest in loaded.base.adapters:
            loaded.base.detach(version.adapter_digest)

    def _drop_cancelled(self) -> None:
        for version, batches in list(self._live.items()):
            for batch in list(batches):
                for row, request in enumerate(batch.rows):
                    if request.cancelled and not request.finished:
                        request.finished = True
                        batch.decode.cancel(row)
                self._forget_if_done(version, batch)

    def _admit(self) -> None:
        with self._changed:
            chosen = []
            for version, waiting in self._waiting.items():
                if waiting and len(self._live.get(version, ())) < BATCHES:
                    chosen.append((version, _take(waiting)))
        for version, requests in chosen:
            from ml_assets.engine.generation import DecodeBatch

            base = version.ready.base
            try:
                with base.active(version.adapter_digest):
                    decode = DecodeBatch(
                        base,
                        [request.prompt for request in requests],
                        [request.max_new_tokens for request in requests],
                        [request.temperature for request in requests],
                        [request.top_p for request in requests],
                        [request.seed for request in requests],
                    )
            except Exception as error:
                self._fail(version, requests, error)
            else:
                self._live.setdefault(version, deque()).append(_Batch(decode, requests))

    def _step(self) -> None:
        """One step for one batch of every version that has work."""
        for version, batches in list(self._live.items()):
            batch = batches[0]
            batches.rotate(-1)
            base = version.ready.base
            start = time.monotonic()
            try:
                with base.active(version.adapter_digest):
                    events = batch.decode.step()
                for row, token, reason in events:
                    request = batch.rows[row]
                    request.feed(token, reason)
                    if request.finished:
                        batch.decode.cancel(row)
            except Exception as error:
                self._fail(version, batch.rows, error)
                for row in range(len(batch.rows)):
                    batch.decode.cancel(row)
            tokens = max(request.max_new_tokens for request in batch.rows)
            self._seconds = 0.9 * self._seconds + 0.1 * tokens * (time.monotonic() - start)
            self._forget_if_done(version, batch)

    def _forget_if_done(self, version: Version, batch: _Batch) -> None:
        if batch.decode.done:
            self._live[version].remove(batch)
            if not self._live[version]:
                del self._live[version]

    def _fail(self, version: Version, requests: Sequence[Generation], error: Exception) -> None:
        log.error("%s: a batch failed", version.customization, exc_info=error)
        for request in requests:
            if not request.finished:
                request.fail(ApiError(500, "engine_error", "the model failed on this request"))

    def _fail_all(self) -> None:
        with self._changed:
            requests = [request for waiting in self._waiting.values() for request in waiting]
        requests += [r for batches in self._live.values() for batch in batches for r in batch.rows]
        for request in requests:
            if not request.finished:
                request.fail(ApiError(503, "shutting_down", "the gateway is shutting down"))


def _take(waiting: deque[Generation]) -> list[Generation]:
    """The first requests, as many as one batch may hold; at least one."""
    taken: list[Generation] = []
    longest = 0
    while waiting and len(taken) < ROWS:
        longest = max(longest, len(waiting[0].prompt) + waiting[0].max_new_tokens)
        if taken and longest * (len(taken) + 1) > BATCH_TOKENS:
            break
        taken.append(waiting.popleft())
    return taken


def _checked_fingerprint(manifest: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The manifest's fingerprint, if it could tell the adapter from the bare base."""
    path = directory / "manifest.json"
    try:
        fingerprint = manifest["fingerprint"]
        effect = max(abs(probe["with"] - probe["without"]) for probe in fingerprint["probes"])
        if not effect > 2 * fingerprint["tolerance"]:
            message = f"fingerprint: no probe tells the adapter from its base (largest effect {effect})"
            raise ArtifactError(f"{path}: {message}")
        return fingerprint
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: expected a fingerprint with probes and a tolerance: {error!r}"
        ) from error


def _verify_fingerprint(version: Version) -> None:
    """Raise ApiError 409 unless what was measured is the manifest's fingerprint."""
    if not version.verified:
        probes = version.fingerprint["probes"]
        expected = {kind: [probe[kind] for probe in probes] for kind in ("with", "without")}
        found = {kind: [round(value, 4) for value in values] for kind, values in version.measured.items()}
        message = (
            f"adapter {version.adapter_digest[:12]} on {version.base_revision} does not answer with its "
            f"fingerprint: expected {expected}, measured {found}"
        )
        raise ApiError(409, "fingerprint_mismatch", message)


def _as_api_error(error: Exception) -> ApiError:
    from ml_assets.engine.loading import IncompatibleAdapter

    if isinstance(error, IncompatibleAdapter):
        return ApiError(409, "incompatible_adapter", str(error))
    if isinstance(error, ArtifactError):
        return ApiError(422, "artifact_error", str(error))
    log.error("a version could not be loaded", exc_info=error)
    return ApiError(422, "cannot_load", f"{type(error).__name__}: {error}")

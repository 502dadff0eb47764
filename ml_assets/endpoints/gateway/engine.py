"""The in-process engine: base models in memory, all adapters on them, one thread that computes.

Requests to all versions on one base are one batch, which each joins and leaves at any step. The customization
with the fewest requests under way is next to join, so that a busy one cannot starve another. A request ends
on the version it began with; a replaced version is detached when its last request is done.
"""

import asyncio
import contextlib
import copy
import logging
import math
import os
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
from ml_assets.endpoints.gateway.live import KV_BYTES, PREFIX_BYTES, SHARE, Live
from ml_assets.endpoints.gateway.text import Detokenizer, StopStrings, TrailingSpace
from ml_assets.engine.examples import Examples, is_prompted, read_examples
from ml_assets.engine.hosted import is_hosted
from ml_assets.settings import EngineName, Settings
from ml_assets.spec import template_columns

if TYPE_CHECKING:
    from ml_assets.endpoints.gateway.hosted import HostedEngine
    from ml_assets.endpoints.gateway.vllm import VllmEngine
    from ml_assets.engine.loading import Base
    from ml_assets.engine.prompting import ChatFormat

LOOK_SECONDS = 0.25
"""Between two looks at whether a training or an evaluation computes: beside it, one thread is used."""
REQUEST_SECONDS = 300.0
"""Time that a request may take, waiting included."""
PART = 8192
"""Characters of a long prompt that are made tokens of at a time, to see whether it is too long."""
CUT = 16
"""Tokens of a part that the whole text might not have: they come from cutting it."""
LABEL_ROWS = 32
"""Requests whose labels are scored in one pass."""
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
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the request that is made tokens of: the others on this base wait without a thread, so that
    keys, other bases and releases have theirs."""

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation. Raises jinja2.TemplateError when the template refuses it."""
        with self.lock:
            return self.chat.prompt_ids(messages)

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a conversation. Raises what `encode` raises."""
        return len(self.encode(messages))

    def is_longer(self, messages: Sequence[Mapping[str, str]], limit: int) -> bool:
        """Whether a conversation is so much longer than `limit` tokens that a part of it is, too: what is far
        too long takes seconds to encode. Raises what `encode` raises."""
        text, least = self.chat.prompt_text(messages), 0
        if len(text) <= max(PART, 8 * limit):  # few texts have more characters a token
            return False
        for start in range(0, len(text), PART):
            with self.lock:
                ids = self.chat.tokenizer(text[start : start + PART], add_special_tokens=False)["input_ids"]
            least += max(0, len(ids) - CUT)
            if least > limit:
                return True
        return False


@dataclass(eq=False)
class LoadedBase(BaseText):
    """A base in memory. Only the computing thread touches `base`."""

    base: "Base" = field(kw_only=True)


@dataclass(frozen=True)
class Asked:
    """A conversation as the model gets it: `messages`, examples included, and their tokens. `own` counts the
    tokens without the examples."""

    messages: list[Mapping[str, str]]
    prompt: list[int]
    tokens: int
    own: int


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
    hosted: bool = False
    """Whether somebody else computes: then no engine of ours does, whatever `engine` says."""
    choices: list[str] = field(default_factory=list)
    """Where a hosted base answers with one of these labels."""
    examples: Examples = field(default_factory=Examples)
    """Of an adapter that has them instead of weights."""
    labels: dict[str, list[int]] = field(default_factory=dict)
    """Where it answers by scoring labels: those, with their tokens."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    arriving: int = 0
    """Requests that are not queued yet: their prompts are made tokens of."""
    leases: int = 0
    retired: bool = False
    release: int = 0
    """Row of the ledger that it was put to work for."""

    @property
    def text(self) -> BaseText:
        assert self.loaded is not None, "a version is leased only once it is loaded"
        return self.loaded

    @property
    def ready(self) -> LoadedBase:
        assert isinstance(self.loaded, LoadedBase), "a version of this process is leased once it is loaded"
        return self.loaded

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt may have, so that an answer finds room behind it."""
        context = self.text.context_length
        answer = max(map(len, self.labels.values()), default=1)
        return min(self.max_prompt_tokens or context, context - answer)

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
            "release": self.release,
        }

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """`messages`, after the system prompt that the adapter was trained with when they bring none."""
        if self.system and not any(message["role"] == "system" for message in messages):
            return [{"role": "system", "content": self.system}, *messages]
        return list(messages)

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Asked:
        """What the model gets to read; for any thread. Examples that leave no room for the answer are left
        out. Raises jinja2.TemplateError when the chat template refuses the messages, ApiError 413 when they
        are too long."""
        conversation, limit = self.conversation(messages), self.longest_prompt
        if self.text.is_longer(conversation, limit):
            raise self._too_long(f"more than {limit}")
        if self.hosted:
            own = self.text.count(conversation)
            if own > limit:
                raise self._too_long(own)
            conversation = self.shown(conversation)
            return Asked(conversation, [], self.text.count(conversation), own)
        prompt = self.text.encode(conversation)
        own = len(prompt)
        if own > limit:
            raise self._too_long(own)
        if self.examples:
            conversation = self.shown(conversation)
            prompt = self.text.encode(conversation)
        return Asked(conversation, prompt, len(prompt), own)

    def _too_long(self, found: int | str) -> ApiError:
        message = f"messages: {found} tokens, {self.customization!r} takes at most {self.longest_prompt}"
        return ApiError(413, "context_length_exceeded", message, param="messages")

    def shown(self, conversation: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """A conversation, its system message included, with the examples that fit."""
        if not self.examples:
            return list(conversation)
        return self.examples.before(conversation, self.text.count, self.text.context_length)


@dataclass(frozen=True)
class Piece:
    """A part of an answer. `finish_reason` is set in the last one; `tokens` is the count so far,
    `mean_logprob` the mean log-probability of the tokens so far, the one that ends it included (nats; None
    where the engine does not tell), `prompt_tokens` what a hosted base counted, in the last one."""

    text: str
    tokens: int
    finish_reason: str | None
    mean_logprob: float | None = None
    prompt_tokens: int | None = None


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
        deadline: float = math.inf,
        messages: Sequence[Mapping[str, str]] = (),
    ):
        self.version = version
        self.deadline = deadline
        self.prompt = list(prompt)
        self.messages = list(messages)
        self.stops = list(stops)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = secrets.randbits(63) if seed is None else seed
        self.cancelled = False
        self.finished = False
        self._engine = engine
        tokenizer = version.text.tokenizer
        self._said: list[str] = []

        def decode(ids: Sequence[int]) -> str:
            if version.hosted:  # text comes as text: what is fed is its number
                return "".join(self._said[i] for i in ids)
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        self._text = Detokenizer(decode)
        self._stops = StopStrings(stops)
        self._trailing = TrailingSpace()
        self._half = ""
        self._tokens = 0
        self._prompt_tokens: int | None = None
        self._logprob, self._logprobs = 0.0, 0  # their sum and number
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                item = await self._next()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._engine.cancel(self)

    async def _next(self) -> Piece | BaseException:
        if self._queue.empty() and self.deadline < math.inf:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._queue.get(), self.deadline - time.monotonic())
            return self.too_late()
        return await self._queue.get()

    # -- on the computing thread -----------------------------------------------------------------------

    def feed(self, token: int | None, finish_reason: str | None, logprob: float | None = None) -> None:
        """Take the outcome of one step; `logprob` is that of its token, the one that ends it included."""
        text = ""
        if logprob is not None:
            self._logprob += logprob
            self._logprobs += 1
        if token is not None:
            self._tokens += 1
            text = self._stops.push(self._text.push(token))
        if finish_reason is not None and not self._stops.found:
            text += self._stops.push(self._text.finish())
            text += self._stops.finish()
        text = self._trailing.push(text)
        if self._stops.found:
            finish_reason = "stop"
        self.finished = finish_reason is not None
        if text or self.finished:
            mean = self._logprob / self._logprobs if self._logprobs else None
            self._post(Piece(text, self._tokens, finish_reason, mean, self._prompt_tokens))

    def say(self, text: str) -> None:
        """Take a piece of text of a hosted base. One that counts in UTF-16 may cut between the two halves of
        a character: the first waits for the second."""
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        text = text.removesuffix(self._half)
        self._said.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        self.feed(len(self._said) - 1, None)

    def end(self, finish_reason: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Take the end of a hosted base's answer, with the tokens that it counted."""
        if self._half:
            self._half = ""
            self.say("\ufffd")
        self._prompt_tokens, self._tokens = prompt_tokens, answer_tokens
        if not self.finished:
            self.feed(None, finish_reason)

    def choose(self, label: str, tokens: int, mean_logprob: float) -> None:
        """Take a whole answer."""
        self._tokens, self.finished = tokens, True
        self._post(Piece(self._stops.push(label) + self._stops.finish(), tokens, "stop", mean_logprob))

    @staticmethod
    def too_late() -> ApiError:
        return ApiError(
            504, "deadline_exceeded", "the answer was not complete within the time of the request"
        )

    def fail(self, error: BaseException) -> None:
        self.finished = True
        self._post(error)

    def _post(self, item: Piece | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class Engine:
    """All that is loaded, and the two threads behind it: one computes, one loads.

    `served` is what answers by customization, `staged` what was loaded and verified beside it, `unserved`
    why a customization of the ledger has no version (`loading`, or the error). Methods are safe to call from
    any thread. Versions whose engine is `vllm` are kept here, too, and computed by `vllm`, those on a hosted
    base by `hosted`; `default` is the engine of those that name none.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        max_queue: int = 64,
        vllm: "VllmEngine | None" = None,
        hosted: "HostedEngine | None" = None,
        default: EngineName = "in_process",
        request_seconds: float = REQUEST_SECONDS,
        kv_bytes: int = KV_BYTES,
        prefix_bytes: int = PREFIX_BYTES,
    ):
        self.store = store
        self.max_queue = max_queue
        self.vllm = vllm
        self.hosted = hosted
        self.default: EngineName = default
        self.request_seconds = request_seconds
        self.kv_bytes, self.prefix_bytes = kv_bytes, prefix_bytes
        self.served: dict[str, Version] = {}
        self.staged: dict[str, Version] = {}
        self.unserved: dict[str, str] = {}
        self._alive: set[Version] = set()
        self._bases: dict[str, LoadedBase] = {}
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._waiting: dict[Version, deque[Generation]] = {}
        self._live: dict[str, Live] = {}  # by base, those with requests under way
        self._idle: dict[str, Live] = {}
        self._pace = _Pace()
        self._closed = False
        self._prepared = threading.Event()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=self._prepare_loader)
        self._remote_loader = ThreadPoolExecutor(1, thread_name_prefix="load-remote")
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop both threads; requests under way fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for loader in (self._loader, self._remote_loader):
            loader.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout=10)

    # -- versions --------------------------------------------------------------------------------------

    async def stage(self, version: Version, *, give_way: bool = False) -> Version:
        """Load `version` beside what serves and verify its fingerprint; it does not serve yet.

        Raises ApiError: the artifact is damaged (422), does not fit its base or its name (409), does not
        answer with its fingerprint (409), no vLLM server of its base or no provider of it answers (503), or,
        with `give_way`, another version of the customization is served or staged already (409). What serves
        is not touched.
        """
        version.engine = version.engine or self.default
        await asyncio.wrap_future(self._loader_of(version).submit(self._stage, version, give_way))
        # loaded, it is known who is to be asked
        return await asyncio.wrap_future(self._loader_of(version).submit(self._prove, version, give_way))

    def activate(self, customization: str, adapter_digest: str | None, release: int = 0) -> Version | None:
        """From now on the staged version answers new requests, for this row of the ledger; with None,
        nothing does.

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
                staged.release = release
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

    def deadline(self, start: float, seconds: float | None) -> float:
        """When a request that came at `start` (time.monotonic) ends: after `seconds`, or the engine's own
        limit if that is less."""
        return start + min(self.request_seconds, math.inf if seconds is None else seconds)

    @contextlib.contextmanager
    def arriving(self, version: Version) -> Iterator[None]:
        """A request on its way to `submit` counts as waiting. Raises ApiError 429 when too many do."""
        with self._changed:
            self._refuse_when_full(version, version.arriving + len(self._waiting.get(version, ())))
            version.arriving += 1
        try:
            yield
        finally:
            with self._changed:
                version.arriving -= 1

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
        deadline: float = math.inf,
        messages: Sequence[Mapping[str, str]] = (),
    ) -> Generation:
        """Queue a request on a leased version. `prompt` and new tokens must fit the base's context; a hosted
        base gets the `messages`. After `deadline` it fails with ApiError 504.

        Raises ApiError 429 when too many requests of this version wait already, 503 when no vLLM server
        has it.
        """
        request = Generation(
            self, version, prompt, max_new_tokens, temperature, top_p, seed, stops, deadline, messages
        )
        if (remote := self._remote_of(version)) is not None:
            remote.submit(request, self.max_queue)
            return request
        with self._changed:
            waiting = self._waiting.setdefault(version, deque())
            self._refuse_when_full(version, len(waiting))
            waiting.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Generation) -> None:
        """Stop a request; nothing happens when it is done."""
        if (remote := self._remote_of(request.version)) is not None:
            remote.cancel(request)
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
            for version in self._alive:
                if version.arriving:
                    lengths[version.customization] = lengths.get(version.customization, 0) + version.arriving
            for remote in (self.vllm, self.hosted):
                for version, n in (remote.waiting() if remote else {}).items():
                    lengths[version.customization] = lengths.get(version.customization, 0) + n
            return lengths

    def answering(self) -> tuple[dict[str, Version], dict[str, str]]:
        """(what can answer now, why the other customizations of the ledger can't)."""
        with self._changed:
            served, unserved = dict(self.served), dict(self.unserved)
        for name, version in list(served.items()):
            remote = self._remote_of(version)
            if remote is not None and (problem := remote.problem(version)):
                unserved[name] = problem
                del served[name]
        return served, unserved

    # -- the loading thread ----------------------------------------------------------------------------

    def _loader_of(self, version: Version) -> ThreadPoolExecutor:
        """Servers elsewhere have their own: one that is slow to answer must not hold up what is loaded
        here."""
        return self._remote_loader if version.hosted or version.engine == "vllm" else self._loader

    def _remote_of(self, version: Version) -> "VllmEngine | HostedEngine | None":
        """Who computes for a version, where this process does not."""
        if version.hosted:
            return self._hosted()
        return self._vllm() if version.engine == "vllm" else None

    def _hosted(self) -> "HostedEngine":
        if self.hosted is None:
            raise ApiError(409, "no_hosted", "this gateway asks no hosted models")
        return self.hosted

    def _vllm(self) -> "VllmEngine":
        if self.vllm is None:
            message = "its engine is vllm, and this gateway knows no server: set EVERGREEN_VLLM_URLS"
            raise ApiError(409, "no_vllm", message)
        return self.vllm

    def _stage(self, version: Version, give_way: bool = False) -> None:
        """Load, so that the version could answer."""
        name = version.customization
        if give_way and (name in self.served or name in self.staged):
            raise ApiError(409, "overtaken", f"{name}: another version is served or staged")
        self.discard(name)
        with self._changed:
            self._alive.add(version)
        with self._retired_on_error(version):
            self._load(version)

    def _prove(self, version: Version, give_way: bool = False) -> Version:
        """Let a loaded version answer its probes; it is staged if it is what it should be."""
        name = version.customization
        with self._retired_on_error(version):
            self._measure(version)
            _verify_fingerprint(version)
            with self._changed:
                if give_way and (name in self.served or name in self.staged):
                    raise ApiError(409, "overtaken", f"{name}: another version is served or staged")
                self._retire(self.staged.pop(name, None))
                self.staged[name] = version
        return version

    @contextlib.contextmanager
    def _retired_on_error(self, version: Version) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._retire(version)
            if isinstance(error, ApiError) or not isinstance(error, Exception):
                raise
            raise _as_api_error(error) from error

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
        base_manifest = read_json(base / "manifest.json")
        revision = base_manifest.get("revision")
        if revision != version.base_revision:
            message = f"base {version.base_digest[:12]}: revision is {revision!r}, "
            raise ApiError(409, "incompatible_adapter", f"{message}expected {version.base_revision!r}")
        version.fingerprint = _checked_fingerprint(manifest, adapter)
        version.examples = read_examples(adapter, manifest)
        system = (manifest.get("prompt") or {}).get("system")
        version.system = system if system and not template_columns(system) else None
        version.hosted = is_hosted(base_manifest)
        if version.hosted:
            version.choices = manifest["labels"] if manifest.get("answer_by") == "label_scores" else []
            self._hosted().load(version, manifest, base_manifest)
            return
        if version.engine == "vllm":
            if manifest.get("answer_by") == "label_scores":
                message = (
                    f"adapter {version.adapter_digest[:12]} answers by label scores, which vllm does not; "
                )
                raise ApiError(409, "incompatible_adapter", f"{message}use endpoint.engine in_process")
            self._vllm().load(version, adapter, base)
            return
        version.loaded = loaded = self._loaded_base(version.base_digest, base)
        if manifest.get("answer_by") == "label_scores":
            version.labels = {label: loaded.chat.target_ids(label) for label in manifest["labels"]}
        read = loaded.base.read_adapter(adapter)
        self._compute(lambda: self._attach(version, read))

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
        if (remote := self._remote_of(version)) is not None:
            version.measured = remote.measure(version)
            return
        from ml_assets.adapters.fingerprint import measure

        base, name = version.ready.base, version.adapter_digest

        def one(probe: Any, adapter: str | None) -> float:
            with base.active(adapter):
                return measure(base, [probe])[0]

        measured: dict[str, list[float]] = {"with": [], "without": []}
        for probe in version.fingerprint["probes"]:
            shown = probe | {"messages": version.shown(probe["messages"])}
            measured["with"].append(self._compute(lambda probe=shown: one(probe, name)))
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

    def _refuse_when_full(self, version: Version, waiting: int) -> None:
        if waiting < self.max_queue:
            return
        after = self._pace.seconds(sum(map(len, self._waiting.values())))
        after = min(after, math.ceil(self.request_seconds))  # then all of them have ended or expired
        message = f"{waiting} requests for {version.customization!r} are waiting already; "
        message += f"try again in {after} s"
        raise ApiError(429, "queue_full", message, headers={"Retry-After": str(after)})

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
        try:
            self._work_until_closed()
        except BaseException:
            # a gateway that looks ready and answers nothing is worse than one that is started again
            log.critical("the computing thread failed, the gateway ends", exc_info=True)
            os._exit(1)

    def _work_until_closed(self) -> None:
        from ml_assets.engine import hardware

        hardware.prepare_process()
        home, threads, looked = Settings.from_env().home, hardware.threads(), 0.0
        hardware.compute_dtype(home)  # measured on this thread, if it has to be
        self._prepared.set()
        while True:
            with self._changed:
                while not (self._closed or self._jobs or any(self._waiting.values()) or self._live):
                    self._changed.wait()
                jobs, self._jobs = self._jobs, deque()
                closed = self._closed
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                hardware.use_threads(1 if hardware.neighbours(home) else threads)
            self._expire()
            for job in jobs:
                job()
            if closed:
                self._fail_all()
                return
            self._admit()
            self._step()
            self._choose_labels()

    def _prepare_loader(self) -> None:
        from ml_assets.engine import hardware

        self._prepared.wait()
        try:
            hardware.compute_alone()
        except Exception:
            # a pool whose initializer fails takes no work ever again; without, loading only disturbs more
            log.exception("the loading thread computes with all cores")

    def _attach(self, version: Version, read: Any) -> None:
        base = version.ready.base
        if version.adapter_digest not in base.adapters:
            base.insert(version.adapter_digest, read)

    def _detach(self, version: Version) -> None:
        if version.hosted:
            if self.hosted is not None:
                self.hosted.unload(version)
            return
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
        live = self._live.get(loaded.digest) or self._idle.get(loaded.digest)
        used = any(other.adapter_digest == version.adapter_digest for other in same_base)
        if not used and version.adapter_digest in loaded.base.adapters:
            loaded.base.detach(version.adapter_digest)
            if live is not None:
                live.decoder.forget(version.adapter_digest)
        if not same_base:
            self._live.pop(loaded.digest, None)
            self._idle.pop(loaded.digest, None)

    def _expire(self) -> None:
        """Give up requests whose client is gone or whose time is over, waiting ones as well."""
        now = time.monotonic()
        with self._changed:
            late = [r for waiting in self._waiting.values() for r in waiting if r.deadline <= now]
            for request in late:
                self._waiting[request.version].remove(request)
        for request in late:
            request.fail(request.too_late())
        for digest, live in list(self._live.items()):
            live.stop_where(now)
            self._rest_if_done(digest)

    def _admit(self) -> None:
        """Let waiting requests join: each time the first of the customization with the fewest under way.

        One for which there is no room now holds up the others on its base, or it might wait for ever.
        """
        full: set[str] = set()
        while True:
            with self._changed:
                names: dict[str, set[str]] = {}
                for version in self._alive:
                    names.setdefault(version.base_digest, set()).add(version.customization)
                heads = [
                    waiting[0]
                    for version, waiting in self._waiting.items()
                    if waiting and not version.labels and version.base_digest not in full
                ]
            under_way = {
                request: self._live_on(request.version).of_customization(request.version.customization)
                for request in heads
            }
            able = [r for r in heads if under_way[r] < SHARE or len(names[r.version.base_digest]) == 1]
            if not able:
                return
            chosen = min(able, key=lambda request: under_way[request])
            digest = chosen.version.base_digest
            try:
                joined = self._live_on(chosen.version).join(chosen)
            except Exception as error:
                self._fail(chosen.version, [chosen], error)
                joined = True
            if not joined:
                full.add(digest)
                continue
            with self._changed, contextlib.suppress(KeyError, ValueError):  # it was cancelled meanwhile
                self._waiting[chosen.version].remove(chosen)
            if digest in self._idle and self._idle[digest].requests:
                self._live[digest] = self._idle.pop(digest)

    def _live_on(self, version: Version) -> Live:
        digest = version.base_digest
        if digest not in self._live and digest not in self._idle:
            self._idle[digest] = Live(version.ready.base, self.kv_bytes, self.prefix_bytes)
        return self._live.get(digest) or self._idle[digest]

    def _rest_if_done(self, digest: str) -> None:
        if digest in self._live and not self._live[digest].requests:
            self._idle[digest] = self._live.pop(digest)
            self._idle[digest].decoder.step()  # gives the memory of what was cancelled back

    def _step(self) -> None:
        """One step on every base that has work."""
        for digest, live in list(self._live.items()):
            start = time.monotonic()
            before = len(live.requests)
            try:
                tokens = live.step()
            except Exception as error:
                log.error("base %s: a step failed", digest[:12], exc_info=error)
                live.fail(_engine_error())
                del self._live[digest]
                continue
            self._pace.add(tokens, before - len(live.requests), time.monotonic() - start)
            self._rest_if_done(digest)

    def _choose_labels(self) -> None:
        """Answer waiting requests of one version that scores labels; versions take turns."""
        with self._changed:
            turns = [v for v, waiting in self._waiting.items() if waiting and v.labels]
            if not turns:
                return
            version = turns[0]
            waiting = self._waiting.pop(version)
            requests = [waiting.popleft() for _ in range(min(LABEL_ROWS, len(waiting)))]
            self._waiting[version] = waiting  # behind the others now
        from ml_assets.engine.scoring import best_labels

        start = time.monotonic()
        names, tokens = list(version.labels), list(version.labels.values())

        def choose(requests: Sequence[Generation]) -> None:
            prompts = [request.prompt for request in requests]
            adapters = [version.adapter_digest] * len(prompts)
            found = best_labels(version.ready.base, prompts, tokens, adapters)
            for request, (label, score) in zip(requests, found, strict=True):
                if not request.cancelled:
                    mean = score / len(tokens[label])
                    request.choose(names[label].strip(), len(tokens[label]) - 1, mean)

        try:
            choose(requests)
        except Exception as error:
            log.warning("%s: %d requests failed together: %s", version.customization, len(requests), error)
            for request in requests:  # the others must not fail for one that can't be answered
                try:
                    choose([request])
                except Exception as its_own:
                    self._fail(version, [request], its_own)
        self._pace.add(len(requests), len(requests), time.monotonic() - start)

    def _fail(self, version: Version, requests: Sequence[Generation], error: Exception) -> None:
        log.error("%s: a request failed", version.customization, exc_info=error)
        for request in requests:
            if not request.finished:
                request.fail(_engine_error())

    def _fail_all(self) -> None:
        with self._changed:
            requests = [request for waiting in self._waiting.values() for request in waiting]
        ending = ApiError(503, "shutting_down", "the gateway is shutting down")
        for live in self._live.values():
            live.fail(ending)
        for request in requests:
            if not request.finished:
                request.fail(ending)


class _Pace:
    """How fast requests end, measured on the latest steps."""

    def __init__(self) -> None:
        self._tokens, self._ended, self._seconds = 0.0, 0.0, 0.0

    def add(self, tokens: int, ended: int, seconds: float) -> None:
        self._tokens = 0.999 * self._tokens + tokens
        self._ended = 0.999 * self._ended + ended
        self._seconds = 0.999 * self._seconds + seconds

    def seconds(self, waiting: int) -> int:
        """Until so many requests have ended, at least 1."""
        return max(1, math.ceil(waiting * self._seconds / max(self._ended, 1.0)))


def _engine_error() -> ApiError:
    return ApiError(500, "engine_error", "the model failed on this request")


def _checked_fingerprint(manifest: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The manifest's fingerprint, if it could tell the adapter from the bare base."""
    path = directory / "manifest.json"
    try:
        fingerprint = manifest["fingerprint"]
        effect = max(abs(probe["with"] - probe["without"]) for probe in fingerprint["probes"])
        if not effect > 2 * fingerprint["tolerance"] and not is_prompted(manifest):
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

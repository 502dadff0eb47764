"""vLLM as an engine: requests go to vLLM servers by URL, which load adapters from the artifact store at run
time.

Every server (replica) serves one base under the name of its revision. An adapter is loaded under a name made
of its digest, so a name never changes its meaning; it gets no request on a replica before it has answered
there with its fingerprint. A watch on every replica notices a restart, which loses what was loaded, and loads
and verifies it again before the replica answers. Prompts are sent as tokens and answers are read as tokens:
chat template, stop strings and text are those of the in-process engine.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import itertools
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from ml_assets.artifacts import read_json
from ml_assets.endpoints.gateway.engine import BaseText, Generation, Version
from ml_assets.endpoints.gateway.errors import ApiError
from ml_assets.endpoints.gateway.remote import RemoteRequests, Stoppable, lines
from ml_assets.engine.examples import is_prompted

LOAD_SECONDS = 600.0
"""For loading and for the first probes: a server compiles kernels when it is first asked."""
HEALTH_SECONDS = 5.0
WATCH_SECONDS = 2.0
"""Between two looks at a replica: shorter than any restart of vLLM, so that none goes unseen."""
MISSES = 3
"""A replica that does not answer this many looks in a row is lost; one that refuses to connect is at once."""
RETRY_SECONDS = 30.0
"""Before an adapter that a replica refused is tried there again."""
PROBES_AT_ONCE = 2
"""Requests with which one replica is probed at the same time: more would keep its users waiting."""
SHORT_DIGEST = 16

T = TypeVar("T")
log = logging.getLogger("evergreen.gateway")


class ReplicaLost(Exception):
    """A replica does not answer, or not any more; the message names it and says how."""


class Refused(Exception):
    """A replica answers that it will not; the message is its own."""


class AdapterMissing(Refused):
    """A replica does not know the adapter: it was restarted."""


@dataclass(eq=False)
class Replica:
    """One vLLM server, as far as is known. `bases` is {revision: context length}, `loaded` what it holds of
    ours, `ready` what has also answered with its fingerprint there, `bare` what the base without an adapter
    gave to probes; all three are empty after a loss."""

    url: str
    up: bool = False
    problem: str = "was not asked yet"
    looked_at: float = 0.0
    bases: dict[str, int] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    ready: set[str] = field(default_factory=set)
    bare: dict[tuple[str, tuple[int, ...]], float] = field(default_factory=dict)
    garbage: set[str] = field(default_factory=set)
    retry_at: dict[str, float] = field(default_factory=dict)
    life: int = 0
    misses: int = 0
    last_used: int = 0
    running: set[Stoppable] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    tending: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Adapter:
    """What replicas of `base` should hold under `name`; `probes` are token ids of (prompt with the adapter's
    examples, prompt, answer). It is `watched`, loaded again where it is missing, once it was loaded and
    measured for the first time. One without weights (`bare`) is the base, asked with examples: there is
    nothing to load."""

    name: str
    base: str
    path: Path
    version: Version
    probes: list[tuple[list[int], list[int], list[int]]]
    users: set[Version]
    bare: bool = False
    watched: bool = False

    @property
    def model(self) -> str:
        """What a replica is asked for."""
        return self.base if self.bare else self.name


class VllmEngine(RemoteRequests):
    """The client of one deployment of vLLM servers. State changes on the event loop that `start` was called
    on; `load`, `measure` and `unload` are for other threads, the rest for the loop."""

    def __init__(self, urls: Sequence[str], api_key: str | None = None, watch_seconds: float = WATCH_SECONDS):
        super().__init__()
        self.replicas = [Replica(url.rstrip("/")) for url in urls]
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._watch_seconds = watch_seconds
        self._adapters: dict[str, _Adapter] = {}
        self._texts: dict[str, BaseText] = {}
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._calls_lock = threading.Lock()
        self._closed = False
        self._clock = itertools.count(1)
        self._watches: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch the replicas. Call on the event loop."""
        self._loop = asyncio.get_running_loop()
        # a connection is not kept for as long as the server keeps it (5 s): neither may close it under the
        # other's hands; and a proxy of the environment is not for a service of our own
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._http = httpx.AsyncClient(headers=self._headers, limits=limits, trust_env=False)
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def close(self) -> None:
        """Stop watching; requests under way fail. What is loaded stays loaded, for the next start."""
        self._closed = True
        with self._calls_lock:
            for call in self._calls:
                call.cancel()
        tasks = self._watches + [r.tending for r in self.replicas if r.tending]
        tasks += [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    # -- for the loading thread ------------------------------------------------------------------------

    def load(self, version: Version, adapter: Path, base: Path) -> None:
        """Load the adapter in `adapter` on every replica of its base that answers, and set `version.loaded`.

        Raises ApiError: not an adapter for vLLM or for this base, or a replica refuses it (409); no replica
        of this base answers (503).
        """
        manifest = read_json(adapter / "manifest.json")
        bare = is_prompted(manifest)
        config = {} if bare else read_json(adapter / "adapter_config.json")
        if config.get("alora_invocation_tokens"):
            raise ApiError(
                409,
                "incompatible_adapter",
                f"adapter {version.adapter_digest[:12]} is an activated LoRA, vLLM serves exact LoRA only: "
                "train with adapter.kind lora, or serve with endpoint.engine in_process",
            )
        version.loaded = text = self._text(version.base_digest, base, manifest)
        probes = [
            (
                text.encode(version.shown(probe["messages"])),
                text.encode(probe["messages"]),
                text.chat.target_ids(probe["answer"]),
            )
            for probe in version.fingerprint["probes"]
        ]
        name = adapter_name(version)
        record = _Adapter(name, version.base_revision, adapter.absolute(), version, probes, {version}, bare)
        context = self._call(self._load(record))
        shortest = min(text.context_length, context)
        version.loaded = BaseText(text.digest, text.chat, text.tokenizer, shortest, text.lock, text.turn)

    def measure(self, version: Version) -> dict[str, list[float]]:
        """The fingerprint measured on every replica that has the adapter: that of the worst one. A replica
        whose measurement is not the fingerprint gets no more requests. Raises ApiError 503 when there is
        none, 409 when one refuses to measure."""
        return self._call(self._measure(self._adapters[adapter_name(version)]))

    def unload(self, version: Version) -> None:
        """Forget a version that has no request any more; returns at once."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._forget, version)

    def _text(self, digest: str, base: Path, adapter: Mapping[str, Any]) -> BaseText:
        from transformers import AutoTokenizer

        from ml_assets.engine.loading import ADAPTER_PINS, IncompatibleAdapter, quiet
        from ml_assets.engine.prompting import ChatFormat

        manifest = read_json(base / "manifest.json")
        for pin in ADAPTER_PINS:
            ours = manifest["identity" if pin == "base_identity" else pin]
            if adapter.get(pin) != ours:
                raise IncompatibleAdapter(
                    f"the adapter was made for {pin} {str(adapter.get(pin))[:12]}, "
                    f"the base {manifest['revision']} has {str(ours)[:12]}"
                )
        if digest not in self._texts:
            quiet()
            tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
            chat = ChatFormat(copy.deepcopy(tokenizer), manifest.get("eos_token_ids", ()))
            self._texts[digest] = BaseText(digest, chat, tokenizer, manifest["context_length"])
        return self._texts[digest]

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the event loop and wait for it."""
        with self._calls_lock:
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
            with self._calls_lock:
                self._calls.discard(future)

    # -- versions, on the loop -------------------------------------------------------------------------

    async def _load(self, adapter: _Adapter) -> int:
        """Put the adapter on all replicas of its base; returns the shortest context of these."""
        known = self._adapters.get(adapter.name)
        if known:
            known.users |= adapter.users
        else:
            self._adapters[adapter.name] = adapter
        stale = time.monotonic() - self._watch_seconds
        away = [replica for replica in self.replicas if not replica.up and replica.looked_at < stale]
        await asyncio.gather(*(self._look(replica) for replica in away))
        targets = self._replicas_of(adapter.base)
        outcomes = await asyncio.gather(*(self._put(r, adapter) for r in targets), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Refused):
                raise ApiError(409, "vllm_refused", str(outcome))
            if isinstance(outcome, BaseException) and not isinstance(outcome, ReplicaLost):
                raise outcome
        reached = [r for r in targets if adapter.name in r.loaded]
        if not reached:
            raise self._nobody(adapter.base)
        return min(replica.bases[adapter.base] for replica in reached)

    async def _measure(self, adapter: _Adapter) -> dict[str, list[float]]:
        replicas = [r for r in self._replicas_of(adapter.base) if adapter.name in r.loaded]
        outcomes = await asyncio.gather(*(self._verify(r, adapter) for r in replicas), return_exceptions=True)
        measured: list[dict[str, list[float]]] = []
        for outcome in outcomes:
            if isinstance(outcome, Refused):
                raise ApiError(409, "vllm_refused", str(outcome))
            if isinstance(outcome, dict):
                measured.append(outcome)
            elif isinstance(outcome, BaseException) and not isinstance(outcome, ReplicaLost):
                raise outcome
        if not measured:
            raise self._nobody(adapter.base)
        adapter.watched = True
        return max(measured, key=lambda one: _deviation(adapter.version.fingerprint, one))

    def _forget(self, version: Version) -> None:
        adapter = self._adapters.get(adapter_name(version))
        if adapter is None or version not in adapter.users:
            return
        adapter.users.discard(version)
        if adapter.users:
            return
        del self._adapters[adapter.name]
        if not any(one.version.base_digest == version.base_digest for one in self._adapters.values()):
            self._texts.pop(version.base_digest, None)
        for replica in self.replicas:
            replica.ready.discard(adapter.name)
            if adapter.bare:
                replica.loaded.discard(adapter.name)
                continue
            replica.garbage.add(adapter.name)
            replica.wake.set()

    def _replicas_of(self, base: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.up and base in replica.bases]

    def _nobody(self, base: str) -> ApiError:
        return ApiError(503, "no_replica", self._why_nobody(base), headers={"Retry-After": "5"})

    def _why_nobody(self, base: str) -> str:
        """Users see it, so it names the servers by their place in EVERGREEN_VLLM_URLS."""
        found = "; ".join(
            f"server {i} serves {', '.join(sorted(r.bases))}" if r.up else f"server {i} {r.problem}"
            for i, r in enumerate(self.replicas, 1)
        )
        return f"no vLLM server answers for base {base} (expected as --served-model-name): {found}"

    # -- one replica -----------------------------------------------------------------------------------

    async def _watch(self, replica: Replica) -> None:
        while True:
            try:
                await self._look(replica)
            except Exception as error:
                self._lose(replica, f"{type(error).__name__} {error}")
            idle = replica.tending is None or replica.tending.done()
            if replica.up and idle and (replica.garbage or self._wanted(replica)):
                replica.tending = asyncio.create_task(self._tend(replica))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.wake.wait(), self._watch_seconds)
            replica.wake.clear()

    def _wanted(self, replica: Replica) -> list[_Adapter]:
        now = time.monotonic()
        return [
            adapter
            for adapter in self._adapters.values()
            if adapter.watched
            and adapter.base in replica.bases
            and adapter.name not in replica.ready
            and replica.retry_at.get(adapter.name, 0.0) <= now
        ]

    async def _look(self, replica: Replica) -> None:
        """Learn whether the replica lives, what it serves, and what it has lost."""
        life, loaded = replica.life, set(replica.loaded)
        try:
            health = await self._http.get(f"{replica.url}/health", timeout=HEALTH_SECONDS)
            listed = await self._http.get(f"{replica.url}/v1/models", timeout=HEALTH_SECONDS)
            for response in (health, listed):
                if not response.is_success:
                    raise ReplicaLost(
                        f"{response.request.url.path}: {response.status_code} {_said(response)}"
                    )
            cards = listed.json()["data"]
            bases = {card["id"]: int(card["max_model_len"]) for card in cards if not card.get("parent")}
            adapters = {card["id"] for card in cards if card.get("parent")}
        except httpx.ConnectError as error:
            self._lose(replica, f"is not reachable ({error})")
        except (httpx.HTTPError, ReplicaLost) as error:
            replica.misses += 1
            if replica.misses >= MISSES or not replica.up:
                self._lose(replica, f"does not answer: {type(error).__name__} {error}")
        except (ValueError, KeyError, TypeError) as error:
            self._lose(replica, f"does not answer /v1/models as vLLM does ({error!r})")
        else:
            if life != replica.life:
                return  # somebody else has seen it die meanwhile
            if not replica.up or replica.bases != bases:
                log.info("vLLM at %s serves %s", replica.url, ", ".join(sorted(bases)))
            if replica.bases != bases:
                for names in (replica.loaded, replica.ready, replica.bare):
                    names.clear()
            replica.up, replica.problem, replica.misses, replica.bases = True, "", 0, bases
            bare = {name for name, one in self._adapters.items() if one.bare}
            self._missing(replica, loaded - adapters - bare)
        finally:
            replica.looked_at = time.monotonic()

    def _lose(self, replica: Replica, problem: str) -> None:
        if replica.up or replica.life == 0:
            log.error("vLLM at %s is lost: %s", replica.url, problem)
        replica.up, replica.problem = False, problem
        replica.life += 1
        for names in (replica.loaded, replica.ready, replica.garbage, replica.retry_at, replica.bare):
            names.clear()
        for block in replica.running:
            block.stop(ReplicaLost(f"{replica.url}: {problem}"))

    def _missing(self, replica: Replica, names: set[str]) -> None:
        if names:
            log.warning("vLLM at %s has lost %s", replica.url, ", ".join(sorted(names)))
            replica.loaded -= names
            replica.ready -= names

    async def _tend(self, replica: Replica) -> None:
        """Unload what nobody wants any more, load and verify what is missing."""
        for name in list(replica.garbage):
            with contextlib.suppress(ReplicaLost):
                await self._drop(replica, name)
        for adapter in self._wanted(replica):
            try:
                await self._put(replica, adapter)
                if not adapter.version.fits(measured := await self._verify(replica, adapter)):
                    async with replica.lock:
                        if not adapter.bare:
                            await self._unload(replica, adapter.name)
                    expected = adapter.version.fingerprint["probes"]
                    raise Refused(f"not its fingerprint: expected {expected}, measured {measured}")
                log.info("vLLM at %s answers as %s", replica.url, adapter.name)
            except (ReplicaLost, AdapterMissing):
                return
            except Exception as error:
                replica.retry_at[adapter.name] = time.monotonic() + RETRY_SECONDS
                log.error("vLLM at %s does not get %s: %s", replica.url, adapter.name, error)

    async def _put(self, replica: Replica, adapter: _Adapter) -> None:
        """Have the replica load the adapter, if it has not. Raises Refused or ReplicaLost."""
        async with replica.lock:
            life = replica.life
            if adapter.name in replica.loaded:
                return
            if adapter.bare:
                replica.loaded.add(adapter.name)
                return
            replica.garbage.discard(adapter.name)
            listed = await self._ask(replica, "GET", "/v1/models")
            for card in listed.json()["data"]:
                if card["id"] == adapter.name:  # from a gateway before this one
                    if card.get("root") == str(adapter.path) and card.get("parent") == adapter.base:
                        replica.loaded.add(adapter.name)
                        return
                    await self._unload(replica, adapter.name)
            body = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
            await self._ask(replica, "POST", "/v1/load_lora_adapter", body)
            if life == replica.life:
                replica.loaded.add(adapter.name)

    async def _drop(self, replica: Replica, name: str) -> None:
        async with replica.lock:
            if name in self._adapters or name not in replica.garbage:
                return  # wanted again
            await self._unload(replica, name)
            replica.garbage.discard(name)

    async def _unload(self, replica: Replica, name: str) -> None:
        replica.loaded.discard(name)
        replica.ready.discard(name)
        try:
            await self._ask(replica, "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except AdapterMissing:
            pass
        except Refused as error:
            log.warning("vLLM at %s keeps %s: %s", replica.url, name, error)

    async def _verify(self, replica: Replica, adapter: _Adapter) -> dict[str, list[float]]:
        """Measure the fingerprint on one replica, which gets requests from then on if it is the right one,
        and none if it is not. Raises Refused or ReplicaLost."""
        life = replica.life
        measured: dict[str, list[float]] = {"with": [], "without": []}
        try:
            for shown, prompt, answer in adapter.probes:
                measured["with"].append(await self._mean_logprob(replica, adapter.model, shown, answer))
                probe = adapter.base, (*prompt, *answer)
                if probe not in replica.bare:  # a server's base does not change while it lives
                    value = await self._mean_logprob(replica, adapter.base, prompt, answer)
                    if life == replica.life:
                        replica.bare[probe] = value
                measured["without"].append(replica.bare.get(probe, 0.0))
        except AdapterMissing:
            self._missing(replica, {adapter.name})
            raise
        if life != replica.life:
            raise ReplicaLost(f"{replica.url}: {replica.problem}")
        wanted = self._adapters.get(adapter.name) is not None and adapter.name in replica.loaded
        if wanted and adapter.version.fits(measured):
            replica.ready.add(adapter.name)
        else:
            replica.ready.discard(adapter.name)
        return measured

    async def _mean_logprob(
        self, replica: Replica, model: str, prompt: Sequence[int], answer: Sequence[int]
    ) -> float:
        """Mean log-probability (nats per token) of an answer's tokens.

        Each token is asked for by itself: allowed alone, with the log-probability that it had before. vLLM
        would tell all at once with `prompt_logprobs`, but 0.32 on a CPU dies of that when it has an adapter
        and another request is under way.
        """
        slots = asyncio.Semaphore(PROBES_AT_ONCE)

        async def logprob(i: int) -> float:
            body = {
                "model": model,
                "prompt": [*prompt, *answer[:i]],
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 0,
                "allowed_token_ids": [answer[i]],
                "return_token_ids": True,
            }
            async with slots:
                response = await self._ask(replica, "POST", "/v1/completions", body)
            try:
                choice = response.json()["choices"][0]
                if choice["token_ids"] != [answer[i]]:
                    raise ValueError(f"answered with tokens {choice['token_ids']}, asked for {answer[i]}")
                return float(choice["logprobs"]["token_logprobs"][0])
            except (ValueError, LookupError, TypeError) as error:
                raise Refused(f"{replica.url}: does not tell log-probabilities: {error!r}") from error

        values = await asyncio.gather(*(logprob(i) for i in range(len(answer))))
        return sum(values) / len(values)

    async def _ask(
        self, replica: Replica, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        timeout = httpx.Timeout(LOAD_SECONDS, connect=HEALTH_SECONDS)
        try:
            async with self._alive(replica):
                response = await self._http.request(
                    method, f"{replica.url}{path}", json=body, timeout=timeout
                )
        except httpx.HTTPError as error:
            replica.wake.set()
            raise ReplicaLost(f"{replica.url}{path}: {type(error).__name__} {error}") from error
        self._check(replica, path, response)
        return response

    @contextlib.asynccontextmanager
    async def _alive(self, replica: Replica) -> AsyncIterator[None]:
        """The block ends with ReplicaLost when the replica is lost meanwhile."""
        task = asyncio.current_task()
        assert task
        block = Stoppable(task)
        replica.running.add(block)
        try:
            with block:
                yield
        finally:
            replica.running.discard(block)

    def _check(self, replica: Replica, path: str, response: httpx.Response) -> None:
        """Raise what a status other than 200 means."""
        if response.is_success:
            return
        said = f"{replica.url}{path}: {response.status_code} {_said(response)}"
        if response.status_code == 404:
            if path == "/v1/load_lora_adapter":
                if _error(response):
                    raise Refused(f"{said}; the artifact store must be mounted at the same path there")
                said += "; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                raise Refused(said)
            raise AdapterMissing(said)
        # a refused adapter is a 500 as well
        if response.status_code == 429 or (response.status_code >= 500 and "lora" not in path):
            raise ReplicaLost(said)
        raise Refused(said)

    # -- requests --------------------------------------------------------------------------------------

    def problem(self, version: Version) -> str | None:
        """Why no replica can answer for this version now; None when one can."""
        if self.ready_replicas(version):
            return None
        if not self._replicas_of(version.base_revision):
            return self._why_nobody(version.base_revision)
        return f"{adapter_name(version)} is being loaded"

    def ready_replicas(self, version: Version) -> int:
        """How many replicas answer for a version."""
        name = adapter_name(version)
        return sum(replica.up and name in replica.ready for replica in self.replicas)

    def submit(self, request: Generation, max_queue: int) -> None:
        """Begin to answer a request. Raises ApiError 429 when too many wait, 503 when no replica is ready."""
        version = request.version
        if (problem := self.problem(version)) is not None:
            raise _unavailable(version, problem)
        self._begin(request, max_queue)

    async def _answer(self, request: Generation) -> None:
        """Have one replica after another try until one has answered. A replica that is lost after its first
        token has said something that another would not go on with."""
        try:
            await self._try_replicas(request)
        except ApiError:
            raise
        except Exception as error:
            log.error("%s: a request failed: %s", adapter_name(request.version), error)
            raise ApiError(500, "engine_error", "the model failed on this request") from error

    async def _try_replicas(self, request: Generation) -> None:
        name, tried, work = adapter_name(request.version), set[Replica](), self._work[request]
        while True:
            work.check()
            replica = self._choose(name, tried)
            if replica is None:
                problem = self.problem(request.version) or "every server that has it failed"
                raise _unavailable(request.version, problem)
            tried.add(replica)
            try:
                await self._attempt(replica, name, request)
                return
            except AdapterMissing:
                self._missing(replica, {name})
                replica.wake.set()
            except ReplicaLost as error:
                if request.finished:
                    return
                replica.wake.set()
                if work.began:
                    message = "the server was lost while it answered; ask again"
                    raise ApiError(502, "replica_lost", message) from error
                log.warning("%s: %s; trying another", name, error)

    def _choose(self, name: str, tried: set[Replica]) -> Replica | None:
        """The least busy replica; of several, the one that was not used for the longest."""
        able = [r for r in self.replicas if r.up and name in r.ready and r not in tried]
        if not able:
            return None
        replica = min(able, key=lambda r: (len(r.running), r.last_used))
        replica.last_used = next(self._clock)
        return replica

    async def _attempt(self, replica: Replica, name: str, request: Generation) -> None:
        """Feed the tokens of one replica to the request, until it is finished."""
        stops = request.version.text.chat.stop_ids
        # all that changes an answer is said: a model's generation_config.json is vLLM's default for the rest
        body = {
            "model": self._adapters[name].model if name in self._adapters else name,
            "prompt": request.prompt,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request.seed & (2**63 - 1),
            "stop_token_ids": sorted(stops),
            "stream": True,
            "logprobs": 0,  # of the chosen tokens alone
            "return_token_ids": True,
        }
        work, path = self._work[request], "/v1/completions"
        timeout = httpx.Timeout(None, connect=HEALTH_SECONDS)
        try:
            async with (
                self._alive(replica),
                self._http.stream("POST", f"{replica.url}{path}", json=body, timeout=timeout) as response,
            ):
                if not response.is_success:
                    await response.aread()
                    self._check(replica, path, response)
                async for line in lines(response):
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ReplicaLost(f"{replica.url}: {chunk['error']}")
                    for choice in chunk["choices"]:
                        work.began |= bool(choice.get("token_ids"))
                        ended = choice.get("finish_reason")
                        _feed(request, choice, stops)
                        if request.finished and not ended:
                            return  # at a stop string: the server stops when the connection closes
        except httpx.HTTPError as error:
            raise ReplicaLost(f"{replica.url}: {type(error).__name__} {error}") from error
        if not request.finished:
            raise ReplicaLost(f"{replica.url}: the answer ended without its end")


def adapter_name(version: Version) -> str:
    """What a version's adapter is called on a vLLM server."""
    return f"{version.customization}-{version.adapter_digest[:SHORT_DIGEST]}"


def _feed(request: Generation, choice: Mapping[str, Any], stops: frozenset[int]) -> None:
    """Give the tokens of one chunk to the request, without the one that ends the answer."""
    reason = choice.get("finish_reason")
    if reason not in (None, "stop", "length"):
        raise ReplicaLost(f"the answer ended with {reason!r}")
    tokens = list(choice.get("token_ids") or ())
    logprobs = list((choice.get("logprobs") or {}).get("token_logprobs") or ())
    if len(logprobs) != len(tokens):
        logprobs = [None] * len(tokens)
    last = None
    if reason == "stop" and tokens and tokens[-1] in stops:
        tokens.pop()
        last = logprobs.pop()
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        request.feed(token, reason if reason == "length" and i == len(tokens) - 1 else None, logprob)
        if request.finished:  # at a stop string
            return
    if reason and not request.finished:
        request.feed(None, reason, last)


def _deviation(fingerprint: Mapping[str, Any], measured: Mapping[str, Sequence[float]]) -> float:
    """The largest difference to a fingerprint, in nats per token."""
    pairs = [
        (probe[kind], value)
        for kind in ("with", "without")
        for probe, value in zip(fingerprint["probes"], measured[kind], strict=True)
    ]
    return max(abs(expected - found) for expected, found in pairs)


def _unavailable(version: Version, problem: str) -> ApiError:
    message = f"The model {version.customization!r} is not available: {problem}"
    return ApiError(503, "model_not_available", message, param="model", headers={"Retry-After": "5"})


def _error(response: httpx.Response) -> str | None:
    """vLLM's own message, if it is one."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return None


def _said(response: httpx.Response) -> str:
    return _error(response) or response.text[:500]

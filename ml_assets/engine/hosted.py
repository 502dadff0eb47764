"""A model behind an OpenAI-compatible URL: what the probe, the evaluation and the gateway have in common.

A request has the same settings everywhere (temperature 0, a seed where the provider takes one), is asked
again when the provider is busy or fails, and never shows its key: neither in an error nor in a log.
"""

import contextlib
import dataclasses
import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx

from ml_assets.artifacts import canonical_json, read_json, sha256_bytes, write_atomic

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

Message = Mapping[str, str]
Secret = Callable[[str], str | None]
"""The value of an environment variable, None where it is not set."""

CONNECT_SECONDS = 10.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between two attempts, where the provider names none: doubled each time."""
LONGEST_RETRY_AFTER = 120.0
"""A provider that wants to be left alone for longer is not waited for."""
TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
SAID = 300
"""Characters of a provider's message that an error repeats."""
SEED = 0


class HostedError(Exception):
    """A provider does not answer as it should: the message names URL, status and field. `transient`: asking
    again later may help. `retry_after` is in seconds, if the provider said when."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        transient: bool = False,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.transient, self.retry_after = status, transient, retry_after


class BudgetExceeded(HostedError):
    """More requests are needed than may be sent."""


@dataclass(frozen=True)
class Dialect:
    """What differs between providers that speak the same protocol, found out by the probe: the word for the
    most tokens of an answer, and which optional fields they take."""

    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    optional: tuple[str, ...] = ("temperature", "seed", "stream_options")

    def without(self, said: str) -> "Dialect | None":
        """The dialect of a provider that refused a request with this message; None if it names no field that
        could be left out."""
        if self.limit == "max_tokens" and "max_completion_tokens" in said:
            return dataclasses.replace(self, limit="max_completion_tokens")
        for name in self.optional:
            if re.search(rf"\b{name}\b", said):
                return dataclasses.replace(self, optional=tuple(o for o in self.optional if o != name))
        return None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Dialect":
        return cls(body["limit"], tuple(body["optional"]))


@dataclass(frozen=True)
class Reply:
    """A whole answer, and the tokens that the provider counted."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    finish_reason: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Provider:
    """Where a hosted model answers. `key` is the secret, from the environment variable `key_name`."""

    url: str
    model: str
    key_name: str | None = None
    key: str | None = field(default=None, repr=False)
    seconds: float = 60.0
    attempts: int = 5
    dialect: Dialect = field(default_factory=Dialect)

    @classmethod
    def of(
        cls, source: Mapping[str, Any], dialect: Dialect | None = None, secret: Secret = os.environ.get
    ) -> "Provider":
        """The provider of a base's `source` block. Raises HostedError when its key is not in the
        environment, or none that a header can hold."""
        name = source.get("key")
        key = (secret(name) or "").strip() if name else None
        if name and not key:
            raise HostedError(f"{source['url']}: environment variable {name}: expected the API key, not set")
        if key and not re.fullmatch(r"[!-~]+", key):
            raise HostedError(f"{source['url']}: environment variable {name}: expected printable characters")
        return cls(
            source["url"],
            source["model"],
            name,
            key,
            source["seconds"],
            source["attempts"],
            dialect or Dialect(),
        )

    @property
    def client_options(self) -> dict[str, Any]:
        """For httpx: the key, the time allowed, and no proxy to a service on this machine."""
        return {
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": httpx.Timeout(self.seconds, connect=min(CONNECT_SECONDS, self.seconds)),
            "trust_env": urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),
        }

    def body(self, messages: Sequence[Message], max_tokens: int, **settings: Any) -> dict[str, Any]:
        """A request for an answer. Fields that this provider does not take are left out."""
        wanted = {"temperature": 0.0, "seed": SEED} | settings
        refused = {"temperature", "seed", "stream_options"} - set(self.dialect.optional)
        return {
            "model": self.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            self.dialect.limit: max_tokens,
            **{name: value for name, value in wanted.items() if name not in refused},
        }

    # -- what comes back -------------------------------------------------------------------------------

    def check(self, path: str, response: httpx.Response) -> None:
        """Raise HostedError for a status other than 200; the body must have been read."""
        if response.is_success:
            return
        status, said = response.status_code, self.hide(_said(response))
        hint = ""
        if status in (401, 403):
            hint = f" (the key in environment variable {self.key_name})" if self.key else " (no key is given)"
        raise HostedError(
            f"{self.url}{path}: status {status}{hint}: {said}",
            status=status,
            transient=status in TRANSIENT,
            retry_after=_retry_after(response),
        )

    def lost(self, path: str, error: httpx.HTTPError) -> HostedError:
        """What a failure of the network means."""
        what = "no answer in time" if isinstance(error, httpx.TimeoutException) else "not reachable"
        return HostedError(
            self.hide(f"{self.url}{path}: {what}: {type(error).__name__} {error}"), transient=True
        )

    def json(self, path: str, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            said = self.hide(response.text[:SAID])
            raise HostedError(
                f"{self.url}{path}: status {response.status_code}: expected JSON, found {said!r}",
                status=response.status_code,
                transient=True,
            ) from None
        if not isinstance(body, dict):
            raise self.wrong(path, "the body", "a JSON object", body)
        return body

    def wrong(self, path: str, name: str, expected: str, found: Any) -> HostedError:
        shown = self.hide(json.dumps(found)[:SAID])
        return HostedError(f"{self.url}{path}: status 200: {name}: expected {expected}, found {shown}")

    def reply(self, path: str, body: Mapping[str, Any], seconds: float) -> Reply:
        """The answer in the body of a chat completion. Raises HostedError that names the field."""
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self.wrong(path, "choices", "a list with an answer", choices)
        message = choices[0].get("message")
        if not isinstance(message, dict):
            raise self.wrong(path, "choices.0.message", "an object", message)
        text = message.get("content")
        if text is None:  # it refused in a field of its own, or thought until there were no tokens left
            text = message.get("refusal") or ""
        if not isinstance(text, str):
            raise self.wrong(path, "choices.0.message.content", "text", text)
        prompt_tokens, answer_tokens = self.usage(path, body.get("usage"))
        reason = choices[0].get("finish_reason")
        reason = "length" if reason == "length" else "stop"
        return Reply(text.strip(), prompt_tokens, answer_tokens, reason, seconds)

    def usage(self, path: str, usage: Any) -> tuple[int, int]:
        """(prompt tokens, answer tokens) that the provider counted. Raises HostedError."""
        if not isinstance(usage, dict):
            raise self.wrong(path, "usage", "an object with prompt_tokens and completion_tokens", usage)
        counts = []
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise self.wrong(path, f"usage.{name}", "a whole number", count)
            counts.append(count)
        return counts[0], counts[1]

    def hide(self, text: str) -> str:
        """Text without the key."""
        return text.replace(self.key, "***") if self.key else text

    # -- asking, on the caller's thread ----------------------------------------------------------------

    def get(self, http: httpx.Client, path: str) -> dict[str, Any]:
        """One GET, without a second attempt. Raises HostedError."""
        try:
            response = http.get(f"{self.url}{path}")
        except httpx.HTTPError as error:
            raise self.lost(path, error) from None
        self.check(path, response)
        return self.json(path, response)

    def complete(
        self,
        http: httpx.Client,
        messages: Sequence[Message],
        max_tokens: int,
        *,
        before: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Reply:
        """A whole answer, after as many attempts as are allowed; `before` is called before each. Raises
        HostedError."""
        path = "/chat/completions"
        body = self.body(messages, max_tokens)
        for attempt in range(1, self.attempts + 1):
            before()
            start = time.perf_counter()
            try:
                try:
                    response = http.post(f"{self.url}{path}", json=body)
                except httpx.HTTPError as error:
                    raise self.lost(path, error) from None
                self.check(path, response)
                return self.reply(path, self.json(path, response), time.perf_counter() - start)
            except HostedError as error:
                pause = wait_seconds(error, attempt)
                if attempt == self.attempts or pause is None:
                    raise
                sleep(pause)
        raise AssertionError("the last attempt raises")


def wait_seconds(error: HostedError, attempt: int) -> float | None:
    """Seconds before the next attempt, as the provider said or longer each time with some chance in it (so
    that many clients do not come back together); None when there is no point."""
    if not error.transient:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= LONGEST_RETRY_AFTER else None
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def _said(response: httpx.Response) -> str:
    """The provider's own message."""
    text = response.text
    with contextlib.suppress(ValueError, LookupError, TypeError):
        error = response.json()["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    return " ".join(text[:SAID].split())


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header, which may be a date (RFC 9110, 10.2.3)."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


# -- labels --------------------------------------------------------------------------------------------


def asked_for_labels(messages: Sequence[Message], labels: Sequence[str]) -> list[Message]:
    """A conversation that also says which answers there are. A hosted model tells no log-probabilities of
    answers that it did not give, so it can't be made to choose the most probable label."""
    told = "Answer with exactly one of these labels, and nothing else:\n" + "\n".join(
        f"- {label.strip()}" for label in labels
    )
    if messages and messages[0]["role"] == "system":
        first = {"role": "system", "content": f"{messages[0]['content']}\n\n{told}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def exact_label(text: str, labels: Sequence[str]) -> str:
    """The label that an answer means: the same but for case, spaces and punctuation around it, else the only
    one that it names; the answer itself when that is none or several."""
    plain = text.strip().strip("\"'`*.,:;!- ").casefold()
    for label in labels:
        if label.strip().casefold() == plain:
            return label.strip()
    named = [
        label.strip()
        for label in labels
        if re.search(rf"(?<!\w){re.escape(label.strip())}(?!\w)", text, re.IGNORECASE)
    ]
    # a label inside a longer one that was named was not meant
    named = [one for one in named if not any(one != other and one in other for other in named)]
    return named[0] if len(named) == 1 else text.strip()


# -- for evaluation ------------------------------------------------------------------------------------


def is_hosted(manifest: Mapping[str, Any]) -> bool:
    """Whether a base model's manifest is that of a hosted one."""
    return manifest.get("source", {}).get("kind") == "hosted"


class HostedModel:
    """What an evaluation asks instead of a `Base` in memory. Answers are kept in `cache` one by one, as they
    come: what was paid for is not asked again, also after a kill. `sent` counts requests, `money` what they
    cost. Raises HostedError where it asks."""

    def __init__(self, manifest: Mapping[str, Any], cache: Path, secret: Secret = os.environ.get):
        self.manifest = dict(manifest)
        source = manifest["source"]
        self.provider = Provider.of(source, Dialect.of(manifest["dialect"]), secret)
        self.context_length: int = manifest["context_length"]
        self.prices: tuple[float, float] = (
            source["per_1000_prompt_tokens"],
            source["per_1000_answer_tokens"],
        )
        self.max_requests: int = source["max_requests"]
        self.at_once: int = source["at_once"]
        self.sent = 0
        self.money = 0.0
        self.adapters: dict[str, dict[str, Any]] = {}
        self._cache = cache / manifest["identity"]
        self._lock = threading.Lock()

    def attach(self, name: str, directory: Path) -> None:
        """Take an adapter that is a prompt. Raises IncompatibleAdapter when it has weights, or was made for
        another base."""
        from ml_assets.engine.examples import is_prompted
        from ml_assets.engine.lora import IncompatibleAdapter

        manifest = read_json(directory / "manifest.json")
        if not is_prompted(manifest) or manifest.get("base_identity") != self.manifest["identity"]:
            raise IncompatibleAdapter(
                f"{directory}: expected a prompt for {self.manifest['revision']}, found kind "
                f"{manifest.get('kind')} for {manifest.get('base_revision')}"
            )
        self.adapters[name] = manifest

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """About how many tokens a conversation has: rather too many."""
        return estimate(self.manifest, messages)

    def count_answer(self, text: str) -> int:
        """About how many tokens an answer has: rather too many."""
        return estimate_answer(self.manifest, text)

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Reply], bool]:
        """Replies in order, and whether any of them is new. Several are asked for at the same time; the same
        conversation is asked once. Raises BudgetExceeded before the first request when more are needed than
        `max_requests` allows."""
        keys = [self._key(messages, max_new_tokens) for messages in conversations]
        found = {key: known for key in set(keys) if (known := self._recall(key))}
        wanted = {key: i for i, key in enumerate(keys) if key not in found}
        if self.sent + len(wanted) > self.max_requests:
            raise BudgetExceeded(
                f"{self.provider.url}: {len(wanted)} requests are needed, of max_requests "
                f"{self.max_requests} are {self.max_requests - self.sent} left: evaluate fewer rows "
                "(evaluation.max_rows), or raise max_requests of the base model"
            )
        if wanted:
            with httpx.Client(**self.provider.client_options) as http:
                self._ask(http, wanted, conversations, max_new_tokens, found, on_progress)
        return [found[key] for key in keys], bool(wanted)

    def _ask(
        self,
        http: httpx.Client,
        wanted: Mapping[str, int],
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int,
        found: dict[str, Reply],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        stopped = threading.Event()

        def sleep(seconds: float) -> None:
            if stopped.wait(seconds):
                raise HostedError(f"{self.provider.url}: given up, because another request failed")

        def one(key: str, messages: Sequence[Message]) -> None:
            if stopped.is_set():
                return
            reply = self.provider.complete(http, messages, max_new_tokens, before=self._spend, sleep=sleep)
            with self._lock:
                self.money += self.cost(reply.prompt_tokens, reply.answer_tokens)
                found[key] = reply
            write_atomic(self._path(key), canonical_json(vars(reply)))
            if on_progress:
                on_progress(len(found), len(conversations))

        with ThreadPoolExecutor(self.at_once, thread_name_prefix="hosted") as pool:
            futures = [pool.submit(one, key, conversations[i]) for key, i in wanted.items()]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            stopped.set()  # what has not begun is not worth paying for once one has failed
            for future in done:
                future.result()

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation as the provider counts them, for a fingerprint: asked, not remembered."""
        with httpx.Client(**self.provider.client_options) as http:
            reply = self.provider.complete(http, messages, 1, before=self._spend)
        self.money += self.cost(reply.prompt_tokens, reply.answer_tokens)
        return reply.prompt_tokens

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        """Price of a request."""
        return (prompt_tokens * self.prices[0] + answer_tokens * self.prices[1]) / 1000

    def _spend(self) -> None:
        with self._lock:
            if self.sent >= self.max_requests:
                raise BudgetExceeded(
                    f"{self.provider.url}: all {self.max_requests} requests of max_requests were sent, "
                    "repeated ones included"
                )
            self.sent += 1

    def _key(self, messages: Sequence[Message], max_new_tokens: int) -> str:
        return sha256_bytes(canonical_json(self.provider.body(messages, max_new_tokens)))

    def _path(self, key: str) -> Path:
        return self._cache / key[:2] / f"{key}.json"

    def _recall(self, key: str) -> Reply | None:
        try:
            return Reply(**json.loads(self._path(key).read_bytes()))
        except (OSError, ValueError, TypeError):  # not there, or damaged: asked again
            return None


def estimate(manifest: Mapping[str, Any], messages: Sequence[Message]) -> int:
    """About how many tokens a conversation has on a hosted base, from what its probe found: rather too
    many, as other languages have more tokens per byte than the probe's English."""
    size = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    overhead = manifest["tokens_per_message"] * len(messages)
    return math.ceil(size / (0.75 * manifest["bytes_per_token"]) + overhead)


def estimate_answer(manifest: Mapping[str, Any], text: str) -> int:
    """About how many tokens an answer has, the one that ends it included."""
    return math.ceil(len(text.encode("utf-8", "replace")) / (0.75 * manifest["bytes_per_token"])) + 1


def open_base(directory: Path, home: Path) -> "Base | HostedModel":
    """A base model artifact, ready to answer: loaded, or by its URL."""
    manifest = read_json(directory / "manifest.json")
    if is_hosted(manifest):
        return HostedModel(manifest, home / "cache" / "hosted")
    from ml_assets.engine import hardware
    from ml_assets.engine.loading import load_base

    return load_base(directory, hardware.compute_dtype(home))

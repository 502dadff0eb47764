"""A hosted base model: which revision its provider serves now, and whether it can be worked with.

Nobody outside can hash the weights. A revision is what can be known: the URL, the model's name, the label
that the YAML gives its state, and what the provider's list of models says of it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.base_models.probe import ANSWER, EXAMPLE, PROBE_TEXT, SYSTEM, Finding
from ml_assets.engine.hosted import HostedError, Provider, Reply, Secret
from ml_assets.spec import HostedBase

LOOK_SECONDS = 10.0
"""For the list of models: sensors wait for it."""
VOLATILE = frozenset(
    {
        "created",
        "created_at",
        "updated_at",
        "permission",
        "pricing",
        "status",
        "loaded",
        "available",
        "last_used",
        "object",
    }
)
"""What a list of models says of one that is no part of what it is; some servers make it up at every call."""
PROBE_TOKENS = 16


def identity(source: HostedBase, secret: Secret) -> str:
    """The content hash (64 hex) of what the provider serves now. Raises HostedError that names URL and
    status, or the models there are when this one is not listed."""
    provider = Provider.of(source.model_dump(), secret=secret)
    return _identity(source, listed(dataclasses.replace(provider, seconds=min(LOOK_SECONDS, source.seconds))))


def _identity(source: HostedBase, listing: Mapping[str, Any] | None) -> str:
    parts = {
        "url": source.url,
        "model": source.model,
        "revision": source.revision,
        "listed": None if listing is None else dict(listing),
    }
    return sha256_bytes(canonical_json(parts))


def listed(provider: Provider) -> dict[str, Any] | None:
    """What the provider's list says of the model, without what is no part of it; None when there is no list.
    Raises HostedError."""
    path = "/models"
    with httpx.Client(**provider.client_options) as http:
        try:
            body = provider.get(http, path)
        except HostedError as error:
            if error.status in (404, 405, 501):
                return None
            raise
    models = body.get("data")
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise provider.wrong(path, "data", "a list of models", models)
    for one in models:
        if one.get("id") == provider.model:
            return _lasting(one)
    names = ", ".join(sorted(str(one.get("id")) for one in models)[:10]) or "none"
    raise HostedError(
        f"{provider.url}{path}: status 200: data: expected the model {provider.model!r}, found {names}"
    )


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if key not in VOLATILE}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Probed:
    """What the probe found: a manifest without family and revision, and the checks."""

    manifest: dict[str, Any]
    findings: dict[str, Finding]
    example: str


def probe(source: HostedBase, secret: Secret, log: Callable[[str], None] = lambda _: None) -> Probed:
    """Ask the model a few short questions: whether it answers, what it takes, how it counts tokens.

    Raises HostedError that names URL, status and field when it is not reachable, does not answer a chat, or
    does not report the tokens used.
    """
    provider = Provider.of(source.model_dump(), secret=secret)
    listing = listed(provider)
    log(f"asking {source.model} at {source.url}")
    with httpx.Client(**provider.client_options) as http:
        start = time.perf_counter()
        provider, short = _learn(provider, http, EXAMPLE, PROBE_TOKENS)
        seconds = time.perf_counter() - start
        long = provider.complete(http, [{"role": "user", "content": PROBE_TEXT}], 1)
        # a conversation of several turns: what examples are
        turns = provider.complete(http, [SYSTEM, *EXAMPLE, ANSWER, *EXAMPLE], PROBE_TOKENS)
        provider, streams = _learn_streams(provider, http)
    text = short.text or turns.text
    if not text:
        raise HostedError(
            f"{provider.url}/chat/completions: status 200: choices.0.message.content: expected text within "
            f"{PROBE_TOKENS} tokens, found none"
        )
    more_bytes = len(PROBE_TEXT) - len(EXAMPLE[0]["content"])
    more_tokens = long.prompt_tokens - short.prompt_tokens
    if more_tokens <= 0 or turns.prompt_tokens <= short.prompt_tokens:
        raise HostedError(
            f"{provider.url}/chat/completions: status 200: usage.prompt_tokens: expected more for a longer "
            f"prompt, found {short.prompt_tokens}, {turns.prompt_tokens} and {long.prompt_tokens}"
        )
    content = _identity(source, listing)
    manifest = {
        "identity": content,
        "source": source.model_dump(mode="json"),
        "listed": listing,
        "dialect": {"limit": provider.dialect.limit, "optional": list(provider.dialect.optional)},
        "architecture": "hosted",
        "model_type": "hosted",
        "context_length": source.context_length,
        "bytes_per_token": round(max(1.0, more_bytes / more_tokens), 3),
        "tokens_per_message": max(
            1, short.prompt_tokens - len(EXAMPLE[0]["content"]) * more_tokens // more_bytes
        ),
        "chat_template": "hosted",
        # what can't be told apart from outside is one thing
        "chat_template_sha256": content,
        "tokenizer_sha256": content,
        "weights_sha256": content,
        "lora_targets": {},
        "eos_token_ids": [],
    }
    findings = {
        "finite_logits": Finding(True, f"hosted: it answered {text!r} in {seconds:.1f} s"),
        "better_than_chance": Finding(True, "hosted: it tells no probabilities; its answers are judged"),
        "tokenizer_round_trip": Finding(
            True, f"hosted: {manifest['bytes_per_token']} bytes of English to a token, as it counts them"
        ),
        "chat_template": Finding(
            True, f"hosted: earlier turns are read ({turns.prompt_tokens} tokens); {streams}"
        ),
    }
    return Probed(manifest, findings, _shown(turns))


def _learn(
    provider: Provider, http: httpx.Client, messages: list[dict[str, str]], max_tokens: int
) -> tuple[Provider, Reply]:
    """An answer, and the provider in the dialect that got it: a field that it refuses is left out."""
    while True:
        try:
            return provider, provider.complete(http, messages, max_tokens)
        except HostedError as error:
            dialect = provider.dialect.without(str(error)) if error.status in (400, 422) else None
            if dialect is None:
                raise
            provider = dataclasses.replace(provider, dialect=dialect)


def _learn_streams(provider: Provider, http: httpx.Client) -> tuple[Provider, str]:
    """Whether answers come in pieces with the tokens counted at the end; the gateway asks for whole answers
    otherwise."""
    body = provider.body(EXAMPLE, 2, stream=True, stream_options={"include_usage": True})
    problem = "without the tokens used"
    try:
        with http.stream("POST", f"{provider.url}/chat/completions", json=body) as response:
            text = response.read().decode("utf-8", "replace")
            provider.check("/chat/completions", response)
        if '"prompt_tokens"' in text and "data:" in text:
            return provider, "answers come in pieces"
    except (httpx.HTTPError, HostedError) as error:
        problem = provider.hide(str(error))
    dialect = dataclasses.replace(
        provider.dialect, optional=tuple(o for o in provider.dialect.optional if o != "stream_options")
    )
    return dataclasses.replace(provider, dialect=dialect), f"answers come whole, not in pieces: {problem}"


def _shown(reply: Reply) -> str:
    turns = [SYSTEM, *EXAMPLE, ANSWER, *EXAMPLE, {"role": "assistant", "content": reply.text}]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

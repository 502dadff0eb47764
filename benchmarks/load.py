"""Clients of an OpenAI-compatible server: answers streamed to several at a time, and how long they waited."""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

Request = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """One answer: when it was asked for, when its first text and its end arrived (seconds of one clock), and
    how many tokens it has."""

    asked: float
    first: float
    ended: float
    tokens: int


class LoadError(Exception):
    """A server refused a request or broke off; the message is what it said."""


def run(url: str, key: str, requests: Sequence[Request], clients: int) -> list[Answered]:
    """Send chat completion requests, `clients` at a time, each client the next one as soon as it has an
    answer. Raises LoadError at the first that is not answered."""
    return asyncio.run(_run(url, key, list(requests), clients))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


async def _run(url: str, key: str, requests: list[Request], clients: int) -> list[Answered]:
    waiting = iter(requests)
    answers: list[Answered] = []
    limits = httpx.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(timeout=600, limits=limits, headers=headers, trust_env=False) as http:

        async def client() -> None:
            for request in waiting:
                answer = await _ask(http, url, request)
                answers.append(answer)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(client())
        except* (LoadError, httpx.HTTPError) as failed:
            first = failed.exceptions[0]
            raise LoadError(f"{type(first).__name__}: {first}"[:300]) from first
    return answers


async def _ask(http: httpx.AsyncClient, url: str, request: Request) -> Answered:
    body = request | {"stream": True, "stream_options": {"include_usage": True}}
    asked = time.perf_counter()
    first = 0.0
    pieces, tokens = 0, 0
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise LoadError(f"{response.status_code}: {text}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise LoadError(str(event["error"]))
            if any(choice.get("delta", {}).get("content") for choice in event.get("choices") or ()):
                first = first or time.perf_counter()
                pieces += 1
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    ended = time.perf_counter()
    # a server that does not count sends one token at a time
    return Answered(asked, first or ended, ended, tokens or pieces)

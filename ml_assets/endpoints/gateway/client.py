"""What a release asks of a gateway, over HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ml_assets.endpoints.ledger import Release

SECONDS = 30.0
LOAD_SECONDS = 900.0
"""Loading a base model from a slow disk takes minutes."""


class GatewayError(Exception):
    """The gateway is not reachable or refuses; the message says what to do. `code` is the gateway's, such as
    `fingerprint_mismatch`, or `unreachable`."""

    def __init__(self, message: str, code: str = "unreachable"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Probed:
    """What a version answered to its fingerprint probes: mean log-probabilities (nats per token) of their
    answers with and without the adapter."""

    adapter_digest: str
    base_revision: str
    with_adapter: tuple[float, ...]
    without: tuple[float, ...]


@dataclass(frozen=True)
class Answered:
    """An answer through the public route, and who the gateway says gave it."""

    text: str
    adapter_digest: str
    base_revision: str


class GatewayClient:
    """Talks to one gateway with an admin key. Every method raises GatewayError."""

    def __init__(self, url: str, key: str):
        self.url = url.rstrip("/")
        # a proxy of the environment is not for a service of our own
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=SECONDS, trust_env=False
        )

    @classmethod
    def from_key_file(cls, url: str, path: Path) -> "GatewayClient":
        try:
            return cls(url, path.read_text().strip())
        except OSError as error:
            message = f"no admin key of the gateway in {path}: start the gateway with `make up` ({error})"
            raise GatewayError(message, "no_admin_key") from error

    def __enter__(self) -> "GatewayClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def health(self) -> dict[str, Any]:
        """The body of /healthz: `status`, `served`, `unserved`."""
        return self._request("GET", "/healthz").json()

    def serving(self, customization: str) -> str | None:
        """Digest of the adapter that answers for a customization; None when nothing does."""
        served = self.health()["served"].get(customization)
        return served and served["adapter_digest"]

    def stage(self, release: Release) -> Probed:
        """Load a version beside what serves, and measure its fingerprint."""
        fields = (
            "customization",
            "base_revision",
            "base_digest",
            "adapter_digest",
            "max_new_tokens",
            "max_prompt_tokens",
            "engine",
        )
        body = {name: getattr(release, name) for name in fields}
        return _probed(self._request("POST", "/admin/stage", body, LOAD_SECONDS).json())

    def activate(self, customization: str, adapter_digest: str | None) -> None:
        """Serve what the ledger says, which is `adapter_digest`; None after a withdrawal."""
        body = {"customization": customization, "adapter_digest": adapter_digest}
        self._request("POST", "/admin/activate", body)

    def discard(self, customization: str) -> None:
        """Forget what was staged."""
        self._request("POST", "/admin/discard", {"customization": customization})

    def probe(self, customization: str, seconds: float = LOAD_SECONDS) -> Probed:
        """Measure the fingerprint of what serves now."""
        response = self._request("POST", "/admin/probe", {"customization": customization}, seconds)
        return _probed(response.json())

    def answer(self, customization: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> Answered:
        """Ask through the route that users take."""
        body = {"model": customization, "messages": list(messages), "max_tokens": max_tokens}
        response = self._request("POST", "/v1/chat/completions", body, LOAD_SECONDS)
        content = response.json()
        fingerprint, header = content["system_fingerprint"], response.headers.get("x-evergreen-adapter")
        if fingerprint != header:
            message = f"{self.url} names adapter {header} in its header and {fingerprint} in its answer"
            raise GatewayError(message, "inconsistent")
        text = content["choices"][0]["message"]["content"]
        return Answered(text, fingerprint, response.headers["x-evergreen-base"])

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = SECONDS
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body, timeout=httpx.Timeout(seconds, connect=10))
        except httpx.ConnectError as error:
            message = f"gateway not reachable at {self.url}: start it with `make up` ({error})"
            raise GatewayError(message) from error
        except httpx.HTTPError as error:
            message = f"gateway at {self.url} did not answer {method} {path}: {type(error).__name__} {error}"
            raise GatewayError(message) from error
        if response.is_success:
            return response
        try:
            error = response.json()["error"]
            message, code = str(error["message"]), str(error["code"])
        except (ValueError, KeyError, TypeError):
            message, code = response.text[:500], "unknown"
        raise GatewayError(f"gateway at {self.url}, {path}: {response.status_code} {message}", code)


def _probed(body: Mapping[str, Any]) -> Probed:
    return Probed(
        body["adapter_digest"],
        body["base_revision"],
        tuple(body["measured"]["with"]),
        tuple(body["measured"]["without"]),
    )

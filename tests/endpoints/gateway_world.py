"""Tiny bases and adapters in an artifact store, and gateways that serve them, on a thread or as programs."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, tiny_model

from ml_assets.adapters.fingerprint import make_fingerprint, measure
from ml_assets.artifacts import ArtifactRef, ArtifactStore, sha256_bytes
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.gateway.app import create_app
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.engine.examples import Examples
from ml_assets.engine.loading import load_base

ROOT = Path(__file__).parents[2]
PROBES = [
    {"messages": [{"role": "user", "content": text}], "answer": answer}
    for text, answer in (
        ("turn on the light", '{"intent": "HassTurnOn"}'),
        ("what is the temperature?", '{"intent": "HassGetState"}'),
    )
]
QUESTION = PROBES[0]["messages"]


@dataclass(frozen=True)
class Made:
    """An adapter in the store, and what the engine answers with it to QUESTION, greedily: `answer` alone,
    `answers` also in batches (rounding depends on the shape, on some machines visibly)."""

    customization: str
    base_revision: str
    base_digest: str
    digest: str
    answer: str
    answers: frozenset[str]

    def release(self, **values: Any) -> Release:
        fields: dict[str, Any] = {
            "customization": self.customization,
            "base_revision": self.base_revision,
            "base_digest": self.base_digest,
            "adapter_digest": self.digest,
            "report_digest": "c" * 64,
            "mlflow_version": "1",
            "run_id": "run",
            "actor": "test",
            "reason": "test",
            "max_new_tokens": 12,
        }
        return Release(**(fields | values))


class World:
    """An EVERGREEN_HOME with an artifact store, a ledger, an admin key and a key for everything. `heads` are
    the attention heads of its bases."""

    def __init__(self, home: Path, heads: int = 4):
        self.home = home
        self.heads = heads
        self.store = ArtifactStore(str(home / "artifacts"))
        self.ledger_url = f"sqlite:///{home / 'ledger.db'}"
        self.ledger = Ledger(self.ledger_url)
        self.admin_key = keys.ensure_admin_key(self.ledger, home / keys.ADMIN_KEY_FILE)
        self.key = keys.create(self.ledger, ["*"], name="test")[0]
        self._bases: dict[tuple[str, int], tuple[Any, ArtifactRef]] = {}
        self._numbers = itertools.count()

    def base(self, architecture: str = "llama", seed: int = 0) -> tuple[Any, ArtifactRef]:
        """(loaded base, its artifact)."""
        if (architecture, seed) not in self._bases:
            with self.store.staging("base_model") as directory:
                base = _base(architecture, directory, seed, self.heads)
                ref = self.store.publish_directory("base_model", directory)
            base.model.name_or_path = str(self.store.open(ref))
            self._bases[architecture, seed] = base, ref
        return self._bases[architecture, seed]

    def adapter(
        self,
        customization: str,
        seed: int,
        *,
        architecture: str = "llama",
        base_seed: int = 0,
        manifest: dict[str, Any] | None = None,
        fingerprint_of: int | None = None,
        system: str | None = None,
    ) -> Made:
        """A random adapter. `fingerprint_of` claims the fingerprint of the adapter with another seed."""
        base, base_ref = self.base(architecture, base_seed)
        with self.store.staging("adapter") as directory:
            _random_adapter(base, directory, seed)
            claimed = directory
            with contextlib.ExitStack() as stack:
                if fingerprint_of is not None:
                    claimed = stack.enter_context(self.store.staging("adapter"))
                    _random_adapter(base, claimed, fingerprint_of)
                fingerprint = _fingerprint(base, claimed)
            body = _pins(base) | {
                "customization": customization,
                "base_revision": base.manifest["revision"],
                "prompt": {"system": system, "user": "{text}", "target": "{answer}"},
                "seed": seed,
                "fingerprint": fingerprint,
            }
            (directory / "manifest.json").write_text(json.dumps(body | (manifest or {})))
            answers = [""] if manifest else _answers(base, directory)
            ref = self.store.publish_directory("adapter", directory)
        revision = base.manifest["revision"]
        return Made(customization, revision, base_ref.digest, ref.digest, answers[0], frozenset(answers))

    def prompted(
        self, customization: str, examples: list[tuple[str, str]], *, system: str | None = None
    ) -> Made:
        """An adapter that has examples instead of weights."""
        base, base_ref = self.base()
        context = base.context_length
        shown = Examples(tuple(examples), 12)

        def tokens(messages: Any) -> int:
            return len(base.chat.prompt_ids(messages))

        asked = [probe | {"messages": shown.before(probe["messages"], tokens, context)} for probe in PROBES]
        with_examples, without = measure(base, asked), measure(base, PROBES)
        manifest = _pins(base) | {
            "customization": customization,
            "base_revision": base.manifest["revision"],
            "kind": "prompt",
            "prompt": {"system": system, "user": "{text}", "target": "{answer}"},
            "examples": [list(pair) for pair in examples],
            "answer_tokens": 12,
            "fingerprint": make_fingerprint(PROBES, with_examples, without, must_differ=False),
        }
        ref = self.store.publish("adapter", {"manifest.json": json.dumps(manifest).encode()})
        messages = [{"role": "system", "content": system}, *QUESTION] if system else QUESTION
        answers = _generated(base, base.chat.prompt_ids(shown.before(messages, tokens, context)))
        revision = base.manifest["revision"]
        return Made(customization, revision, base_ref.digest, ref.digest, answers[0], frozenset(answers))

    def record(self, made: Made, **values: Any) -> Release:
        """What a release writes."""
        release = made.release(**values)
        with self.ledger.release_transaction(release.customization, release.run_id) as tx:
            return tx.record(release)


def _base(architecture: str, directory: Path, seed: int, heads: int) -> Any:
    """A tiny base whose probabilities differ from token to token: those of random weights are nearly equal,
    so that no adapter could change them much and rounding could change the answer."""
    tiny_model(architecture, directory, seed=seed, heads=heads)
    path = directory / "model.safetensors"
    weights = load_file(path)
    names = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
    output = next(name for name in names if name in weights)
    weights[output] = weights[output] * 30
    save_file(weights, path, metadata={"format": "pt"})
    manifest = {
        "revision": f"tiny-{architecture}@{seed:012d}",
        "identity": sha256_bytes(f"{architecture}{seed}".encode()),
        "tokenizer_sha256": "t",
        "chat_template_sha256": "c",
        "context_length": CONTEXT,
        "eos_token_ids": [],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return load_base(directory)


def _pins(base: Any) -> dict[str, str]:
    names = {"base_identity": "identity", "tokenizer_sha256": "", "chat_template_sha256": ""}
    return {ours: base.manifest[theirs or ours] for ours, theirs in names.items()}


def _random_adapter(base: Any, directory: Path, seed: int) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.model.name_or_path, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = PeftModel(plain, config, adapter_name="default")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    (directory / "manifest.json").write_text(json.dumps(_pins(base)))


def _fingerprint(base: Any, directory: Path) -> dict[str, Any]:
    without = measure(base, PROBES)
    base.attach("probe", directory)
    with base.active("probe"):
        measured = measure(base, PROBES)
    base.detach("probe")
    return make_fingerprint(PROBES, measured, without)


def _answers(base: Any, directory: Path) -> list[str]:
    base.attach("probe", directory)
    with base.active("probe"):
        found = _generated(base, base.chat.prompt_ids(QUESTION))
    base.detach("probe")
    return found


def _generated(base: Any, prompt: list[int]) -> list[str]:
    from ml_assets.engine.generation import generate

    return [c.text for rows in (1, 2, 3, 4, 8) for c in generate(base, [prompt] * rows, 12)]


def said_in(lines: Iterable[str]) -> str:
    """The answer in the lines of a stream."""
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])


@contextlib.contextmanager
def gateway_in_thread(world: World, **options: Any) -> Iterator[tuple[str, Any]]:
    """(url, app) of a gateway on a thread of this process, once it has loaded what the ledger says."""
    app = create_app(world.ledger, world.store, **options)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, lambda: thread.is_alive() or "the server thread ended")
        yield url, app
    finally:
        server.should_exit = True
        thread.join(30)


def wait_until_ready(url: str, alive: Callable[[], bool | str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz/ready").status_code == 200:
                return
        assert alive() is True, alive()
        time.sleep(0.05)
    raise AssertionError("not ready in time")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A gateway program: `python -m ml_assets.endpoints.gateway`."""

    def __init__(self, world: World, port: int | None = None):
        self.world = world
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = world.home / "gateway.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it has loaded what it serves."""
        process = self.launch()
        wait_until_ready(self.url, lambda: process.poll() is None or self.log.read_text())

    def launch(self) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "EVERGREEN_HOME": str(self.world.home),
            "EVERGREEN_GATEWAY_PORT": str(self.port),
            "EVERGREEN_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "ml_assets.endpoints.gateway"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=self.world.home)
        return self.process

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process
        self.process.terminate()
        return self.process.wait(30)


@contextlib.contextmanager
def running_server(world: World) -> Iterator[Server]:
    server = Server(world)
    try:
        server.start()
        yield server
    finally:
        if server.process and server.process.poll() is None:
            server.kill()

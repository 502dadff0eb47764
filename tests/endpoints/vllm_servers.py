"""vLLM servers for tests: the program itself, where it is installed, and a small one that speaks the routes
which the gateway uses, computes with our own engine, and fails on demand."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from gateway_world import Made, World, free_port

from ml_assets.artifacts import read_json
from ml_assets.engine.loading import load_base
from ml_assets.engine.scoring import mean_logprobs

START_SECONDS = 300


def name_of(made: Made) -> str:
    return f"{made.customization}-{made.digest[:16]}"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


class SmallVllm:
    """A server of one base, in this process. Attributes make it fail: `swap` gives the adapter in one path
    for that in another, `token_seconds` passes before every token, `break_after` tokens the connection
    breaks, `refuse` is the answer to a load, `status` the one to completions, `runtime_loras` and `mounted`
    say whether adapters can be loaded at all, and be seen; while it `hangs` it says nothing. `log` holds what
    was asked, `open` how many answers are being given; it answers what it `says`, if that is not empty."""

    def __init__(self, world: World, made: Made, *, served_name: str | None = None, api_key: str = ""):
        directory = world.home / "artifacts" / "base_model" / made.base_digest
        # the number format of the bases in `world`: measuring which is faster takes seconds
        self.base = load_base(directory, next(world.base()[0].model.parameters()).dtype)
        self.served_name = served_name or read_json(directory / "manifest.json")["revision"]
        self.api_key = api_key
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.adapters: dict[str, str] = {}
        self.swap: dict[str, str] = {}
        self.token_seconds = 0.0
        self.break_after: int | None = None
        self.refuse: str | None = None
        self.status = 200
        self.tells_logprobs = True
        self.runtime_loras = True
        self.mounted = True
        self.hangs = False
        self.says = ""
        self.log: list[tuple[str, str]] = []
        self.open = 0
        self._lock = threading.Lock()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        config = uvicorn.Config(self._app(), port=self.port, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_for(lambda: self._server and self._server.started, "the small vLLM to start")

    def stop(self) -> None:
        """Gone, with all that was loaded."""
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(30)
            self._server = None
        self.adapters.clear()

    def asked(self, what: str) -> list[str]:
        return [name for kind, name in self.log if kind == what]

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def authorize(request: Request, following: Any) -> Response:
            while self.hangs:
                await asyncio.sleep(0.02)
            given = request.headers.get("authorization")
            if self.api_key and request.url.path != "/health" and given != f"Bearer {self.api_key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await following(request)

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            base = {"id": self.served_name, "parent": None, "max_model_len": self.base.context_length}
            loras = [
                {"id": name, "root": path, "parent": self.served_name, "max_model_len": None}
                for name, path in self.adapters.items()
            ]
            return {"object": "list", "data": [base, *loras]}

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> Response:
            if not self.runtime_loras:
                return JSONResponse({"detail": "Not Found"}, 404)
            body = await request.json()
            name, path = body["lora_name"], body["lora_path"]
            self.log.append(("load", name))
            assert not body.get("load_inplace")
            if name in self.adapters:
                return _error(400, f"The lora adapter '{name}' has already been loaded.")
            if self.refuse:
                return _error(500, self.refuse)
            if not self.mounted:
                return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
            with self._lock:
                if path not in self.base.adapters:
                    self.base.attach(path, Path(self.swap.get(path, path)))
            self.adapters[name] = path
            return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> Response:
            name = (await request.json())["lora_name"]
            self.log.append(("unload", name))
            if name not in self.adapters:
                return _error(404, f"The lora adapter '{name}' cannot be found.")
            path = self.adapters.pop(name)
            with self._lock:
                self.base.detach(path)
            return PlainTextResponse("Success")

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            model, prompt = body["model"], body["prompt"]
            probed = body.get("allowed_token_ids")
            self.log.append(("probe" if probed else "answer", model))
            if model != self.served_name and model not in self.adapters:
                return _error(404, f"The model `{model}` does not exist.")
            path = self.adapters.get(model)
            if probed:
                return JSONResponse(await run_in_threadpool(self._score, path, prompt, probed))
            if self.status != 200:
                return _error(self.status, "told to fail")
            assert body["return_token_ids"] and body["top_k"] == 0 and body["repetition_penalty"] == 1.0
            return StreamingResponse(self._stream(path, body), media_type="text/event-stream")

        return app

    def _score(self, path: str | None, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        with self._lock, self.base.active(path):
            value = mean_logprobs(self.base, [(prompt, answer)])[0]
        return {"choices": [{"token_ids": answer, "logprobs": {"token_logprobs": [value]}}]}

    async def _stream(self, path: str | None, body: dict[str, Any]) -> AsyncIterator[bytes]:
        from ml_assets.engine.generation import generate

        def answer() -> Any:
            with self._lock, self.base.active(path):
                return generate(self.base, [body["prompt"]], body["max_tokens"])[0]

        def chunk(tokens: list[int], reason: str | None) -> bytes:
            text = self.base.tokenizer.decode(tokens)
            choice: dict[str, Any] = {"index": 0, "text": text, "token_ids": tokens, "finish_reason": reason}
            if self.tells_logprobs and "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": [-0.25 if reason == "stop" else -0.5] * len(tokens)}
            return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()

        self.open += 1
        try:
            completion = await run_in_threadpool(answer)
            tokens = self.base.tokenizer(self.says)["input_ids"] if self.says else completion.token_ids
            for i, token in enumerate(tokens):
                if self.break_after == i:
                    raise ConnectionError("told to break the connection")
                await asyncio.sleep(self.token_seconds)
                while self.hangs:
                    await asyncio.sleep(0.02)
                last = i == len(tokens) - 1 and completion.finish_reason == "length"
                yield chunk([token], "length" if last else None)
            if completion.finish_reason == "stop":
                yield chunk(body["stop_token_ids"][:1], "stop")
            yield b"data: [DONE]\n\n"
        finally:
            self.open -= 1


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


@contextlib.contextmanager
def small_vllm(world: World, made: Made, **options: Any) -> Iterator[SmallVllm]:
    server = SmallVllm(world, made, **options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


# -- the program -----------------------------------------------------------------------------------------


def installed() -> Path | None:
    """The Python of the environment that has vLLM: that of the executable which EVERGREEN_TEST_VLLM names,
    or that on the PATH."""
    found = os.environ.get("EVERGREEN_TEST_VLLM") or shutil.which("vllm")
    python = Path(found).parent / "python" if found else None
    if python and not python.exists():
        raise FileNotFoundError(f"EVERGREEN_TEST_VLLM: expected a Python beside {found}")
    return python


class Vllm:
    """A vLLM process that serves a base of `world` under its revision."""

    def __init__(self, world: World, base_digest: str, python: Path):
        self.directory = world.home / "artifacts" / "base_model" / base_digest
        self.revision = read_json(self.directory / "manifest.json")["revision"]
        self.python = python
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = world.home / f"vllm-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        env = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(self.python.parent), os.environ["PATH"]]),
        }
        env.pop("PYTHONPATH", None)
        # not `vllm serve`: that command of the vllm-cpu package ends at once, for want of its own metadata
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.directory), "--served-model-name", self.revision]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16"]
        command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--max-cpu-loras", "8"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        assert self.process
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)
        raise AssertionError(f"vLLM did not start within {START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        assert self.process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait(30)

    def adapters(self) -> set[str]:
        cards = httpx.get(f"{self.url}/v1/models").json()["data"]
        return {card["id"] for card in cards if card["parent"]}

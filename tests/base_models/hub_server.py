"""A local server that speaks the part of the Hugging Face hub's HTTP API that downloads need."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves `repos`: {"owner/name": {40-hex revision: directory}}, and `branches`: {name: revision}, the
    same for all. Repositories in `private` need the token `secret`. `requests` holds "METHOD path" of all
    requests, `fail` answers them all with 503."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.repos: dict[str, dict[str, Path]] = {}
        self.branches: dict[str, str] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.fail = False

    @property
    def downloads(self) -> list[str]:
        """Names of the files that were sent."""
        sent = [
            r.partition("/resolve/")[2] for r in self.requests if r.startswith("GET ") and "/resolve/" in r
        ]
        return sorted(name.partition("/")[2] for name in sent)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.fail:
            return self.reply(503, b"{}", {}, send_body)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, verb, revision, name = "/".join(parts[2:4]), *parts[4:6], ""
        else:
            repo, verb, revision, name = "/".join(parts[:2]), *parts[2:4], "/".join(parts[4:])
        if repo not in hub.repos:
            return self.error(404, "RepoNotFound", "Repository not found", send_body)
        if repo in hub.private and self.headers.get("Authorization") != "Bearer secret":
            return self.error(401, "RepoNotFound", "Invalid username or password.", send_body)
        revision = hub.branches.get(revision, revision)
        directory = hub.repos[repo].get(revision)
        if directory is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}", send_body)
        files = {
            p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()
        }
        if verb == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in sorted(files.items())
            ]
            return self.reply(
                200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, send_body
            )
        if verb == "revision":
            info = {"id": repo, "sha": revision, "siblings": [{"rfilename": n} for n in sorted(files)]}
            return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, send_body)
        if verb == "resolve" and name in files:
            headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": revision}
            return self.reply(200, files[name], headers, send_body)
        return self.error(404, "EntryNotFound", "Entry not found", send_body)

    def error(self, status: int, code: str, message: str, send_body: bool) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(status, json.dumps({"error": message}).encode(), headers, send_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

"""A stand-in for the Hugging Face hub on this machine: repositories of files that can be listed and downloaded."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "a" * 40


@contextlib.contextmanager
def hub(repos: Mapping[str, Mapping[str, bytes]], home: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serve repositories, {"owner/name": {"path": content}}.

    Yields the environment that makes a child process use it, with a cache in `home`, and the requests so far.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            requests.append(f"{self.command} {self.path} {status}")
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def error(self, code: str) -> None:
            self.answer(404, X_Error_Code=code, X_Error_Message=code)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo = "/".join(parts[2:4])
                if repo not in repos:
                    return self.error("RepoNotFound")
                # The tree of a repository, at whatever folder: all of its files.
                content = [_entry(name, data) for name, data in repos[repo].items()]
                return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if repo not in repos:
                return self.error("RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.error("RevisionNotFound")
            if name not in repos[repo]:
                return self.error("EntryNotFound")
            content = repos[repo][name]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            parts = unquote(self.path).strip("/").split("/")
            files = repos.get("/".join(parts[2:4]), {})
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            found = [_entry(name, files[name]) for name in paths if name in files]
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        yield environment, requests
    finally:
        server.shutdown()
        server.server_close()


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}

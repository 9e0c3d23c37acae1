"""A stand-in for Hugging Face: the few endpoints that huggingface_hub calls to make a repository, commit and read."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_T0KEN"
REVISION = "0" * 40


class Hub(ThreadingHTTPServer):
    """Holds repositories: {"models/owner/name": {"private": ..., "files": {path: bytes}}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}  # how often a commit of a path is still refused
        self.calls: list[str] = []
        self.gate = threading.Event()  # commits wait for it
        self.gate.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str = "models/me/it") -> dict[str, bytes]:
        return self.repositories[repository]["files"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content=b"", code: int = 200, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path, body = self.path.split("?")[0], self._body()
        self.server.calls.append(f"{self.command} {path}")
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if match := re.fullmatch(r"/put/(\w+)", path):
            self.server.blobs[match[1]] = body
            return self._answer()
        if not allowed:
            return self._answer({"error": "no token"}, 401, X_Error_Message="Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner, name = asked.get("organization") or "me", asked["name"]
            key = f"{asked.get('type', 'model')}s/{owner}/{name.split('/')[-1]}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.repositories.setdefault(key, {"private": private, "files": {}})
            return self._answer({"url": f"{self.server.url}/{owner}/{name.split('/')[-1]}", "name": key})
        if match := re.fullmatch(r"/(?:api/)?(?:(models|datasets)/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", path):
            key = f"{match[1] or 'models'}/{match[2]}"
            if key not in self.server.repositories:
                return self._answer({"error": "gone"}, 404, X_Error_Code="RepoNotFound")
            return self._repository(self.server.repositories[key]["files"], key, match[3] or "", body)
        return self._answer({"error": "unknown"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _repository(self, files: dict[str, bytes], key: str, rest: str, body: bytes) -> None:
        if rest == "" or rest.startswith("revision/"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self._answer({"id": key.split("/", 1)[1], "sha": REVISION, "siblings": siblings})
        if rest.startswith("preupload/"):
            asked = json.loads(body)["files"]
            modes = [("lfs" if each["path"].endswith((".safetensors", ".bin")) else "regular") for each in asked]
            names = [each["path"] for each in asked]
            found = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for name, mode in zip(names, modes, strict=True)
            ]
            return self._answer({"files": found})
        if rest == "info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/put/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if rest.startswith("commit/"):
            return self._commit(files, [json.loads(line) for line in body.splitlines() if line.strip()])
        if rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in sorted(files.items())
            ]
            return self._answer(tree)
        if rest.startswith("resolve/"):
            name = rest.split("/", 2)[2]
            if name not in files:
                return self._answer({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
            return self._answer(files[name], ETag=f'"{_etag(files[name])}"', X_Repo_Commit=REVISION)
        return self._answer({"error": "unknown"}, 404)

    def _commit(self, files: dict[str, bytes], lines: list[dict]) -> None:
        self.server.gate.wait(20)
        found = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.server.blobs[value["oid"]]
        for path in found:
            if self.server.refused.get(path):
                self.server.refused[path] -= 1
                return self._answer({"error": "refused"}, 403, X_Error_Message="Not today.")
        files.update(found)
        return self._answer(
            {"commitUrl": f"{self.server.url}/me/it/commit/{REVISION}", "commitOid": REVISION, "success": True}
        )


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()

"""The endpoints of the Hub that publishing calls, on this machine; it remembers repositories, files and what was sent.

Content addressed as the Hub does it: files are small and come with the commit, or are large (LFS), are sent once to the
storage and are named by their sha256 in the commit.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_never_to_be_seen_anywhere"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes | str]] = field(default_factory=lambda: {"main": {}})
    """Files by branch: content, or the digest of a large one."""
    commits: int = 0


class Hub(ThreadingHTTPServer):
    """hold: lets so many large files in, and keeps the next ones waiting until it is closed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.sent: list[str] = []
        """Digests of large files that came in, in order."""
        self.hold: int | None = None
        self.held = threading.Event()
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def content(self, repo: str, name: str, branch: str = "main") -> bytes:
        found = self.repos[repo].branches[branch][name]
        return self.storage[found] if isinstance(found, str) else found


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # headers and content in one write: between two a client's acknowledgement takes 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # a client that was killed
            self.close_connection = True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._answer(200 if self._known() else 401, {"name": "ada", "error": "who?"})
        parts = path.removeprefix("/api/models/").split("/")
        repo = self.server.repos.get("/".join(parts[:2]))
        if repo is None or not self._known():
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if parts[2:3] == ["tree"]:
            files = repo.branches[parts[3]]
            return self._answer(200, [self._listed(name, found) for name, found in files.items()])
        listed = {"id": "/".join(parts[:2]), "sha": f"{repo.commits:040x}", "private": repo.private}
        names = [{"rfilename": name} for name in repo.branches["/".join(parts[3:]) or "main"]]
        return self._answer(200, listed | {"siblings": names, "tags": [], "downloads": 0, "likes": 0})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if not self._known():
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self._create(json.loads(data))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(data))
        parts = path.removeprefix("/api/models/").split("/")
        repo, what, branch = self.server.repos["/".join(parts[:2])], parts[2], "/".join(parts[3:])
        if what == "branch":
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            return self._answer(200, {})
        if what == "preupload":
            return self._preupload(repo.branches[branch], json.loads(data))
        assert what == "commit", path
        return self._commit(repo, "/".join(parts[:2]), branch, [json.loads(line) for line in data.splitlines()])

    def do_PUT(self) -> None:
        digest, server = self.path.rpartition("/")[2], self.server
        with server.lock:
            waits = server.hold is not None and server.hold <= 0
            if server.hold is not None:
                server.hold -= 1
        if waits:
            server.held.set()
            server.closed.wait()
            return
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == digest
        server.storage[digest] = data
        server.sent.append(digest)
        self._answer(200, {})

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, body: dict[str, Any]) -> None:
        name = f"{body['organization']}/{body['name']}"
        if name in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": self._url(name)})
        if body["organization"] != "ada":
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        self.server.repos[name] = Repo(body.get("visibility") == "private")
        return self._answer(200, {"url": self._url(name)})

    def _url(self, name: str) -> str:
        return f"{self.server.url}/{name}"

    def _preupload(self, files: dict[str, Any], body: dict[str, Any]) -> None:
        found = []
        for file in body["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            oid = self._oid(files[file["path"]]) if file["path"] in files else None
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": found})

    def _batch(self, body: dict[str, Any]) -> None:
        objects = []
        for each in body["objects"]:
            action = {"upload": {"href": f"{self.server.url}/storage/{each['oid']}"}}
            objects.append(each | ({} if each["oid"] in self.server.storage else {"actions": action}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.branches[branch])
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert value["oid"] in self.server.storage
                files[value["path"]] = value["oid"]
        repo.branches[branch], repo.commits = files, repo.commits + 1
        commit = f"{repo.commits:040x}"
        self._answer(200, {"commitUrl": f"{self._url(name)}/commit/{commit}", "commitOid": commit})

    def _listed(self, name: str, found: bytes | str) -> dict[str, Any]:
        large = isinstance(found, str)
        size = len(self.server.storage[found] if large else found)
        listed = {"type": "file", "path": name, "size": size, "oid": self._oid(found)}
        return listed | ({"lfs": {"oid": found, "size": size, "pointerSize": 134}} if large else {})

    @staticmethod
    def _oid(found: bytes | str) -> str:
        """As git has it; of a large file its sha256."""
        if isinstance(found, str):
            return found
        return hashlib.sha1(b"blob %d\0" % len(found) + found).hexdigest()

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

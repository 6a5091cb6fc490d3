"""A data set of the hub over HTTP: its rows at a pinned commit, downloaded whole or read as they are needed."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMITS = {"a" * 40: 5000, "b" * 40: 3}
"""Rows of the data set by commit; the newest is the last."""
PROGRAM = """
import json, sys
from qlora.data.sources import open_rows
from qlora.recipe import Source
for fields in json.loads(sys.argv[1]):
    rows = [row.content for row in open_rows(Source.model_validate({"path": "ada/rows", **fields})).read()]
    print("RESULT", json.dumps([len(rows), rows[-1]]))
"""


def file_of(commit: str) -> bytes:
    rows = ({"prompt": f"{number} of {commit[0]}?", "completion": "x" * 200} for number in range(COMMITS[commit]))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Handler(BaseHTTPRequestHandler):
    """What the libraries ask the hub for when they read `ada/rows`, which has the one file data/train.jsonl."""

    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # headers and content in one write: between two a client's acknowledgement takes 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = json.loads(data)["paths"] if self.headers["Content-Type"] == "application/json" else []
        commit = urlsplit(self.path).path.rpartition("/")[2]
        self.answer(json.dumps([self.entry(commit)] if "data/train.jsonl" in wanted else []).encode())

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:4] == ["api", "datasets", "ada", "rows"]:
            commit = parts[5] if len(parts) > 5 and parts[5] in COMMITS else list(COMMITS)[-1]
            if parts[4:5] == ["tree"]:
                inside = parts[6:] in ([], ["data"])
                return self.answer(json.dumps([self.entry(commit)] if inside else []).encode())
            about = {"id": "ada/rows", "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self.answer(json.dumps(about | {"siblings": [{"rfilename": "data/train.jsonl"}]}).encode())
        if parts[:4] == ["datasets", "ada", "rows", "resolve"] and parts[5:] == ["data", "train.jsonl"]:
            content = file_of(parts[4])
            if asked := self.headers.get("Range"):
                start, _, end = asked.removeprefix("bytes=").partition("-")
                stop = min(int(end) + 1 if end else len(content), len(content))
                span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
                return self.answer(content[int(start) : stop], 206, parts[4], span)
            return self.answer(content, 200, parts[4])
        return self.answer(b'{"error": "not found"}', 404, headers={"X-Error-Code": "EntryNotFound"})

    def entry(self, commit: str) -> dict:
        return {"type": "file", "path": "data/train.jsonl", "size": len(file_of(commit)), "oid": commit}

    def answer(
        self, content: bytes, status: int = 200, commit: str = "", headers: dict[str, str] | None = None
    ) -> None:
        self.server.sent += len(content) if self.command == "GET" and commit else 0
        about = {"ETag": f'"{commit}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"} if commit else {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **about, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sent = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_rows_are_those_of_the_commit_streamed_or_downloaded(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path)}
    pinned = {"revision": "a" * 40}
    asked = json.dumps([pinned | {"stream": True}, pinned, {}])
    result = subprocess.run([sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line.removeprefix("RESULT ")) for line in result.stdout.splitlines() if "RESULT" in line]
    whole = [5000, {"prompt": "4999 of a?", "completion": "x" * 200}]
    assert found == [whole, whole, [3, {"prompt": "2 of b?", "completion": "x" * 200}]]  # the newest has 3
    assert hub.sent >= 2 * len(file_of("a" * 40)) + len(file_of("b" * 40))

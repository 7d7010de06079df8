"""A stand-in for the Hugging Face hub: an HTTP server on this machine that speaks what its client needs.

It knows repositories of models: made, asked for, written by commits whose large files come by LFS, and downloaded.
Writing and private repositories need the token `TOKEN`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_of_the_tests"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass(kw_only=True)
class Repo:
    """A repository: its files, and its commits as (message, paths written, paths removed)."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str], list[str]]] = field(default_factory=list)


@dataclass(kw_only=True)
class Hub:
    """The stand-in's address and what it holds."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # by sha256
    asked: list[str] = field(default_factory=list)  # method and path of every request

    def environment(self, home: str, token: str | None = TOKEN) -> dict[str, str]:
        """What makes a process use this hub, with nothing of the user's."""
        login = {} if token is None else {"HF_TOKEN": token}
        return {"HF_ENDPOINT": self.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | login


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.held.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                return self._json({"error": "the content has another hash"}, 400)
            self.held.lfs[found[1]] = body
            return self._json({})
        if self.command == "POST" and not allowed:
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(/.*)?", path):
            repo = self.held.repos.get(found[1])
            if repo is None or (repo.private and not allowed):
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return self._repo(found[1], repo, found[2] or "", body)
        return self._json({"error": f"nothing at {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.held.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.held.url}/{name}"}, 409)
        self.held.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json({"url": f"{self.held.url}/{name}", "name": name, "id": name})

    def _repo(self, name: str, repo: Repo, what: str, body: bytes) -> None:
        if found := re.fullmatch(r"/resolve/[^/]+/(.+)", what):
            return self._file(repo, found[1])
        if what == "/info/lfs/objects/batch":
            objects = [
                one | {"actions": {"upload": {"href": f"{self.held.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if re.fullmatch(r"/preupload/[^/]+", what):
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if re.fullmatch(r"/commit/[^/]+", what):
            return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if re.fullmatch(r"/tree/[^/]+(/.*)?", what):
            return self._json([{"type": "file", "path": p, "size": len(c), "oid": SHA} for p, c in repo.files.items()])
        if what == "" or re.fullmatch(r"/revision/[^/]+", what):
            names = [{"rfilename": path} for path in repo.files]
            return self._json({"id": name, "sha": SHA, "private": repo.private, "siblings": names, "tags": []})
        return self._json({"error": f"nothing at {what}"}, 404)

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        written: dict[str, bytes] = {}
        removed: list[str] = []
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.held.lfs:
                    return self._json({"error": "the LFS object was never sent"}, 400)
                written[value["path"]] = self.held.lfs[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                removed.append(value["path"])
                del repo.files[value["path"]]
        repo.files |= written
        repo.commits.append((message, sorted(written), sorted(removed)))
        return self._json({"commitUrl": f"{self.held.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

    def _file(self, repo: Repo, path: str) -> None:
        if path not in repo.files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = repo.files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        return self._send(content, 200, "application/octet-stream", headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if status >= 400:
            headers = {"X-Error-Message": value["error"]} | (headers or {})
        self._send(json.dumps(value).encode(), status, "application/json", headers or {})

    def _send(self, content: bytes, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

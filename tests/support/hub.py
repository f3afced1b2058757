"""A Hugging Face Hub on this machine: enough of its HTTP interface for huggingface_hub, downloads and uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/tiny-olmo2"
TOKEN = "hf_of_the_owner"
"""the one token that there is"""

Files: TypeAlias = dict[str, "Path | bytes"]

_LARGE = 4096  # bytes from which a file goes to the large file storage
_JSON = {"Content-Type": "application/json"}


@dataclass
class Repository:
    """What lies under one name."""

    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    """of the commits that were pushed"""
    private: bool = False
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    """the front matter of its README.md"""

    def commit(self, revision: str) -> str | None:
        known = {**self.branches, **self.tags, **{commit: commit for commit in self.commits}}
        return known.get(revision)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the branch main."""
        return {name: content(file) for name, file in self.commits[self.branches["main"]].items()}


@dataclass
class Hub:
    """What the server is asked to do, and what it has seen."""

    url: str = ""
    cut_once: str | None = None
    """a file whose first transfer breaks off half-way"""
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    """(file, Range header) of every GET"""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """the large file storage, by sha256"""
    uploads: list[str] = field(default_factory=list)
    """sha256 of every object that was sent"""
    read_only: bool = False
    """the token may read and not write"""
    room: int | None = None
    """objects that are taken before the storage refuses; None: all"""
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    """end of a path that is posted to -> the status that answers it, and its words"""


def commit_of(revision: str) -> str:
    """The commit at which `local_hub` serves a revision that is given by name."""
    return COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()


def content(file: Path | bytes) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def files(folder: Path) -> Files:
    """All files of a folder, also of those in it."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def refs_of(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
    """Branches (heads) or tags, as the Hub lists them."""
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()]


def point_to(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, *, offline: bool = False) -> None:
    """Do in this process what HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE do in a new one, which costs five seconds.

    The library reads them when it is imported, and its constants at every call.
    """
    names = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    names |= {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_XET_CACHE": str(cache / "xet")}
    names |= {"HF_TOKEN_PATH": str(cache / "token"), "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens")}
    for name, value in names.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()  # of another server


@contextmanager
def local_hub(
    folder: Path | None = None,
    revisions: Mapping[str, Path] | None = None,
    tags: Mapping[str, Path] | None = None,
) -> Iterator[Hub]:
    """Serve a checkpoint folder as `REPOSITORY`, branch main at `COMMIT`, and others as other branches and tags.

    Without a folder there is no repository yet.
    """
    hub = Hub()
    if folder is not None:
        branches, tags = {"main": folder, **(revisions or {})}, tags or {}
        hub.repositories[REPOSITORY] = Repository(
            {name: commit_of(name) for name in branches},
            {name: commit_of(name) for name in tags},
            {commit_of(name): files(path) for name, path in {**branches, **tags}.items()},
        )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            self.write(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            oid = self.path.removeprefix("/objects/")
            if hub.room is not None and len(hub.uploads) >= hub.room:
                self.send(400, b"{}", {"X-Error-Message": "the storage is full"})
                return
            assert hashlib.sha256(data).hexdigest() == oid
            hub.uploads.append(oid)
            hub.objects[oid] = data
            self.send(200, b"", {})

        def answer(self, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                self.refuse(body)
                return
            for name, repository in hub.repositories.items():
                if repository.private and self.headers.get("Authorization") is None:
                    continue
                api, resolve = f"/api/models/{name}", f"/{name}/resolve/"
                if path == f"{api}/refs":
                    kinds = {"branches": "heads", "tags": "tags"}
                    refs = {k: refs_of(kind, getattr(repository, k)) for k, kind in kinds.items()}
                    self.send_json({**refs, "converts": []}, body)
                    return
                if path == api or path.startswith((f"{api}/revision/", f"{api}/tree/")):
                    self.describe(name, repository, path.removeprefix(api).lstrip("/") or "revision/main", body)
                    return
                if path.startswith(resolve):
                    self.resolve(repository, path.removeprefix(resolve), body)
                    return
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def describe(self, name: str, repository: Repository, asked: str, body: bool) -> None:
            kind, _, revision = asked.partition("/")
            commit = repository.commit(revision)
            if commit is None:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            found = repository.commits[commit]
            if kind == "tree":
                sizes = {p: f.stat().st_size if isinstance(f, Path) else len(f) for p, f in found.items()}
                tree = [{"type": "file", "path": p, "size": size, "oid": "0" * 40} for p, size in sizes.items()]
                self.send_json(tree, body)
                return
            info = {"id": name, "sha": commit, "private": repository.private, "cardData": repository.card}
            self.send_json({**info, "siblings": [{"rfilename": p} for p in found]}, body)

        def resolve(self, repository: Repository, asked: str, body: bool) -> None:
            if repository.gated:
                self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
                return
            refs = (*repository.branches, *repository.tags, *repository.commits)
            revision = next((ref for ref in refs if asked.startswith(f"{ref}/")), "")
            commit = repository.commit(revision)
            if commit is None:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            path = asked.removeprefix(f"{revision}/")
            if path not in repository.commits[commit]:
                self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
                return
            self.send_file(Path(path).name, content(repository.commits[commit][path]), commit, body)

        def write(self, data: bytes) -> None:
            path = unquote(self.path.split("?")[0])
            if path == "/api/validate-yaml":
                self.send_json({"errors": [], "warnings": []})
                return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse()
                return
            for end, (status, words) in hub.refusals.items():
                if path.endswith(end):
                    self.send(status, json.dumps({"error": words}).encode(), _JSON)
                    return
            if hub.read_only:
                self.send(403, b"{}", {"X-Error-Message": "you need to use a token with write permissions"})
                return
            if path == "/api/repos/create":
                self.create(json.loads(data))
                return
            for name, repository in hub.repositories.items():
                if path == f"/api/models/{name}/preupload/main":
                    self.send_json({"files": [mode(repository, file) for file in json.loads(data)["files"]]})
                    return
                if path == f"/{name}.git/info/lfs/objects/batch":
                    objects = json.loads(data)["objects"]
                    self.send_json({"transfer": "basic", "objects": [transfer(hub, item) for item in objects]})
                    return
                if path == f"/api/models/{name}/commit/main":
                    self.commit(name, repository, [json.loads(line) for line in data.splitlines()])
                    return
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                self.send(409, b"{}", {"X-Error-Message": "You already created this model repo"})
                return
            first = {".gitattributes": b"*.onnx filter=lfs diff=lfs merge=lfs -text\n"}
            private = asked.get("visibility") == "private" or asked.get("private") is True
            hub.repositories[name] = Repository({"main": COMMIT}, {}, {COMMIT: dict(first)}, private=private)
            self.send_json({"url": f"{hub.url}/{name}", "name": name})

        def commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
            header, *operations = lines
            head = repository.branches["main"]
            if header["value"].get("parentCommit", head) != head:
                self.send(412, b"{}", {"X-Error-Message": "the branch has moved"})
                return
            found = dict(repository.commits[head])
            for operation in operations:
                value = operation["value"]
                match operation["key"]:
                    case "file":
                        found[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        found[value["path"]] = hub.objects[value["oid"]]
                    case "deletedFile":
                        del found[value["path"]]
            commit = hashlib.sha1(repr((head, header, sorted(found))).encode()).hexdigest()
            repository.branches["main"], repository.commits[commit] = commit, found
            repository.messages.append(header["value"]["summary"])
            url = f"{hub.url}/{name}/commit/{commit}"
            self.send_json({"success": True, "commitOid": commit, "commitUrl": url})

        def send_file(self, name: str, data: bytes, commit: str, body: bool) -> None:
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            wanted = self.headers.get("Range")
            if body:
                hub.downloads.append((name, wanted))
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = body and hub.cut_once == name
            if cut:
                hub.cut_once = None
            self.send(206 if start else 200, data[start:], headers, body, cut)

        def refuse(self, body: bool = True) -> None:
            self.send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"}, body)

        def send_json(self, document: Any, body: bool = True) -> None:
            self.send(200, json.dumps(document).encode(), _JSON, body)

        def send(
            self, status: int, data: bytes, headers: Mapping[str, str], body: bool = True, cut: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def mode(repository: Repository, file: dict[str, Any]) -> dict[str, Any]:
    """How a file is to be sent, and what the repository has under its name."""
    large = file["size"] >= _LARGE
    there = repository.files.get(file["path"])
    oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def transfer(hub: Hub, item: dict[str, Any]) -> dict[str, Any]:
    """Where an object is to be sent; nowhere, if it is there."""
    if item["oid"] in hub.objects:
        return item
    return {**item, "actions": {"upload": {"href": f"{hub.url}/objects/{item['oid']}"}}}


def fetched(hub: Hub) -> list[str]:
    """The names of the files that were downloaded since it was asked last, sorted."""
    names = sorted(name for name, _ in hub.downloads)
    hub.downloads.clear()
    return names

"""A Hugging Face Hub of one repository, on this machine: enough of its HTTP interface for huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/tiny-olmo2"


@dataclass
class Hub:
    """What the server is asked to do, and what it has seen."""

    url: str = ""
    cut_once: str | None = None
    """a file whose first transfer breaks off half-way"""
    downloads: list[tuple[str, str | None]] = field(default_factory=list)
    """(file, Range header) of every GET"""


def commit_of(revision: str) -> str:
    """The commit at which `local_hub` serves a revision that is given by name."""
    return COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()


def files(folder: Path) -> list[Path]:
    """All files of a folder, also of those in it."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def refs_of(kind: str, names: Iterable[str]) -> list[dict[str, str]]:
    """Branches (heads) or tags, as the Hub lists them."""
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit_of(name)} for name in names]


def point_to(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, *, offline: bool = False) -> None:
    """Do in this process what HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE do in a new one, which costs five seconds.

    The library reads them when it is imported, and its constants at every call.
    """
    names = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    names |= {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_XET_CACHE": str(cache / "xet")}
    for name, value in names.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    huggingface_hub.close_session()  # of another server


@contextmanager
def local_hub(
    folder: Path, revisions: Mapping[str, Path] | None = None, tags: Mapping[str, Path] | None = None
) -> Iterator[Hub]:
    """Serve a checkpoint folder as `REPOSITORY`, branch main at `COMMIT`, and others as other branches and tags."""
    hub = Hub()
    branches = {"main": folder, **(revisions or {})}
    served = {**branches, **(tags or {})}
    folders = {commit_of(name): path for name, path in served.items()}
    commits = {name: commit_of(name) for name in served} | {c: c for c in folders}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            if path == f"/api/models/{REPOSITORY}/refs":
                refs = {"branches": refs_of("heads", branches), "tags": refs_of("tags", tags or {}), "converts": []}
                self.send(200, json.dumps(refs).encode(), {"Content-Type": "application/json"}, body)
                return
            for name, commit in commits.items():
                folder, prefix = folders[commit], f"/{REPOSITORY}/resolve/{name}/"
                if path == f"/api/models/{REPOSITORY}/revision/{name}":
                    names = [p.relative_to(folder).as_posix() for p in files(folder)]
                    info = {"id": REPOSITORY, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
                    self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
                    return
                if path == f"/api/models/{REPOSITORY}/tree/{name}":
                    tree = [
                        {
                            "type": "file",
                            "path": p.relative_to(folder).as_posix(),
                            "size": p.stat().st_size,
                            "oid": "0" * 40,
                        }
                        for p in files(folder)
                    ]
                    self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
                    return
                if path.startswith(prefix) and (folder / path[len(prefix) :]).is_file():
                    self.send_file(folder / path[len(prefix) :], commit, body)
                    return
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def send_file(self, file: Path, commit: str, body: bool) -> None:
            name, data = file.name, file.read_bytes()
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

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.close_connection = True

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

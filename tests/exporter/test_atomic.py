"""replace_folder on the file systems of other people: mounts, links, no locks, no fsync, no exchange, no rights."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from olmo2_export import atomic
from olmo2_export.atomic import can_write, check_replaceable, locked, replace_folder, write_file
from runtimes.errors import ResourceError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def warned() -> Iterator[None]:
    atomic._warn.cache_clear()
    yield
    atomic._warn.cache_clear()


def write_package(staging: Path, *names: str) -> None:
    """Write a folder that passes for a package, of files that hold their own names."""
    for name in names:
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    manifest = {"format_version": 1, "exporter_version": "0", "checksum": "", "files": {name: {} for name in names}}
    (staging / "manifest.json").write_text(json.dumps(manifest))


def make(target: Path, *names: str, force: bool = True) -> None:
    with replace_folder(target, force=force) as staging:
        write_package(staging, *names)


def names_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def in_a_mount_namespace(script: str, folder: Path) -> str:
    """Run a script of sh as the root of a mount namespace of its own, in a folder; return what it prints.

    Its function py runs some Python, with what this file defines and imports.
    """
    if sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0:
        pytest.skip("this system allows no mount namespaces")
    python = f"{sys.executable} -c"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", f'py() {{ {python} "from test_atomic import *\n$1"; }}\n{script}'],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "mount", ["mount -t tmpfs none out", "mkdir of; mount --bind of out"], ids=["another file system", "the same"]
)
def test_a_mount_point_is_written_and_replaced(tmp_path: Path, mount: str) -> None:
    said = in_a_mount_namespace(
        f"""mkdir out; {mount}
        py 'make(Path("out"), "onnx/a", "b")'; (cd out; find . -type f | sort)
        py 'make(Path("out"), "onnx/c")'; (cd out; find . | sort); ls -A
        """,
        tmp_path,
    )
    first, second = "./b ./manifest.json ./onnx/a", ". ./manifest.json ./onnx ./onnx/c"
    assert said.split() == f"{first} {second} out{' of' if 'bind' in mount else ''}".replace("out of", "of out").split()


def test_a_mount_point_with_other_files_is_refused_before_any_work(tmp_path: Path) -> None:
    said = in_a_mount_namespace(
        """mkdir out; mount -t tmpfs none out; mkdir out/lost+found; touch out/thesis.tex
        py 'make(Path("out"), "a")' || true; ls -A out; rm out/thesis.tex; py 'make(Path("out"), "a")'; ls -A out
        """,
        tmp_path,
    )
    assert "not empty and not a package (thesis.tex)" in said
    assert said.startswith("lost+found\nthesis.tex\na\nlost+found\nmanifest.json\n")


def test_a_mount_point_is_locked_from_within(tmp_path: Path) -> None:
    said = in_a_mount_namespace(
        """mkdir out; mount -t tmpfs none out
        py 'with locked(Path("out")):
            print(os.listdir("out"))
            make(Path("out"), "a")' || true; ls -A out""",
        tmp_path,
    )
    assert said.startswith("['.out.lock']\n")
    assert "out: locked by pid" in said


def test_a_read_only_mount_is_refused_before_any_work(tmp_path: Path) -> None:
    said = in_a_mount_namespace(
        """mkdir out; mount -t tmpfs -o ro none out
        py 'check_replaceable(Path("out"), True)' || true; py 'locked(Path("out")).__enter__()' || true""",
        tmp_path,
    )
    assert "UsageError: out: it is not writable; choose another --out" in said
    assert "UsageError: out: it is not writable (Read-only file system); choose another folder" in said


def denied(*folders: Path) -> Callable[..., bool]:
    """os.access of somebody who may not write some folders; root, as tests may run, may write all."""
    real = os.access

    def access(path: Any, mode: int, **options: Any) -> bool:
        return real(path, mode, **options) and not (mode & os.W_OK and Path(path).resolve() in folders)

    return access


def test_a_folder_in_one_that_is_not_writable_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker run -v $PWD/out:/out: / is of root."""
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.setattr(atomic.os, "access", denied(tmp_path))
    for name in ("one", "two"):
        with replace_folder(out, force=True) as staging:
            assert staging.parent == out
            assert names_in(tmp_path)[0] == "out/.out.lock"
            write_package(staging, name)
        assert names_in(out) == ["manifest.json", name]
    assert out.stat().st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_may_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(atomic.os, "access", denied(tmp_path, tmp_path / "out"))
    with pytest.raises(UsageError, match=r"out: it is not writable; choose another --out"):
        check_replaceable(tmp_path / "out", True)
    with pytest.raises(UsageError, match=rf"new: {tmp_path} is not writable; choose another --out"):
        check_replaceable(tmp_path / "new", True)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY])
def test_a_folder_of_a_container_image_is_filled(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """overlayfs moves no folder of a lower layer."""
    make(tmp_path / "out", "onnx/one", "both")

    def refused(*_: Path) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "_exchange", refused)
    make(tmp_path / "out", "onnx/two", "both")
    assert names_in(tmp_path) == ["out/both", "out/manifest.json", "out/onnx/two"]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have the process end at the n-th step by which a package is moved up."""
    left = [step]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(atomic, "_remove", counted(atomic._remove))
    monkeypatch.setattr(atomic.Path, "replace", counted(Path.replace))
    monkeypatch.setattr(atomic.Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("step", range(11))
def test_a_writer_killed_while_it_fills_a_folder_leaves_no_false_package(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out, "onnx/old", "b", "c")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "access", denied(tmp_path))
        kill_at(patch, step)
        try:
            make(out, "onnx/new", "b", "d")
            finished = True
        except KeyboardInterrupt:
            finished = False
    assert finished == (step == 10)
    if (out / "manifest.json").exists():
        files = json.loads((out / "manifest.json").read_text())["files"]
        assert all((out / name).read_text() == name for name in files)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "access", denied(tmp_path))
        with pytest.raises(RuntimeError), replace_folder(out, force=True):  # the next writer fails for its own reasons
            raise RuntimeError
        make(out, "e")
    assert names_in(tmp_path) == ["out/e", "out/manifest.json"]


def test_a_full_disk_while_a_folder_is_filled_keeps_the_old_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out, "a")
    monkeypatch.setattr(atomic.os, "access", denied(tmp_path))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith(atomic._PREVIOUS):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(atomic.Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        make(out, "b")
    assert names_in(tmp_path) == ["out/a", "out/manifest.json"]


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    """As a link to a folder on a data disk."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to("disk/real")
    for name in ("one", "two"):
        make(link, name)
    assert link.is_symlink()
    assert names_in(tmp_path / "disk") == ["real/manifest.json", "real/two"]


def test_two_names_of_a_folder_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with locked(tmp_path / "out"), pytest.raises(ResourceError, match="locked by pid"), locked(tmp_path / "real"):
        pass


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    """A data disk that is not mounted must not be written beside."""
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with pytest.raises(UsageError, match=r"out: a link to .*/disk/real, which is not there"):
        make(tmp_path / "out", "a")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_said_once(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    for name in ("one", "two"):
        make(tmp_path / "out", name)
    assert names_in(tmp_path) == ["out/manifest.json", "out/two"]
    assert [record.getMessage() for record in caplog.records] == [
        f"a file system without locks ({os.strerror(code)}): nothing keeps a second writer out"
    ]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_said_once(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    make(tmp_path / "out", "a")
    assert names_in(tmp_path / "out") == ["a", "manifest.json"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "a power cut may undo what is written" in caplog.text


def test_a_disk_that_fails_while_it_is_forced_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path / "out", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_exchange_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Libc:
        def renameat2(self, *_: Any) -> int:
            atomic.ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(atomic.sys, "platform", "linux")
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: Libc())
    for name in ("one", "two", "three"):
        make(tmp_path / "out", name)
    assert names_in(tmp_path) == ["out/manifest.json", "out/three"]
    assert [record.getMessage() for record in caplog.records] == [
        "a file system that cannot exchange two folders: for a moment neither is there"
    ]


def test_a_system_without_locks_and_exchange_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Windows."""
    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(atomic.sys, "platform", "win32")
    for name in ("one", "two"):
        make(tmp_path / "out", name)
    assert names_in(tmp_path) == ["out/manifest.json", "out/two"]
    assert caplog.records == []


@pytest.mark.parametrize(
    "name", ["with blanks", "東京", "a[1]*?", "two\nlines", "x" * 255, "é" * 127], ids=lambda n: n[:12]
)
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with replace_folder(out, force=False) as staging:
        leftover = staging.with_name(staging.name.replace(str(os.getpid()), "dead"))
        write_package(staging, "a")
    leftover.mkdir()
    make(out, "b")
    assert names_in(tmp_path) == [f"{name}/b", f"{name}/manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_new_folder_has_the_rights_that_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "out", "a")
        write_file(tmp_path / "report.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o640


def test_a_file_is_replaced_whole_and_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for name in (".report.json.4711", ".report.json.swp", ".report.json.4711.bak"):
        (tmp_path / name).write_text("x")
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert names_in(tmp_path) == [".report.json.4711.bak", ".report.json.swp", "report.json"]


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """parity.json in a Hub cache is a link to a blob."""
    (tmp_path / "blob").write_text("original")
    (tmp_path / "parity.json").symlink_to("blob")
    write_file(tmp_path / "parity.json", b"new")
    assert (tmp_path / "blob").read_text() == "original"
    assert not (tmp_path / "parity.json").is_symlink()


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_file(path, b"old")

    def full(self: Path, _: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.Path, "write_bytes", full)
    with pytest.raises(ResourceError, match=r"report.json: writing failed \(No space left on device\); [\d,]+ bytes"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["report.json"]


def test_a_file_in_a_folder_that_is_not_writable_is_written_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(atomic.os, "access", denied(tmp_path))
    assert can_write(path)
    assert not can_write(tmp_path / "other.json")
    assert not can_write(tmp_path)
    assert not can_write(tmp_path / "nowhere" / "report.json")
    write_file(path, b"new")
    assert names_in(tmp_path) == ["report.json"]
    assert path.read_bytes() == b"new"

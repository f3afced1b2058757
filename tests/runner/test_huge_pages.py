"""Weights in huge pages: whose memory it is, piece by piece, and all that can be in the way."""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtimes import huge_pages, open_runner
from runtimes.huge_pages import HugePages, LinuxMemory, memory_of, obstacle, own_memory, pages_of, taken_since

PIECE = 1 << 16


class FakeMemory:
    """Does what it is told to; `answers` of the first pieces, then 0."""

    def __init__(self, *answers: int, missing: tuple[int, ...] = ()) -> None:
        self.answers, self.missing = list(answers), missing
        self.made_over: list[int] = []
        self.advised: list[tuple[int, int]] = []
        self.wait: Callable[[], object] = lambda: None

    def is_there(self, start: int, size: int) -> bool:
        assert size == PIECE
        return start // PIECE not in self.missing

    def collapse(self, start: int, size: int) -> int:
        assert size == PIECE
        self.wait()
        self.made_over.append(start // PIECE)
        return self.answers.pop(0) if self.answers else 0

    def advise(self, start: int, size: int) -> None:
        self.advised.append((start, size))


def over(memory: FakeMemory, *ranges: tuple[int, int]) -> HugePages:
    """Make ranges over, to the end."""
    pages = HugePages(memory, piece=PIECE)
    pages.add(ranges)
    pages.start()
    ended(pages)
    return pages


def ended(pages: HugePages) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not any(thread.name == "huge-pages" for thread in threading.enumerate()):
            return
        time.sleep(0.002)
    raise AssertionError(f"it goes on: {pages.note}")


def test_whole_pieces_alone_are_made_over() -> None:
    memory = FakeMemory()
    pages = over(memory, (1, 3 * PIECE), (8 * PIECE, 9 * PIECE - 1), (10 * PIECE, 11 * PIECE))
    assert memory.made_over == [1, 2, 10]
    assert pages.note == "0.2 of 0.2 MB of weights in huge pages"


def test_a_piece_with_a_page_that_takes_no_memory_stays_as_it_is() -> None:
    memory = FakeMemory(missing=(1,))
    over(memory, (0, 3 * PIECE))
    assert memory.made_over == [0, 2]


def test_what_cannot_be_moved_is_passed_over_and_not_counted() -> None:
    memory = FakeMemory(errno.EINVAL, errno.EAGAIN)
    pages = over(memory, (0, 32 * PIECE))
    assert memory.made_over == list(range(32))
    assert pages.note == "2.0 of 2.1 MB of weights in huge pages"


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EBUSY])
def test_a_system_that_has_none_left_is_asked_again_and_then_no_more(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_PAUSE", 0)
    memory = FakeMemory(0, code, 0, *[code] * 99)
    pages = over(memory, (0, 32 * PIECE))
    assert memory.made_over == list(range(3 + 16))
    assert pages.note == "0.1 of 2.1 MB of weights in huge pages (the system has no more of them)"
    pages.start()
    ended(pages)
    assert memory.made_over == list(range(3 + 16))
    memory = FakeMemory(*[code] * 15)
    pages = over(memory, (0, 9 * PIECE))
    assert memory.made_over == [*range(9), *range(9), *range(6)]
    assert pages.note == "0.6 of 0.6 MB of weights in huge pages"


def test_short_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1 << 30, (128 << 20) + PIECE, (128 << 20) + PIECE - 1]
    monkeypatch.setattr(huge_pages, "available_memory", lambda: free.pop(0))
    memory = FakeMemory()
    pages = over(memory, (0, 99 * PIECE))
    assert memory.made_over == list(range(32))
    assert pages.note == "2.1 of 6.5 MB of weights in huge pages (only 134 MB of memory are free)"


def test_nothing_happens_before_a_step_nor_after_close() -> None:
    memory = FakeMemory()
    pages = HugePages(memory, piece=PIECE)
    pages.add([(0, 4 * PIECE)])
    assert memory.made_over == []
    pages.close()
    pages.add([(8 * PIECE, 9 * PIECE)])  # a second graph, loaded meanwhile
    pages.start()
    pages.close()
    assert memory.made_over == []


def test_close_waits_for_the_piece_at_hand_and_ends_there() -> None:
    memory, begun, go = FakeMemory(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go.wait(9)

    memory.wait = wait
    pages = HugePages(memory, piece=PIECE)
    pages.add([(0, 4 * PIECE)])
    pages.start()
    assert begun.wait(9)
    closing = threading.Thread(target=pages.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go.set()
    closing.join(9)
    assert memory.made_over == [0]
    assert pages.note == "0.1 of 0.3 MB of weights in huge pages"


def test_a_graph_that_comes_later_is_made_over_too() -> None:
    memory = FakeMemory()
    pages = over(memory, (0, PIECE))
    pages.add([(5 * PIECE, 6 * PIECE)])
    pages.start()
    ended(pages)
    assert memory.made_over == [0, 5]


@pytest.mark.parametrize(
    ("before", "now", "taken"),
    [
        ([], [(1, 5)], [(1, 5)]),
        ([(1, 5)], [], []),
        ([(1, 5)], [(1, 5)], []),
        ([(1, 5)], [(1, 9)], [(5, 9)]),
        ([(3, 5)], [(1, 9)], [(1, 3), (5, 9)]),
        ([(3, 4), (5, 6), (11, 12)], [(1, 9), (10, 13)], [(1, 3), (4, 5), (6, 9), (10, 11), (12, 13)]),
        ([(1, 20)], [(2, 3), (5, 30)], [(20, 30)]),
    ],
)
def test_what_was_taken(
    before: list[tuple[int, int]], now: list[tuple[int, int]], taken: list[tuple[int, int]]
) -> None:
    assert taken_since(before, now) == taken


def test_own_memory_is_no_files_no_stack_and_writable(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "1000-2000 r--p 00000000 fe:00 42    /lib/a library.so\n"
        "2000-3000 rw-p 00001000 fe:00 42    /lib/a library.so\n"
        "3000-5000 rw-p 00000000 00:00 0     [heap]\n"
        "7000-9000 rw-p 00000000 00:00 0 \n"
        "9000-a000 ---p 00000000 00:00 0 \n"
        "a000-b000 rw-s 00000000 00:01 7     /dev/zero (deleted)\n"
        "b000-c000 rw-p 00000000 00:00 0     [stack]\n"
    )
    assert own_memory(maps) == [(0x3000, 0x5000), (0x7000, 0x9000)]
    assert own_memory(tmp_path / "none") == []


def test_where_a_file_is_mapped_and_how(tmp_path: Path) -> None:
    file, maps, smaps = tmp_path / "some weights", tmp_path / "maps", tmp_path / "smaps"
    regions = [
        ("1000-3000 rw-p 00001000 fe:00 42    {}", 8, 0),
        ("3000-4000 rw-p 00001000 fe:00 43    {}.old", 4, 0),
        ("5000-9000 rw-p 00000000 00:00 0 ", 16, 16),
        ("9000-d000 rw-p 00003000 fe:00 42    {}", 12, 4),
        ("d000-e000 r--p 00003000 fe:00 42    /else", 4, 0),
    ]
    maps.write_text("".join(f"{line.format(file)}\n" for line, *_ in regions))
    smaps.write_text(
        "".join(
            f"{line.format(file)}\nSize:     99 kB\nRss:   {rss} kB\nFilePmdMapped:    {huge} kB\nVmFlags: rd wr\n"
            for line, rss, huge in regions
        )
    )
    assert memory_of(file, maps) == [(0x1000, 0x3000), (0x9000, 0xD000)]
    assert pages_of([(0x9000, 0xD000), (0x1000, 0x3000)], smaps) == (20 << 10, 4 << 10)
    assert pages_of([(0x8000, 0xD000)], smaps) == (12 << 10, 4 << 10)
    assert pages_of([(0x9000, 0xD000)], smaps) == (12 << 10, 4 << 10)
    assert memory_of(tmp_path, maps) == []
    assert pages_of([(0xE000, 0xF000)], smaps) == pages_of([(0x1000, 0x3000)], tmp_path / "none") == (0, 0)


def test_of_a_mapped_file_whole_pieces_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    others, own = (20 * PIECE, 30 * PIECE), [(5, 3 * PIECE), (7 * PIECE, 8 * PIECE - 1)]
    mapped = [others]
    monkeypatch.setattr(huge_pages, "memory_of", lambda _: sorted(mapped))
    monkeypatch.setattr(huge_pages, "pages_of", lambda ranges: {str(own): (5_000_000, 4_000_000)}[str(ranges)])
    memory = FakeMemory()
    pages = HugePages(memory, piece=PIECE)
    with pages.loading(tmp_path):
        mapped += own
    pages.close()
    assert memory.advised == [(PIECE, 2 * PIECE)]
    assert pages.note == "5.0 MB of weights mapped, 4.0 MB in huge pages"
    del mapped[1:]
    unwanted = HugePages(wanted=False)
    with unwanted.loading(tmp_path):
        mapped += own
    assert unwanted.note == "5.0 MB of weights mapped"
    assert HugePages(wanted=False).note == ""


def test_why_there_are_none(tmp_path: Path) -> None:
    assert obstacle("darwin") == "Linux alone makes them of memory that is in use"
    old = "does not make them of memory that is in use, 6.1 does"
    assert obstacle("linux", "5.15.0-101-generic") == f"Linux 5.15.0-101-generic {old}"
    assert obstacle("linux", "6.0.9") == f"Linux 6.0.9 {old}"
    assert obstacle("linux", "6.1.0", tmp_path) == "this kernel has none"
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert obstacle("linux", "6.1.0", tmp_path) == f"{tmp_path / 'enabled'} says never"
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert obstacle("linux", "6.10.3-microsoft", tmp_path) == ""


def test_a_system_without_them_does_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "obstacle", lambda: "this kernel has none")
    pages = HugePages()
    with pages.loading():
        held = np.ones(1 << 20)
    pages.start()
    pages.close()
    assert held.all()
    assert pages.note == "no huge pages: this kernel has none"


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_what_was_loaded_lies_in_huge_pages_and_keeps_its_content() -> None:
    size = 8 << 20
    content = np.random.default_rng(0).bytes(size)
    before = region(content, mmap.MADV_RANDOM)
    pages = HugePages()
    with pages.loading():
        loaded = region(content, mmap.MADV_SEQUENTIAL)
        sparse = region(bytes(size), mmap.MADV_DONTFORK)
        sparse.madvise(mmap.MADV_DONTNEED)
    pages.start()
    ended(pages)
    pages.close()
    assert huge_bytes(loaded) >= size - (4 << 20)  # of its ends a part is no whole piece
    assert loaded[:] == content
    assert huge_bytes(before) == huge_bytes(sparse) == 0


def region(content: bytes, advice: int) -> mmap.mmap:
    """Return memory that is a region of its own, as no other has that advice."""
    memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    memory.write(content)
    return memory


def huge_bytes(memory: mmap.mmap) -> int:
    """Bytes of a region that lie in huge pages."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for part in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        start, stop = (int(word, 16) for word in part.split(maxsplit=1)[0].split("-"))
        if start <= address < stop:
            return int(re.findall(r"^AnonHugePages: +(\d+) kB$", part, re.MULTILINE)[0]) * 1024
    raise AssertionError("it is not there")


def test_a_runner_says_what_became_of_its_weights(q4_package: Path) -> None:
    with open_runner(q4_package, variant="q4", threads=1) as runner:
        runner.prefill([[1, 2, 3]])
        assert runner.memory_note == HugePages().note or "MB of weights in huge pages" in runner.memory_note
    with open_runner(q4_package, variant="q4", threads=1, huge_pages=False) as runner:
        runner.prefill([[1, 2, 3]])
        assert runner.memory_note == ""


def test_the_kernel_is_asked_of_each_page() -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if obstacle():
        pytest.skip(obstacle())
    memory[0] = memory[2 * mmap.PAGESIZE] = 1
    there = [LinuxMemory().is_there(start + n * mmap.PAGESIZE, mmap.PAGESIZE) for n in range(4)]
    assert there == [True, False, True, False]
    assert not LinuxMemory().is_there(start, 4 * mmap.PAGESIZE)
    assert LinuxMemory().collapse(start, mmap.PAGESIZE) == errno.EINVAL  # less than a piece

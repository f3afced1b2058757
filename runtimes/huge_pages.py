"""Weights in huge pages: memory that sessions took while they were loaded, made over piece by piece in the background.

A step reads all weights once, and in pages of 4 KiB a processor spends a good part of that finding them. Linux makes
one huge page of a piece of memory that is in use (`MADV_COLLAPSE`, from 6.1 on); what is in it stays, and so does its
address.

Memory is known by when it came: what is private, writable and no file's, and was not there before the load. Another
thread may have allocated meanwhile. Its memory loses nothing, and takes no more: a piece is made over only where all
of its pages are there.

Standard library only.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import itertools
import mmap
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from runtimes.free_memory import available_memory

Range: TypeAlias = tuple[int, int]
"""addresses from the first on, before the second"""

_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_OLDEST = (6, 1)
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_LEFT = 128 << 20
"""bytes of memory that must be free, or nothing is made over: a huge page is filled before the small ones are freed"""
_LOOK = 16
"""pieces after which free memory is looked at, which takes as long as a third of a piece"""
_REST = 2
"""how long is waited after a piece, in times of the processor that it took: a step beside it has most of that"""
_REFUSALS, _PAUSE = 16, 0.25
"""how often in a row the system may have none to give, and the seconds between: it makes room meanwhile"""
_NONE_LEFT = frozenset({errno.ENOMEM, errno.EBUSY})  # of the machine, of a control group


class Memory(Protocol):
    """What the system does with this process's memory."""

    def is_there(self, start: int, size: int) -> bool:
        """Tell whether each page of a range takes memory."""
        ...

    def collapse(self, start: int, size: int) -> int:
        """Make one huge page of a range; return 0, or the errno of what is against it."""
        ...

    def advise(self, start: int, size: int) -> None:
        """Ask for huge pages where a range is read for the first time."""
        ...


class LinuxMemory:
    """Implements `Memory`."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise, self._mincore = libc.madvise, libc.mincore
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

    def is_there(self, start: int, size: int) -> bool:
        pages = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        return self._mincore(start, size, pages) == 0 and all(page & 1 for page in pages.raw)

    def collapse(self, start: int, size: int) -> int:
        return 0 if self._madvise(start, size, _MADV_COLLAPSE) == 0 else ctypes.get_errno()

    def advise(self, start: int, size: int) -> None:
        self._madvise(start, size, _MADV_HUGEPAGE)  # a file system without them refuses, and nothing is lost


class HugePages:
    """The weights of one runner's sessions, and how many of them lie in huge pages by now."""

    def __init__(self, memory: Memory | None = None, *, piece: int | None = None, wanted: bool = True) -> None:
        """Find out whether there are huge pages here; nothing is done yet.

        Args:
            memory: what is asked; None: this process's.
            piece: bytes of a huge page; None: the system's.
            wanted: False leaves all as it is, and says no more than how much is mapped.
        """
        self._wanted = wanted
        self._obstacle = "" if piece else obstacle() if wanted else "not wanted"
        self._piece = piece or (0 if self._obstacle else int(_read(_HUGE_PAGES / "hpage_pmd_size")))
        self._memory = memory
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._ranges: list[Range] = []
        self._mapped: list[Range] = []
        self._all = self._done = 0

    @contextlib.contextmanager
    def loading(self, mapped: Path | None = None) -> Iterator[None]:
        """A context in which a session is loaded; what it took and is still there is made over later.

        Args:
            mapped: a file with weights that are read where it is mapped. Its pages are huge where the file system has
                such, from the first time on that they are read; they are shared by all that map it.
        """
        before = own_memory() if self._piece else []
        mapped_before = [] if mapped is None else memory_of(mapped)
        yield
        ranges = [] if mapped is None else taken_since(mapped_before, memory_of(mapped))
        self._mapped += ranges
        if self._piece:
            self.add(taken_since(before, own_memory()))
            for start, stop in self._whole(ranges):
                (self._memory or LinuxMemory()).advise(start, stop - start)

    def add(self, ranges: Sequence[Range], *, again: bool = False) -> None:
        """Have ranges made over, after all others; what is less than a piece stays as it is."""
        whole = self._whole(ranges)
        with self._lock:
            self._ranges += whole
            self._all += 0 if again else sum(stop - start for start, stop in whole)

    def start(self) -> None:
        """Begin in the background, if there is anything to do; called after a step, so that the first does not wait."""
        if not self._ranges:
            return
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._work, name="huge-pages", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End, once the piece at hand is done. Closing twice is harmless."""
        self._ended.set()
        with self._lock:
            thread, self._thread = self._thread, None
            self._ranges.clear()
        if thread is not None:
            thread.join()

    @property
    def note(self) -> str:
        """What became of the weights, for people; empty: nothing, and nothing was wanted."""
        notes = []
        if self._mapped:
            mapped, huge = pages_of(self._mapped)
            in_huge = f", {huge / 1e6:.1f} MB in huge pages" if self._wanted else ""
            notes.append(f"{mapped / 1e6:.1f} MB of weights mapped{in_huge}")
        if self._wanted and not self._mapped:
            notes.append(self._own_note())
        return ", ".join(notes)

    def _own_note(self) -> str:
        if self._obstacle and not self._done:
            return f"no huge pages: {self._obstacle}"
        stopped = f" ({self._obstacle})" if self._obstacle else ""
        return f"{self._done / 1e6:.1f} of {self._all / 1e6:.1f} MB of weights in huge pages{stopped}"

    def _whole(self, ranges: Sequence[Range]) -> list[Range]:
        """Return the whole pieces of ranges."""
        whole = [(-(-start // self._piece) * self._piece, stop // self._piece * self._piece) for start, stop in ranges]
        return [(start, stop) for start, stop in whole if start < stop]

    def _work(self) -> None:
        memory = self._memory or LinuxMemory()
        refused = 0
        for count in itertools.count():
            began = time.thread_time()
            if count % _LOOK == 0:
                self._look()
            if self._ended.is_set() or (start := self._next()) is None:
                return
            found = memory.collapse(start, self._piece) if memory.is_there(start, self._piece) else errno.EINVAL
            if found in _NONE_LEFT:
                refused += 1
                self.add([(start, start + self._piece)], again=True)
                if refused == _REFUSALS:
                    self._stop("the system has no more of them")
                self._ended.wait(_PAUSE)
            else:
                refused = 0
                self._done += 0 if found else self._piece  # others: a page that cannot be moved
            self._ended.wait(_REST * (time.thread_time() - began))

    def _look(self) -> None:
        """Stop where memory is short."""
        free = available_memory()
        if free is not None and free < _LEFT + self._piece:
            self._stop(f"only {free / 1e6:.0f} MB of memory are free")

    def _next(self) -> int | None:
        """Return where the next piece begins; None: there is none, and the thread ends."""
        with self._lock:
            if not self._ranges:
                self._thread = None
                return None
            start, stop = self._ranges[0]
            self._ranges[:1] = [(start + self._piece, stop)] if start + self._piece < stop else []
            return start

    def _stop(self, why: str) -> None:
        self._obstacle = why
        self._ended.set()


def obstacle(system: str = sys.platform, release: str | None = None, folder: Path = _HUGE_PAGES) -> str:
    """Return why this system makes no huge page of memory that is in use; empty: it does.

    Args:
        system: as of `sys.platform`.
        release: of the kernel; None asks it.
        folder: what the kernel says of its huge pages.
    """
    if system != "linux":
        return "Linux alone makes them of memory that is in use"
    release = platform.release() if release is None else release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _OLDEST:
        return f"Linux {release} does not make them of memory that is in use, {'.'.join(map(str, _OLDEST))} does"
    if not _read(folder / "hpage_pmd_size").isdigit():
        return "this kernel has none"
    if "[never]" in _read(folder / "enabled"):
        return f"{folder / 'enabled'} says never"
    return ""


def own_memory(maps: Path = _MAPS) -> list[Range]:
    """Return the ranges of this process's memory that are private, writable and no file's, in order.

    Args:
        maps: the kernel's file of that name.
    """
    found: list[Range] = []
    for line in _read(maps).splitlines():
        where, mode, _, _, inode, *name = line.split(maxsplit=5)
        if mode == "rw-p" and inode == "0" and name != ["[stack]"]:
            found.append(_range(where))
    return found


def memory_of(file: Path, maps: Path = _MAPS) -> list[Range]:
    """Return the ranges of memory in which this process has mapped a file, in order."""
    lines = [line.split(maxsplit=5) for line in _read(maps).splitlines()]
    return [_range(words[0]) for words in lines if words[5:] == [str(file.resolve())]]


def pages_of(ranges: Sequence[Range], smaps: Path = _SMAPS) -> tuple[int, int]:
    """Return how many bytes of mapped files take memory, and how many of these lie in huge pages.

    Args:
        ranges: where they are mapped; what the kernel lists may be parts of them.
        smaps: the kernel's file of that name.
    """
    wanted = sorted(ranges)
    there, resident, huge = False, 0, 0
    for line in _read(smaps).splitlines():
        words = line.split(maxsplit=2)
        if "-" in words[0]:
            start, _ = _range(words[0])
            place = bisect.bisect_right(wanted, start, key=lambda one: one[0]) - 1
            there = place >= 0 and start < wanted[place][1]
        elif there and words[0] == "Rss:":
            resident += int(words[1]) * 1024
        elif there and words[0] == "FilePmdMapped:":
            huge += int(words[1]) * 1024
    return resident, huge


def taken_since(before: Sequence[Range], now: Sequence[Range]) -> list[Range]:
    """Return what is in `now` and was not in `before`; both in order, none overlapping."""
    found = []
    held = list(before)
    for start, stop in now:
        while held and held[0][1] <= start:
            held.pop(0)
        for first, last in held:
            if first >= stop:
                break
            if start < first:
                found.append((start, first))
            start = max(start, last)
        if start < stop:
            found.append((start, stop))
    return found


def _range(words: str) -> Range:
    start, _, stop = words.partition("-")
    return int(start, 16), int(stop, 16)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):  # not there, or not for us
        return ""

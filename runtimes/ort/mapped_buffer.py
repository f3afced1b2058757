"""Keys and values of all rows on the host, one array [rows, kv_heads, max_cache_length, head_dim] per layer and kind.

All of it is there from the start, as addresses: memory is what was written, page by page. So nothing is copied while
texts grow, the arrays stay where they are bound, and a row that nobody needs gives its pages back. numpy's own zeros
would be huge pages, of which a short row fills little: four rows of 100 tokens took 1635 MB instead of 123.

A layer with a window gives back what no later token sees: its pages read as zeros from then on, and take no memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import ContextLengthError
from runtimes.manifest import KVCacheSpec

_PAGES_GO_BACK = hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MAP_PRIVATE")


class MappedBuffer:
    """Implements `runtimes.ort.shared.KVBuffer`."""

    def __init__(self, spec: KVCacheSpec, rows: int) -> None:
        """Take what the cache is, and for how many rows there is to be room at once when the first is needed."""
        self._spec = spec
        self._names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        self._first_rows = rows
        self._rows = 0
        self._maps: dict[str, mmap.mmap] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._windowed = [f"{n}.{kind}" for n, size in enumerate(spec.windows) if size for kind in ("key", "value")]
        self._forgotten: dict[int, int] = {}  # row -> its first tokens that layers with a window have no more
        self._bindings: dict[tuple[int, int, int, tuple[str, ...]], Any] = {}

    def reserve(self, rows: int, held: Sequence[int]) -> None:
        """Have room for so many rows, keeping the tokens that are held; a copy only where there were never as many.

        Args:
            rows: at least so many.
            held: tokens to keep, per row.

        Raises:
            ContextLengthError: the system does not give so many addresses.
        """
        if rows <= self._rows:
            return
        spec, rows = self._spec, max(rows, self._first_rows)
        shape = (rows, spec.num_key_value_heads, spec.max_cache_length, spec.stored_head_dim)
        try:
            made = {name: _zeros(shape, np.dtype(spec.dtype)) for name in self._names}
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            size = len(self._names) * int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            raise ContextLengthError(
                f"a KV cache of {rows} rows of {spec.max_cache_length} tokens needs {size:,} bytes of memory; use less"
            ) from error
        for name, (_, array) in made.items():
            for row, length in enumerate(held[: self._rows]):
                first = self._first(name, row)
                array[row, :, first:length] = self._arrays[name][row, :, first:length]
        self._bindings.clear()
        self._maps = {name: pages for name, (pages, _) in made.items() if pages is not None}
        self._arrays = {name: array for name, (_, array) in made.items()}
        self._rows = rows

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row to another."""
        for name, array in self._arrays.items():
            first = self._first(name, source)
            array[target, :, first:length] = array[source, :, first:length]
        self._forgotten[target] = self.forgotten(source)

    def forgotten(self, row: int) -> int:
        """Return how many of a row's first tokens layers with a window have no more."""
        return self._forgotten.get(row, 0)

    def rewrite(self, row: int) -> None:
        """Take note that a row is written from its start."""
        self._forgotten.pop(row, None)

    def forget(self, row: int, count: int) -> None:
        """Give the system the pages with a row's first tokens in layers with a window, as no later token sees them."""
        before = self.forgotten(row)
        if count <= before or not self._maps:
            return
        for name in self._windowed:
            heads = self._arrays[name][row]
            token, size = heads[0, 0].nbytes, heads[0].nbytes
            for head in range(len(heads)):
                start = row * heads.nbytes + head * size
                # What was given back before may end within a page, which is free only now.
                self._give_pages(name, start + max(0, before * token - mmap.PAGESIZE), start + count * token)
        self._forgotten[row] = count

    def give_back(self, row: int) -> None:
        """Give the system the pages that hold this row alone; they read as zeros from then on."""
        self.rewrite(row)
        for name in self._maps:
            size = self._arrays[name][0].nbytes
            self._give_pages(name, row * size, (row + 1) * size)

    def _first(self, name: str, row: int) -> int:
        return self.forgotten(row) if name in self._windowed else 0

    def _give_pages(self, name: str, start: int, stop: int) -> None:
        """Give back the pages that lie between two bytes of an array."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._maps[name].madvise(mmap.MADV_DONTNEED, first, length)

    def binding(self, session: ort.InferenceSession, start: int, stop: int, outputs: Sequence[str]) -> Any:
        """Return the binding of rows start to stop as past and present; kept, as making it costs as much as a layer."""
        key = (id(session), start, stop, tuple(outputs))
        if key not in self._bindings:
            binding = session.io_binding()
            for name, array in self._arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[start:stop])
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
                binding.bind_ortvalue_output(f"present.{name}", value)
            self._bindings[key] = binding
        return self._bindings[key]

    def close(self) -> None:
        self._rows = 0
        self._forgotten.clear()
        self._bindings.clear()
        self._arrays.clear()
        self._maps.clear()  # unmapped when the last array of theirs is gone


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[mmap.mmap | None, np.ndarray]:
    """Return zeros that begin at a page, and what maps them. Finite at first: what is masked is multiplied, too."""
    if not _PAGES_GO_BACK:
        return None, np.zeros(shape, dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return pages, np.frombuffer(pages, dtype).reshape(shape)

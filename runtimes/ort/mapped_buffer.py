"""Keys and values of all rows on the host, one array [rows, kv_heads, max_cache_length, head_dim] per layer and kind.

All of it is there from the start, as addresses: memory is what was written, page by page. So nothing is copied while
texts grow, the arrays stay where they are bound, and a row that nobody needs gives its pages back. numpy's own zeros
would be huge pages, of which a short row fills little: four rows of 100 tokens took 1635 MB instead of 123.
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
                array[row, :, :length] = self._arrays[name][row, :, :length]
        self._bindings.clear()
        self._maps = {name: pages for name, (pages, _) in made.items() if pages is not None}
        self._arrays = {name: array for name, (_, array) in made.items()}
        self._rows = rows

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row to another."""
        for array in self._arrays.values():
            array[target, :, :length] = array[source, :, :length]

    def give_back(self, row: int) -> None:
        """Give the system the pages that hold this row alone; they read as zeros from then on."""
        for name, pages in self._maps.items():
            size = self._arrays[name][0].nbytes
            first = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                pages.madvise(mmap.MADV_DONTNEED, first, length)

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

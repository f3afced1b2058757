"""LoRA adapters of a package, in onnxruntime's own files (.onnx_adapter), for graphs that take them as inputs.

| tensor            | shape                  | dtype                | default                        |
|-------------------|------------------------|----------------------|--------------------------------|
| {module}.lora_A   | [in, {module}.rank]    | that of the graph    | rank 0: the module as it is    |
| {module}.lora_B   | [{module}.rank, out]   | the same             | the same; the scale is in B    |

A file has them in float32, for all graphs of the package; for one of 16 bits they are rounded when they are read.

Plain onnxruntime takes a file by `RunOptions.add_active_adapter`, with `run`, for graphs in float32; with I/O binding
it ignores that without a word, so that here each tensor is bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.dtypes import find_dtype, rounded
from runtimes.errors import PackageError
from runtimes.manifest import Variant
from runtimes.ort.devices import GpuMemory
from runtimes.ort.session import one_line


class Adapters:
    """The adapters of a package for one of its graphs; each is read when it is first asked for, and kept.

    In a GPU's memory what adds nothing has rank 1 and zeros, so that there is an address to bind.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, str],
        variant: Variant,
        check: Callable[[Sequence[str]], None] | None,
        memory: GpuMemory | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            folder: the package.
            files: adapter -> its file in the package.
            variant: whose inputs they fill.
            check: compares files of the package with the manifest; None: nothing is checked.
            memory: of the GPU that runs the graph; None: the host's.
        """
        self._folder, self._files, self._check = folder, files, check
        self._variant, self._memory = variant, memory
        specs = [spec for spec in variant.inputs if spec.role in ("lora_a", "lora_b")]
        shapes = {spec.name: spec.shape for spec in specs}
        self.names = tuple(files) if shapes else ()
        self._shapes = shapes
        self._dtypes = {spec.name: find_dtype(spec.dtype) for spec in specs}
        rank = 0 if memory is None else 1
        nothing = {name: [size if isinstance(size, int) else rank for size in shape] for name, shape in shapes.items()}
        self._arrays: dict[str | None, dict[str, npt.NDArray[np.float32]]] = {
            None: {name: np.zeros(shape, np.float32) for name, shape in nothing.items()}
        }
        self._values: dict[str | None, dict[str, Any]] = {None: self._placed(self._arrays[None])}

    def values(self, name: str | None) -> Mapping[str, Any]:
        """Return an OrtValue for every such input of the graph; it adds zeros where the adapter changes nothing.

        Args:
            name: one of `names`; None: no adapter.

        Raises:
            IntegrityError: the file is not the one that was exported.
            PackageError: it is none of onnxruntime's, or has other tensors than the graph takes.
        """
        if name is None or name in self._values:
            return self._values[name]
        file = self._files[name]
        if self._check is not None:
            self._check([file])
        try:
            read = ort.AdapterFormat.read_adapter(str(self._folder / file)).get_parameters()
        except (RuntimeError, OSError, ValueError) as error:
            raise PackageError(f"{file}: onnxruntime cannot read it ({one_line(error)}); export it again") from error
        found = {key: np.array(value.numpy()) for key, value in read.items()}
        wrong = [key for key, array in found.items() if not _fits(array.shape, self._shapes.get(key, ()))]
        if wrong:
            raise PackageError(f"{file}: {wrong[0]} is no input of variant {self._variant.name}; export it again")
        self._arrays[name] = self._arrays[None] | found
        self._values[name] = self._placed(self._arrays[name])
        return self._values[name]

    def bind(self, binding: Any, name: str | None) -> None:
        """Bind every such input of the graph for a run; see `values`."""
        for key, value in self.values(name).items():
            if self._memory is None:
                binding.bind_ortvalue_input(key, value)
            else:  # by address, as memory there is of integers where numpy has no such float
                kind, index, dtype = self._memory.kind, self._memory.index, self._dtypes[key].onnx
                binding.bind_input(key, kind, index, dtype, value.shape(), value.data_ptr())

    def _placed(self, arrays: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
        placed: dict[str, Any] = {}
        for name, array in arrays.items():
            dtype = self._dtypes[name]
            numbers = rounded(array, dtype)
            if self._memory is None:
                placed[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(numbers, dtype.onnx)
            else:
                placed[name] = self._memory.allocate(numbers.shape, numbers.dtype)
                placed[name].update_inplace(numbers)
        return placed


def write_adapter(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write an adapter as onnxruntime reads it; the same tensors give the same bytes."""
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(tensors[name]) for name in sorted(tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    file.export_adapter(str(path))


def _fits(shape: tuple[int, ...], spec: tuple[int | str, ...]) -> bool:
    return len(shape) == len(spec) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, spec, strict=True)
    )

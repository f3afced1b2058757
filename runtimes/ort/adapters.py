"""LoRA adapters of a package, in onnxruntime's own files (.onnx_adapter), for graphs that take them as inputs.

| tensor            | shape                  | dtype   | default                        |
|-------------------|------------------------|---------|--------------------------------|
| {module}.lora_A   | [in, {module}.rank]    | float32 | rank 0: the module as it is    |
| {module}.lora_B   | [{module}.rank, out]   | float32 | the same; the scale is in B    |

Plain onnxruntime takes a file by `RunOptions.add_active_adapter`, with `run`; with I/O binding it ignores that without
a word, so that here each tensor is bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import PackageError
from runtimes.manifest import Variant
from runtimes.ort.session import one_line


class Adapters:
    """The adapters of a package for one of its graphs; each is read when it is first asked for, and kept."""

    def __init__(
        self, folder: Path, files: Mapping[str, str], variant: Variant, check: Callable[[Sequence[str]], None] | None
    ) -> None:
        """Read nothing yet.

        Args:
            folder: the package.
            files: adapter -> its file in the package.
            variant: whose inputs they fill.
            check: compares files of the package with the manifest; None: nothing is checked.
        """
        self._folder, self._files, self._check = folder, files, check
        self._variant = variant
        shapes = {spec.name: spec.shape for spec in variant.inputs if spec.role in ("lora_a", "lora_b")}
        self.names = tuple(files) if shapes else ()
        self._shapes = shapes
        nothing = {name: [size if isinstance(size, int) else 0 for size in shape] for name, shape in shapes.items()}
        self._arrays: dict[str | None, dict[str, npt.NDArray[np.float32]]] = {
            None: {name: np.zeros(shape, np.float32) for name, shape in nothing.items()}
        }
        self._values: dict[str | None, dict[str, Any]] = {None: _values(self._arrays[None])}

    def values(self, name: str | None) -> Mapping[str, Any]:
        """Return an OrtValue for every such input of the graph; of rank 0 where the adapter changes nothing.

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
        self._values[name] = _values(self._arrays[name])
        return self._values[name]


def write_adapter(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write an adapter as onnxruntime reads it; the same tensors give the same bytes."""
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(tensors[name]) for name in sorted(tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    file.export_adapter(str(path))


def _values(arrays: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def _fits(shape: tuple[int, ...], spec: tuple[int | str, ...]) -> bool:
    return len(shape) == len(spec) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, spec, strict=True)
    )

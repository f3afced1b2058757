"""Give a graph its weights and write both to disk: one tensor at a time, so that memory stays small."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from tqdm import tqdm

from olmo2_export.atomic import resource_error
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.fold_weight_transpose import TRANSPOSED
from olmo2_export.fuse.quantized_kv_cache import KEPT_INSIDE
from olmo2_export.model.olmo import UNIT
from olmo2_export.model.rotary import model_tables
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes.errors import FusionError, ResourceError, first_names

INSIDE = 256
"""bytes: tensors up to that stay in the graph itself, and those that are `KEPT_INSIDE`"""

_BLOCK_ROWS = 4096
_LARGE = 1 << 20  # bytes: tensors beyond that begin at a page in the data file, so that a runtime can map them
_PAGE = 4096  # bytes
_PARTIAL = ".partial"


def attach_weights(model: ir.Model, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Give each initializer that has no data yet a lazy tensor: read, cast to float32 and transposed when written."""
    tables = model_tables(config)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.shape is not None  # the trace gave both
        assert value.dtype is not None

        def load(name: str = name, transposed: bool = value.meta.get(TRANSPOSED, False)) -> ir.TensorProtocol:
            stored = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
            if name.endswith(f".{UNIT}"):
                tensor = torch.ones(config.hidden_size)
            else:
                tensor = tables[name] if name in tables else _float32(checkpoint, stored, transposed)
            return ir.Tensor(tensor.numpy(), name=name)

        value.const_value = ir.LazyTensor(load, dtype=value.dtype, shape=value.shape, name=name)


def _float32(checkpoint: Checkpoint, name: str, transposed: bool) -> torch.Tensor:
    """Return a weight, or its transpose, in float32; made in blocks of rows, so that only the result is in memory."""
    shape = checkpoint.tensors[name].shape
    result = torch.empty(shape[::-1] if transposed else shape, dtype=torch.float32)
    start = 0
    for block in checkpoint.rows(name):
        stop = start + len(block)
        for first in range(0, len(block), _BLOCK_ROWS) if transposed else ():
            part = block[first : first + _BLOCK_ROWS]
            result[:, start + first : start + first + len(part)] = part.T.contiguous()
        if not transposed:
            result[start:stop] = block
        start = stop
    return result


def save_graph(model: ir.Model, path: Path, data: Path | None = None) -> None:
    """Write a graph and, beside it, its weights: one lazily evaluated tensor at a time, so memory stays small.

    Args:
        model: every initializer has data, possibly lazy.
        path: the .onnx file.
        data: the file of the weights, in the same folder; None: the same name with `_data`.

    Raises:
        ResourceError: the disk cannot hold it; said before anything is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    outside = stored_outside(model)
    offsets, size = place(tensor.nbytes for _, tensor in outside)
    _check_room(path, size)
    data = data or path.with_name(f"{path.name}_data")
    partial = data.with_name(data.name + _PARTIAL)  # the graph may have been read from what it replaces
    try:
        _write_data(partial, [(at, tensor) for at, (_, tensor) in zip(offsets, outside, strict=True)], size)
        partial.replace(data)
        with pointing_to(data, outside, offsets):
            ir.save(model, path)
    except OSError as error:
        raise resource_error(path, error) from error


def save_beside(model: ir.Model, path: Path, stored: Path) -> None:
    """Write a graph alone: its weights are in the file of another graph, in the same folder, which has them all.

    Args:
        model: every initializer has data, possibly lazy; what lies outside the graph is not asked for.
        path: the .onnx file to write.
        stored: the .onnx file of the other graph.

    Raises:
        FusionError: the other graph has no such weight.
        ResourceError: the disk cannot hold it.
    """
    places = {name: value.const_value for name, value in load_graph(stored).graph.initializers.items()}
    outside, offsets, wrong, data = stored_outside(model), [], [], path
    for value, tensor in outside:
        place = places.get(str(value.name))
        if isinstance(place, ir.ExternalTensor) and (place.dtype, place.shape) == (tensor.dtype, tensor.shape):
            offsets.append(place.offset or 0)
            data = path.with_name(Path(place.location).name)
        else:
            wrong.append(str(value.name))
    if wrong:
        raise FusionError(f"{stored}: lacks weights that {path.name} has: {first_names(wrong)}")
    try:
        with pointing_to(data, outside, offsets):
            ir.save(model, path)
    except OSError as error:
        raise resource_error(path, error) from error


Outside: TypeAlias = list[tuple[ir.Value, ir.TensorProtocol]]
"""initializers, and the tensors that they have"""


def stored_outside(model: ir.Model) -> Outside:
    """Return the initializers whose data goes into the file beside the graph, in the order in which it lies there."""
    return [
        (value, tensor)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None
        and (isinstance(tensor, ir.ExternalTensor) or (tensor.nbytes > INSIDE and KEPT_INSIDE not in value.meta))
    ]


def place(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Return where tensors of these sizes begin in the data file, and how long the file is; all in bytes."""
    offsets = []
    end = 0
    for size in sizes:
        if size > _LARGE:
            end = -(-end // _PAGE) * _PAGE
        offsets.append(end)
        end += size
    return offsets, end


@contextmanager
def pointing_to(data: Path, outside: Outside, offsets: Iterable[int]) -> Iterator[None]:
    """Let initializers say where their data lies in a file, which need not be there; after that, they have it again."""
    try:
        for (value, tensor), offset in zip(outside, offsets, strict=True):
            value.const_value = ir.ExternalTensor(
                data.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]  # as onnx-ir itself does
                name=tensor.name or "",
                base_dir=data.parent,
            )
        yield
    finally:
        for value, tensor in outside:
            value.const_value = tensor


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size + (1 << 20) > free:
        raise ResourceError(f"{path.parent}: {path.name} needs {size + (1 << 20):,} bytes, {free:,} are free")


def _write_data(path: Path, places: Iterable[tuple[int, ir.TensorProtocol]], size: int) -> None:
    """Write tensors at their offsets, in that order; what lies between them is zeros.

    We do this, and not `ir.save`, because onnx-ir 1.0 and 1.1 order and align tensors differently.
    """
    name = path.name.removesuffix(_PARTIAL)
    bar = tqdm(total=size, desc=f"writing {name}", unit="B", unit_scale=True, leave=False)
    with bar, path.open("wb") as file:
        file.truncate(size)
        for offset, tensor in places:
            file.seek(offset)
            tensor.tofile(file)  # type: ignore[attr-defined]  # all of onnx-ir's have it, its protocol does not say so
            bar.update(tensor.nbytes)


def save_weights(model: ir.Model, path: Path, stored: Path, data: str | None = None) -> None:
    """Write the weights of a graph that another package has already: its file is copied, its data written anew.

    Args:
        model: every initializer has data, possibly lazy.
        path: the .onnx file to write.
        stored: the .onnx file of the other package, made from a model of the same shape.
        data: the name of the file of the weights, in both folders; None: the graph's with `_data`.

    Raises:
        FusionError: the stored graph has other weights, or weights inside it that differ.
        ResourceError: the disk cannot hold it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    places = {name: value.const_value for name, value in load_graph(stored).graph.initializers.items()}
    new = {name: value.const_value for name, value in model.graph.initializers.items()}
    wrong = sorted(places.keys() ^ new.keys())
    for name in places.keys() & new.keys():
        old, other = places[name], new[name]
        assert old is not None  # all of a stored graph have data
        assert other is not None
        if old.dtype != other.dtype or old.shape != other.shape:
            wrong.append(name)
        elif not isinstance(old, ir.ExternalTensor) and not np.array_equal(old.numpy(), other.numpy()):
            wrong.append(f"{name} (stored inside the graph)")
    if wrong:
        raise FusionError(f"{stored}: weights that this checkpoint does not fit: {first_names(wrong)}")
    outside = {name: old for name, old in places.items() if isinstance(old, ir.ExternalTensor)}
    data = data or f"{path.name}_data"
    size = (stored.parent / data).stat().st_size
    _check_room(path, size)
    shutil.copyfile(stored, path)
    at = {name: tensor.offset or 0 for name, tensor in outside.items()}
    ordered = [(at[name], tensor) for name in sorted(at, key=at.__getitem__) if (tensor := new[name]) is not None]
    try:
        _write_data(path.with_name(data), ordered, size)
    except OSError as error:
        raise resource_error(path, error) from error

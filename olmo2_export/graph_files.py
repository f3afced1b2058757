"""Give a graph its weights and write both to disk: one tensor at a time, so that memory stays small."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from tqdm import tqdm

from olmo2_export.atomic import resource_error
from olmo2_export.checkpoint import Checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.fold_weight_transpose import TRANSPOSED
from olmo2_export.model import rotary_tables
from olmo2_export.stored_graph import load_graph
from olmo2_export.trace import ROTARY_TABLES
from runtimes.errors import FusionError, ResourceError, first_names

_BLOCK_ROWS = 4096
_ALIGNMENT = 4096  # of large tensors in the data file, so that a runtime can map them


def attach_weights(model: ir.Model, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Give each initializer that has no data yet a lazy tensor: read, cast to float32 and transposed when written."""
    tables = dict(zip(ROTARY_TABLES, rotary_tables(config), strict=True))
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.shape is not None  # the trace gave both
        assert value.dtype is not None

        def load(name: str = name, transposed: bool = value.meta.get(TRANSPOSED, False)) -> ir.TensorProtocol:
            stored = "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
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


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph and, beside it, its weights: one lazily evaluated tensor at a time, so memory stays small.

    Args:
        model: every initializer has data, possibly lazy.
        path: the .onnx file; the weights go to the same name with `_data`.

    Raises:
        ResourceError: the disk cannot hold it; said before anything is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    free = shutil.disk_usage(path.parent).free
    if total + (1 << 20) > free:
        raise ResourceError(f"{path.parent}: {path.name} needs {total + (1 << 20):,} bytes, {free:,} are free")
    with tqdm(total=total, desc=f"writing {path.name}", unit="B", unit_scale=True, leave=False) as bar:

        def on_tensor(tensor: ir.TensorProtocol, _: object) -> None:
            bar.update(tensor.nbytes)

        try:
            ir.save(model, path, external_data=f"{path.name}_data", alignment=_ALIGNMENT, callback=on_tensor)
        except OSError as error:
            raise resource_error(path, error) from error


def save_weights(model: ir.Model, path: Path, stored: Path) -> None:
    """Write the weights of a graph that another package has already: its file is copied, its data written anew.

    Args:
        model: every initializer has data, possibly lazy.
        path: the .onnx file to write; the weights go to the same name with `_data`.
        stored: the .onnx file of the other package, made from a model of the same shape.

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
    size = (stored.parent / f"{stored.name}_data").stat().st_size
    free = shutil.disk_usage(path.parent).free
    if size + (1 << 20) > free:
        raise ResourceError(f"{path.parent}: {path.name} needs {size + (1 << 20):,} bytes, {free:,} are free")
    shutil.copyfile(stored, path)
    bar = tqdm(total=size, desc=f"writing {path.name}_data", unit="B", unit_scale=True, leave=False)
    try:
        with bar, path.with_name(f"{path.name}_data").open("wb") as file:
            file.truncate(size)
            for name in sorted(outside, key=lambda n: outside[n].offset or 0):
                tensor = new[name]
                assert tensor is not None  # checked above
                file.seek(outside[name].offset or 0)
                file.write(tensor.tobytes())
                bar.update(tensor.nbytes)
    except OSError as error:
        raise resource_error(path, error) from error

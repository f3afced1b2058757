"""Find a checkpoint (Hub id, local folder, or the bundled demo) and read its safetensors lazily and safely.

Nothing of a checkpoint is executed: no pickle, no remote code. Headers are checked before any data is read, and one
message lists everything that is wrong.
"""

from __future__ import annotations

import json
import logging
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from runtimes.errors import CheckpointError, CheckpointNotFoundError, UsageError, first_names

logger = logging.getLogger(__name__)

DEMO = "demo"
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""files that a package takes over as they are, where the checkpoint has them"""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DOWNLOAD = ["config.json", *TEXT_FILES, _SINGLE, _INDEX, "model-*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_HEADER = 16 << 20
_MAX_TENSORS = 100_000
_PIECE = 1 << 20  # weights
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FOREIGN = {
    b"version ": "a Git LFS pointer: run 'git lfs pull', or download the file itself",
    b"<!DOCTYP": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
    b"PK\x03\x04": "a pickle archive: convert it to safetensors",
    b"\x80": "a pickle: convert it to safetensors",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: str
    dtype: str
    """safetensors' name: F32, F16, BF16, I64, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A located checkpoint whose headers have been read; tensors are read when asked for."""

    folder: Path
    model: str
    """Hub id, `demo`, or the name of the local folder"""
    kind: str
    """hub | folder | demo"""
    revision: str | None
    """the resolved commit, for kind hub"""
    files: tuple[str, ...]
    """the safetensors files"""
    tensors: Mapping[str, TensorInfo] = field(hash=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored dtype and shape; its memory is the file's, mapped until it is dropped.

        Raises:
            CheckpointError: the file changed since its header was read.
        """
        path = self.folder / self.tensors[name].file
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name}: {error}; download the file again") from error
        return tensor

    def validate(self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None) -> None:
        """Compare the checkpoint with the tensors a model needs, then look for NaN and Inf in all of them.

        Args:
            expected: tensor name -> shape.
            aliases: name -> name of the expected tensor it must be equal to, where it is stored at all (tied weights).

        Raises:
            CheckpointError: naming every missing, extra, misshapen, wrongly typed or non-finite tensor.
        """
        aliases = aliases or {}
        problems: list[str] = []
        missing = expected.keys() - self.tensors.keys()
        extra = self.tensors.keys() - expected.keys() - aliases.keys()
        for label, names in (("missing", missing), ("not of this model", extra)):
            if names:
                problems.append(f"{label}: {first_names(sorted(names))}")
        present = [name for name in expected if name in self.tensors]
        readable: list[str] = []
        for name in present:
            info = self.tensors[name]
            if info.dtype not in _DTYPES:
                problems.append(f"{name}: dtype {info.dtype}, expected one of {', '.join(_DTYPES)}")
            elif info.shape != expected[name]:
                problems.append(f"{name}: shape {list(info.shape)}, expected {list(expected[name])}")
            else:
                readable.append(name)
        for name in tqdm(readable, desc="checking weights", unit="tensor", leave=False):
            if count := _count_non_finite(self.tensor(name)):
                problems.append(f"{name}: {count} NaN or Inf of {math.prod(expected[name])}")
        for name, target in aliases.items():
            if name in self.tensors and target in readable and not torch.equal(self.tensor(name), self.tensor(target)):
                problems.append(f"{name}: tied to {target} by config.json, but not equal to it")
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Locate a checkpoint, download it if it is on the Hub, and read the headers of its safetensors.

    Args:
        model: `demo`, a local folder, or a Hub id such as allenai/OLMo-2-0425-1B.
        revision: branch, tag or commit; Hub ids only.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision, or no weights in it.
        CheckpointError: a file is damaged, disguised or leads out of the folder.
        UsageError: a revision for something that has none.
    """
    folder, name, kind = _locate(model, revision)
    if revision is not None and kind != "hub":
        raise UsageError(f"--revision {revision}: only Hub ids have revisions, {model} is a {kind}")
    if not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(f"{folder}: no config.json; is this a checkpoint in Hugging Face format?")
    files = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        path = _inside(folder, file, hard_links_allowed=kind != "folder")
        for tensor, info in _read_header(path, file).items():
            if tensor in tensors:
                raise CheckpointError(f"{folder}: {tensor} is both in {tensors[tensor].file} and in {file}")
            tensors[tensor] = info
    return Checkpoint(
        folder=folder,
        model=name,
        kind=kind,
        revision=folder.resolve().name if kind == "hub" else None,
        files=tuple(files),
        tensors=tensors,
    )


def _locate(model: str, revision: str | None) -> tuple[Path, str, str]:
    if model == DEMO:
        return Path(__file__).parent / "demo", DEMO, "demo"
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.resolve().name, "folder"
    if path.exists():
        raise CheckpointNotFoundError(f"{path}: a file; MODEL is a folder, a Hub id (owner/name) or '{DEMO}'")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointNotFoundError(f"{model}: no such folder, and not a Hub id (owner/name) or '{DEMO}'")
    try:
        # Resumes what is partly there; without a network, or with HF_HUB_OFFLINE=1, it answers from the cache.
        snapshot = snapshot_download(model, revision=revision, allow_patterns=_DOWNLOAD)
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{model}: the Hub cannot be reached and the cache has no copy; check the network or HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointNotFoundError(f"{model}@{revision or 'main'}: {reason}") from error
    return Path(snapshot), model, "hub"


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files, chosen as transformers does: the single file, else the index."""
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    index = folder / _INDEX
    if not index.exists():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {first_names(pickles)} is never read: convert it to safetensors" if pickles else ""
        raise CheckpointNotFoundError(f"{folder}: neither {_SINGLE} nor {_INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no valid weight_map ({type(error).__name__})") from error
    bad = sorted(str(n) for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors"))
    if bad:
        raise CheckpointError(f"{index}: {first_names(bad)}: a shard is a .safetensors file in the same folder")
    absent = sorted(n for n in names if not (folder / n).is_file())
    if absent:
        raise CheckpointNotFoundError(f"{folder}: the index names {first_names(absent)}, which is not there")
    return sorted(names)


def _inside(folder: Path, name: str, hard_links_allowed: bool) -> Path:
    """Return the path of a weight file, making sure that its data lies in the folder or in the Hub's own cache."""
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    if not real.is_file():
        raise CheckpointError(f"{path}: not a file")
    blobs = home.parent.parent / "blobs"  # <cache>/models--owner--name/{snapshots/<commit>,blobs}
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(f"{path}: a link to {real}, outside the checkpoint; copy the file")
    if real.stat().st_nlink > 1 and not hard_links_allowed and home.parent.name != "snapshots":
        raise CheckpointError(f"{path}: a hard link to a file that also has another name; copy the file")
    return path


def _read_header(path: Path, name: str) -> dict[str, TensorInfo]:
    """Read a safetensors header with limits, refusing what the library accepts: bombs and duplicate keys.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        for magic, hint in _FOREIGN.items():
            if start.startswith(magic):
                raise CheckpointError(f"{path}: not safetensors but {hint}")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path}: truncated, or not safetensors ({size} bytes); download it again")
        if length > _MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes, the limit is {_MAX_HEADER}")
        blob = file.read(length)
    try:
        header: dict[str, Any] = json.loads(blob, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else "not valid JSON"
        raise CheckpointError(f"{path}: damaged header: {reason}; download it again") from error
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: the header must be an object of at most {_MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    end = 0
    tensors: dict[str, TensorInfo] = {}
    for tensor, entry in header.items():
        try:
            shape = tuple(entry["shape"])
            stop = entry["data_offsets"][1]
            if any(type(number) is not int for number in (*shape, stop)):
                raise TypeError("sizes are integers")
            end = max(end, stop)
            tensors[tensor] = TensorInfo(name, str(entry["dtype"]), shape)
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{path}: damaged header entry {tensor!r}; download it again") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: {size} bytes, its header promises {8 + length + end}; download it again")
    return tensors


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CheckpointError(f"{key!r} occurs twice")
        result[key] = value
    return result


def _count_non_finite(tensor: torch.Tensor) -> int:
    """Count NaN and Inf, in pieces that stay in the processor's cache."""
    count = 0
    for piece in torch.split(tensor.flatten(), _PIECE):
        # A float64 sum of float32 numbers is finite if and only if they all are, and much faster than asking each.
        if not math.isfinite(piece.sum(dtype=torch.float64).item()):
            count += int((~torch.isfinite(piece)).sum().item())
    return count

"""A checkpoint's tensors by the model's own names: which file holds each, what is missing, what does not belong.

Nothing of a checkpoint is executed: no pickle, no remote code. Headers are checked before any data is read, and one
message lists everything that is wrong. Where a file lies is no matter: links of any kind are followed, and what they
lead to is judged by its bytes.

What transformers loads without changing the logits is loaded, with a warning that names it; what would change them,
were it used, is refused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from olmo2_export.config import refuse_other_forms
from olmo2_export.dtypes import STORED, stored_dtype
from olmo2_export.weights import stored_tensors
from olmo2_export.weights.hub import locate, read_index, remote_headers
from olmo2_export.weights.other_formats import INDEX, SINGLE, folder_place, is_whole, refuse_other_formats
from olmo2_export.weights.quantized.codes import Codes
from olmo2_export.weights.quantized.recognise import Quantized, find_quantized
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, CheckpointNotFoundError, UsageError, broken_link, first_names
from runtimes.manifest import SourceKind
from runtimes.threads import default_threads

logger = logging.getLogger(__name__)

_PREFIX = "model."
_UNPREFIXED = re.compile(r"(layers\.\d+\.|embed_tokens\.|norm\.)")
# Tensors that the model computes from config.json; older transformers and Megatron store them.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
_OWN = ("model.", "lm_head.")
_HEAD, _SCORE = "lm_head.weight", "score.weight"
_ADAPTER = re.compile(r"(^|\.)(lora_|dora_|base_layer\.|base_model\.|modules_to_save\.|prompt_embeddings|ia3_)")
_QUANTIZED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|g_idx|absmax|nested_absmax|quant_map|quant_state|SCB|weight_format|"
    r"weight_scale|weight_scale_inv|weight_zero_point|weight_packed|weight_shape|weight_qdata|input_scale|biases)($|\.)"
)
_WRAPPERS = {
    "_orig_mod.": "saved from a torch.compile'd model",
    "module.": "saved from DistributedDataParallel",
    "base_model.": "saved from a PEFT model",
    "transformer.": "of another format: is it AI2's own, before conversion?",
}


@dataclass(frozen=True)
class Checkpoint:
    """A located checkpoint whose headers have been read; tensors are read when asked for."""

    folder: Path
    model: str
    """Hub id, `demo`, or the name of the local folder"""
    kind: SourceKind
    revision: str | None
    """the resolved commit, for kind hub"""
    files: tuple[str, ...]
    """the safetensors files"""
    tensors: Mapping[str, TensorInfo] = field(hash=False)
    """by the model's names; of a quantised linear its weight, as float32"""
    _stamps: Mapping[str, tuple[int, int]] = field(hash=False, repr=False)
    quantized: Quantized | None = None
    """the linears that are stored in few bits; None: all are plain numbers"""
    _packed: Mapping[str, TensorInfo] = field(default_factory=dict, hash=False, repr=False)
    """the tensors of these"""

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored dtype and shape, into memory that the caller owns; float32 where quantised.

        Raises:
            CheckpointError: the file changed since its header was read, or holds what its format cannot mean.
        """
        if self._is_quantized(name):
            found = self._decoded(name)
            return torch.from_numpy(found.dequantize() if isinstance(found, Codes) else found)
        return stored_tensors.read_tensor(*self.place(name))

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """Read one tensor in blocks of whole rows, in its stored dtype; each block is overwritten by the next.

        Raises:
            CheckpointError: the file changed since its header was read.
        """
        if self._is_quantized(name):
            return iter([self.tensor(name)])
        return stored_tensors.read_rows(*self.place(name))

    def picked(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Read some rows of one tensor, in its stored dtype: int64 [n] -> [n, ...]; only these are read, each once.

        Raises:
            CheckpointError: the file changed since its header was read.
        """
        if self._is_quantized(name):
            return self.tensor(name)[rows]
        wanted, places = torch.unique(rows, return_inverse=True)
        return stored_tensors.read_picked(*self.place(name), wanted.tolist())[places]

    def codes(self, name: str) -> Codes | None:
        """Read the integers of a quantised linear; None: it has none.

        Raises:
            CheckpointError: as `tensor`.
        """
        found = self._decoded(name) if self._is_quantized(name) else None
        return found if isinstance(found, Codes) else None

    @property
    def is_here(self) -> bool:
        """Whether its tensors can be read, not their headers alone."""
        return bool(self._stamps)

    def _is_quantized(self, name: str) -> bool:
        return self.quantized is not None and name in self.quantized.linears

    def _decoded(self, name: str) -> Codes | np.ndarray:
        assert self.quantized is not None  # the caller has asked
        linear = self.quantized.linears[name]
        try:
            parts = {part: stored_tensors.read_array(*self.place(stored)) for part, stored in linear.tensors.items()}
            return linear.decode(parts)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}") from error

    def place(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file that a stored tensor is in, and where in it.

        Raises:
            CheckpointError: the file changed since its header was read.
        """
        info = self._packed[name] if name in self._packed else self.tensors[name]
        path = self.folder / info.file
        if file_stamp(path) != self._stamps[info.file]:
            raise CheckpointError(f"{path}: changed since its header was read; start again")
        return path, info

    @property
    def changed(self) -> frozenset[str]:
        """Tensors that are others than its files hold: `weights.merged` has such checkpoints."""
        return frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the headers tell of."""
        return sum(info.size for info in self.tensors.values())

    def extra(self, expected: Iterable[str]) -> dict[str, str]:
        """Return what does not belong to the model and would change it, were it used: name -> what it is.

        Buffers that are computed, biases that are 0 and what is left of training beside the model are not among them:
        transformers ignores them, and the logits are the same.
        """
        found, known = {}, set(expected)
        for name in sorted(self.tensors.keys() - known):
            if name == _HEAD and _SCORE in known:  # a classifier does not use it
                continue
            if _ADAPTER.search(name):
                found[name] = "of an adapter such as LoRA (give it as --lora, or merge it into the weights first)"
            elif _QUANTIZED.search(name):
                found[name] = "of quantised weights (give the checkpoint that they were made from, or dequantise)"
            elif not name.startswith(_OWN) or _COMPUTED.search(name):
                continue
            elif name.endswith(".bias"):
                info = self.tensors[name]
                here = info.file in self._stamps
                if info.dtype not in STORED or (here and not stored_tensors.all_zero(*self.place(name))):
                    found[name] = "biases that config.json does not tell of (attention_bias?)"
            else:
                found[name] = "not of this model"
        return found

    def validate(self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None) -> None:
        """Compare the checkpoint with the tensors a model needs, then look for NaN and Inf in all of them.

        Args:
            expected: tensor name -> shape.
            aliases: name -> name of the expected tensor it must be equal to, where it is stored at all (tied weights).

        Raises:
            CheckpointError: naming every missing, extra, misshapen, wrongly typed or non-finite tensor.
        """
        aliases = aliases or {}
        problems, readable = self._header_problems(expected, aliases)
        with ThreadPoolExecutor(max_workers=default_threads()) as pool:
            counts = pool.map(self._non_finite, readable)
            bar = tqdm(counts, total=len(readable), desc="checking weights", unit="tensor", leave=False)
            for name, count in zip(readable, bar, strict=True):
                if count:
                    of = math.prod(self.tensors[name].shape)
                    problems.append(f"{name}: {count} NaN or Inf of {of}")
        for name, target in aliases.items():
            if name in self.tensors and target in readable and not self._equal(name, target):
                problems.append(
                    f"{name}: tied to {target} by config.json, but not equal to it; if it was "
                    "trained on its own, say tie_word_embeddings: false in config.json"
                )
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")

    def validate_headers(
        self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None
    ) -> None:
        """As `validate`, without a look at the numbers.

        Raises:
            CheckpointError: naming every missing, extra, misshapen or wrongly typed tensor.
        """
        problems, _ = self._header_problems(expected, aliases or {})
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")

    def _header_problems(
        self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]
    ) -> tuple[list[str], list[str]]:
        """Return what is wrong, and the names of the expected tensors that are as they must be."""
        problems: list[str] = []
        if missing := sorted(expected.keys() - self.tensors.keys()):
            problems.append(f"missing: {first_names(missing)}{self._why_missing(missing)}")
        refused = self.extra({*expected, *aliases})
        for reason in dict.fromkeys(refused.values()):
            names = [name for name in refused if refused[name] == reason]
            problems.append(f"{reason}: {first_names(names)}")
        if ignored := sorted(self.tensors.keys() - expected.keys() - aliases.keys() - refused.keys()):
            logger.warning("%s: not used, as in transformers: %s", self.folder, first_names(ignored))
        readable: list[str] = []
        for name in expected:
            if name not in self.tensors:
                continue
            info = self.tensors[name]
            if info.dtype not in STORED:
                problems.append(f"{name}: dtype {info.dtype}, expected one of {', '.join(STORED)}")
            elif info.shape != expected[name]:
                problems.append(f"{name}: shape {list(info.shape)}, expected {list(expected[name])}")
            else:
                readable.append(name)
        unusual = [name for name in readable if self.tensors[name].dtype not in ("F32", "F16", "BF16")]
        if unusual:
            kinds = sorted({self.tensors[name].dtype for name in unusual})
            logger.warning(
                "%s: %s read into float32 as they are: %s", self.folder, ", ".join(kinds), first_names(unusual)
            )
        return problems, readable

    def _non_finite(self, name: str) -> int:
        """Count NaN and Inf of a tensor, or of the floats that a quantised one is made of."""
        linear = self.quantized.linears.get(name) if self.quantized is not None else None
        places = map(self.place, [name] if linear is None else linear.tensors.values())
        return sum(stored_tensors.count_non_finite(*place) for place in places if place[1].dtype in STORED)

    def _equal(self, name: str, other: str) -> bool:
        if self._is_quantized(name) or self._is_quantized(other):
            return torch.equal(self.tensor(name).float(), self.tensor(other).float())
        if stored_tensors.same_bytes(*self.place(name), *self.place(other)):
            return True
        return self.tensors[name].dtype in STORED and torch.equal(self.tensor(name).float(), self.tensor(other).float())

    def _why_missing(self, missing: Iterable[str]) -> str:
        """Return what explains missing tensors, in brackets; empty if nothing does."""
        for prefix, why in _WRAPPERS.items():
            if any(name.startswith(prefix) for name in self.tensors):
                return f" (the names begin with {prefix}: {why}; save the inner model)"
        if _SCORE in self.tensors and _HEAD in missing:
            return (
                " (but score.weight is there: a reward model or classifier; if it is one, say so in config.json, as in "
                '"architectures": ["Olmo2ForSequenceClassification"])'
            )
        if _SCORE in missing:
            return " (config.json says ForSequenceClassification; a language model has lm_head, and ForCausalLM there)"
        if list(missing) == [_HEAD]:
            return " (a base model without its head? if it is the embedding, say tie_word_embeddings in config.json)"
        return ""


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Locate a checkpoint, download it if it is on the Hub, and read the headers of its safetensors.

    Args:
        model: `demo`, a local folder, or a Hub id such as allenai/OLMo-2-0425-1B.
        revision: branch, tag or commit; Hub ids only.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision, or no weights in it.
        CheckpointError: a file is damaged or disguised.
        ConfigError: config.json says that it is something near, and no OLMo 2.
        UsageError: a revision for something that has none.
    """
    folder, name, kind = locate(model, revision)
    if revision is not None and kind != "hub":
        raise UsageError(f"--revision {revision}: only Hub ids have revisions, {model} is a {kind}")
    return _opened(folder, name, kind)


def open_headers(model: str, revision: str | None = None) -> Checkpoint:
    """Locate a checkpoint and read the headers of its safetensors; of one on the Hub no weights are downloaded.

    The tensors of what is not here cannot be read. Where its headers cannot be had, which is logged, it has none.
    Arguments and errors as `open_checkpoint`.
    """
    folder, name, kind = locate(model, revision, weights=False)
    if revision is not None and kind != "hub":
        raise UsageError(f"--revision {revision}: only Hub ids have revisions, {model} is a {kind}")
    index = read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    files = tuple(sorted(set(index.values()))) if index else (SINGLE,)
    if kind != "hub" or all((folder / file).exists() for file in files):
        return _opened(folder, name, kind)
    commit = folder.resolve().name
    tensors: dict[str, TensorInfo] = {}
    try:
        headers = remote_headers(name, commit, files)
    except CheckpointNotFoundError as error:
        logger.warning("%s; what is said follows from config.json alone", error)
        headers = {}
    for file, header in headers.items():
        for tensor, (dtype, shape) in header.items():
            if index.get(tensor, file) == file:
                row = stored_dtype(dtype)
                size = row.size if row else stored_tensors.integer_size(dtype)
                tensors[tensor] = TensorInfo(file, dtype, tuple(shape), 0, math.prod(shape) * size)
    found = Checkpoint(folder, name, kind, commit, files, _model_names(folder, tensors), {})
    return _with_linears(found, folder_place(folder).config)


def _opened(folder: Path, name: str, kind: SourceKind) -> Checkpoint:
    if lost := broken_link(folder / "config.json"):
        raise CheckpointNotFoundError(f"{folder}/config.json: {lost}")
    place = folder_place(folder)
    if not is_whole(folder):
        refuse_other_formats(place)
    refuse_other_forms(place.config, f"{folder}/config.json")
    single = (folder / SINGLE).exists() or (folder / SINGLE).is_symlink()
    index = {} if single else read_index(folder / INDEX)
    files = (SINGLE,) if single else tuple(sorted(set(index.values())))
    for file in files:
        _check_is_file(folder / file)
    stamps = {file: file_stamp(folder / file) for file in files}
    holders: dict[str, list[TensorInfo]] = {}
    for file in files:
        for tensor, info in stored_tensors.read_header(folder / file, file).items():
            holders.setdefault(tensor, []).append(info)
    found = Checkpoint(
        folder=folder,
        model=name,
        kind=kind,
        revision=folder.resolve().name if kind == "hub" else None,
        files=files,
        tensors=_model_names(
            folder, {tensor: _chosen(folder, tensor, found, index) for tensor, found in holders.items()}
        ),
        _stamps=stamps,
    )
    return _with_linears(found, place.config)


def _with_linears(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return a checkpoint whose quantised linears are tensors of it, in the place of what they are stored as."""
    folder, here = checkpoint.folder, checkpoint.is_here

    def read(name: str) -> np.ndarray:
        return stored_tensors.read_array(*checkpoint.place(name))

    def metadata() -> dict[str, str]:
        files = checkpoint.files if here else ()
        return {name: text for file in files for name, text in stored_tensors.read_metadata(folder / file).items()}

    found = find_quantized(folder, config, checkpoint.tensors, read if here else None, metadata)
    if found is None:
        return checkpoint
    logger.info("%s: %s", folder, found.title)
    if found.said:
        logger.warning("%s: %s: %s", folder, found.title, found.said)
    stored = {name for linear in found.linears.values() for name in (*linear.tensors.values(), *linear.unread)}
    packed = {name: info for name, info in checkpoint.tensors.items() if name in stored}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in stored}
    for name, linear in found.linears.items():
        if name in tensors:
            raise CheckpointError(f"{folder}: {name} is there as numbers and in few bits; remove what is not meant")
        parts = [packed[part] for part in linear.tensors.values()]
        tensors[name] = TensorInfo(parts[0].file, "F32", linear.shape, 0, sum(part.size for part in parts))
    return replace(checkpoint, tensors=tensors, quantized=found, _packed=packed)


def _check_is_file(path: Path) -> None:
    if path.is_file():
        return
    if path.exists():
        raise CheckpointError(f"{path}: not a file")
    if lost := broken_link(path):
        raise CheckpointNotFoundError(f"{path}: {lost}")
    raise CheckpointNotFoundError(f"{path.parent}: the index names {path.name}, which is not there; download it")


def _chosen(folder: Path, tensor: str, found: list[TensorInfo], index: Mapping[str, str]) -> TensorInfo:
    """Return the copy of a tensor that the index names; copies in other files must have the same bytes."""
    first = next((info for info in found if info.file == index.get(tensor)), found[0])
    for other in found:
        same = other is first or stored_tensors.same_bytes(folder / first.file, first, folder / other.file, other)
        if not same:
            raise CheckpointError(
                f"{folder}: {tensor} is both in {first.file} and in {other.file}, and they differ; download both "
                "again, or remove the old one"
            )
    return first


def _model_names(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return tensors by the names of Olmo2ForCausalLM: `model.` is added, or dropped, as transformers does."""
    if any(name.startswith(_PREFIX * 2) for name in tensors):
        renamed = {name.removeprefix(_PREFIX): info for name, info in tensors.items()}
    elif not any(name.startswith(_PREFIX) for name in tensors):
        renamed = {model_name(name): info for name, info in tensors.items()}
    else:
        return dict(tensors)
    if renamed.keys() != tensors.keys() and len(renamed) == len(tensors):
        logger.warning("%s: names lack %r or have it twice; read as in transformers", folder, _PREFIX)
        return renamed
    return dict(tensors)


def model_name(name: str) -> str:
    """Return the name that a tensor of the decoder alone has in the whole model: with `model.` before it."""
    return f"{_PREFIX * bool(_UNPREFIXED.match(name))}{name}"


def file_stamp(path: Path) -> tuple[int, int]:
    """Return what tells that a file was written to: size and time of the last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns

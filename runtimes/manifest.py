"""The package folder's contract between the exporter and the runners: manifest.json, typed. Standard library only.

    <package>/manifest.json         Manifest         what was exported: model, source, variants, and every file's hash
    <package>/trt/manifest.json     TrtManifest      TensorRT graphs and engines, made later by `olmo2-export build`

Both are sealed: `checksum` is the sha256 of the rest of the document, and the bytes on disk are exactly what
`seal` writes, so that a change of any byte of a manifest is refused. Every other file is vouched for by `files`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from runtimes.errors import IntegrityError, PackageError, PackageNotFoundError, VariantNotFoundError
from runtimes.sealed import FileEntry, read_sealed

MANIFEST_NAME = "manifest.json"
TRT_FOLDER = "trt"
PARITY_NAME = "parity.json"
_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """numpy's name, or `bfloat16`"""
    shape: tuple[int | str, ...]
    """fixed sizes as integers, dynamic ones by their symbol"""


@dataclass(frozen=True)
class KVCacheQuantization:
    """How keys and values are stored in fewer bits; the graph holds the same scales."""

    bits: int
    """8 or 4"""
    calibration_tokens: int
    scales: dict[str, str] = field(hash=False)
    """`N.key` and `N.value` of each layer N: float32 [num_key_value_heads, head_dim], little-endian, in base64"""


@dataclass(frozen=True)
class KVCacheSpec:
    """How a graph takes and gives its KV cache."""

    form: str
    """`concat`: present = past + new tokens, past of any length.
    `shared`: past and present are one buffer, of any length that holds them, written behind the tokens it holds.
    `static`: past and present are one buffer of max_cache_length, written at write_indices."""
    dtype: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    max_cache_length: int
    """tokens: for `concat` and `shared` the model's context, for `static` the capacity of the buffer"""
    quantization: KVCacheQuantization | None = None

    @property
    def stored_head_dim(self) -> int:
        """Elements of the last axis: two values of 4 bits share one."""
        return self.head_dim * self.quantization.bits // 8 if self.quantization else self.head_dim


@dataclass(frozen=True)
class QuantizedTensor:
    """How one weight is stored."""

    bits: int
    block_size: int
    """weights that share a scale; 0: a whole output channel"""
    symmetric: bool
    nmse: float
    """mean squared error / mean square of the weight"""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a variant were quantised."""

    recipe: str
    calibration: str | None
    """sha256 of the calibration text, for the recipes that take one"""
    bits_per_weight: float
    """scales and zero points included, over the tensors below"""
    tensors: dict[str, QuantizedTensor] = field(hash=False)
    """by the checkpoint's name"""
    input_scales: dict[str, float] = field(default_factory=dict, hash=False)
    """weight -> the step of that linear's input, where inputs are quantised with scales fixed by calibration"""


@dataclass(frozen=True)
class Quality:
    """What a graph costs in quality, measured when it was exported, against PyTorch in float32."""

    tokens: int
    """compared"""
    tokens_from: str
    """text | random ids"""
    kl_mean: float
    """nats per token"""
    kl_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float


@dataclass(frozen=True)
class PrefillGraph:
    """A second graph with the same inputs and outputs and the same KV cache, faster where a step has many rows."""

    graph: str
    data: tuple[str, ...]
    min_rows: int
    """tokens in a step, over all sequences, from which it is used"""
    quality: Quality
    min_onnxruntime: str | None = None
    """as the variant's"""


@dataclass(frozen=True)
class Variant:
    """One graph of a package, or two that share their KV cache."""

    name: str
    precision: str
    """of the weights: fp32, fp16, bf16, int8, int4, fp8"""
    graph: str
    """path of the ONNX file in the package"""
    data: tuple[str, ...]
    """paths of its external data"""
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv_cache: KVCacheSpec
    op_counts: dict[str, int] = field(hash=False)
    """the fused operators that were counted when the graph was made"""
    quantization: Quantization | None = None
    quality: Quality | None = None
    """of `graph`; None where the weights are not quantised"""
    prefill: PrefillGraph | None = None
    float32_islands: dict[str, str] = field(default_factory=dict, hash=False)
    """of a float16 graph: the tensors that stay float32, and why"""
    min_onnxruntime: str | None = None
    """the oldest onnxruntime that runs `graph`, as 1.24 or 1.23.1; None: format 3, which does not say"""

    @property
    def files(self) -> tuple[str, ...]:
        """Everything a runner opens."""
        prefill = (self.prefill.graph, *self.prefill.data) if self.prefill else ()
        return (self.graph, *self.data, *prefill)

    @property
    def top_k(self) -> int:
        """Candidates per row that the graph itself picks (outputs `top_ids` and `top_logits`); 0: it does not."""
        found = next((spec for spec in self.outputs if spec.name == "top_ids"), None)
        return int(found.shape[-1]) if found is not None else 0


@dataclass(frozen=True)
class ModelSpec:
    """The shape of the model, as far as runners need it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """tokens: the context limit"""


@dataclass(frozen=True)
class Source:
    """Where the weights came from."""

    model: str
    """Hub id, `demo`, or the name (not the path) of a local folder"""
    kind: str
    """hub | folder | demo"""
    revision: str | None
    """the resolved commit, for kind hub"""
    files: dict[str, FileEntry] = field(hash=False)
    """the safetensors files that were read"""


@dataclass(frozen=True)
class Manifest:
    """manifest.json of a package."""

    format_version: int
    exporter_version: str
    source: Source
    model: ModelSpec
    variants: dict[str, Variant] = field(hash=False)
    libraries: dict[str, str] = field(hash=False)
    """name -> version of what made the package, python among them"""
    files: dict[str, FileEntry] = field(hash=False)
    """path in the package -> what it must be; all files but this one, parity.json and trt/"""


@dataclass(frozen=True)
class ProfileRange:
    """One input's shapes in an optimization profile."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """One serialised TensorRT plan: native code for one TensorRT version and the listed GPUs."""

    name: str
    plan: str
    """path in the package"""
    variant: str
    """the TensorRT graph it was compiled from"""
    precision: str
    backend: str
    """trt_rtx | trt"""
    backend_version: str
    compute_capabilities: tuple[str, ...]
    """as in 8.9"""
    profile: str
    """latency: batch 1, weights laid out for single tokens too; compact: weights once"""
    profiles: dict[str, tuple[ProfileRange, ...]] = field(hash=False)
    """in the order of the plan's profile indices: decode, prefill"""
    max_batch_size: int
    max_cache_length: int
    prefill_chunk: int
    """tokens per row and prefill call"""
    flags: tuple[str, ...]
    """what it was built with: portable, refit, weight_streaming; sorted"""
    layer_counts: dict[str, int] = field(hash=False)
    """layers of the TensorRT network that were counted before the build"""
    aliases: dict[str, str] = field(hash=False)
    """present -> past: outputs that must be bound to the memory of that input"""
    kernels: dict[str, int] = field(default_factory=dict, hash=False)
    """profile -> kernels that a step launches, as the plan's text says; empty where that cannot be read"""


@dataclass(frozen=True)
class TrtManifest:
    """trt/manifest.json of a package; all paths are relative to the package."""

    format_version: int
    exporter_version: str
    package_checksum: str
    """the `checksum` of the manifest.json this was built from"""
    variants: dict[str, Variant] = field(hash=False)
    engines: dict[str, Engine] = field(hash=False)
    files: dict[str, FileEntry] = field(hash=False)


def to_document(manifest: Manifest | TrtManifest) -> dict[str, Any]:
    """Return the JSON form of a manifest, ready for `seal`."""
    return asdict(manifest)


def load_manifest(package: str | os.PathLike[str]) -> Manifest:
    """Read and check `<package>/manifest.json`; `runtimes.package.open_package` does so for all that a package says.

    Raises:
        PackageNotFoundError: no such folder, or no manifest in it.
        IntegrityError: the manifest was changed.
    """
    return read_manifest(Path(package))[0]


def load_trt_manifest(package: str | os.PathLike[str]) -> TrtManifest | None:
    """Read and check `<package>/trt/manifest.json`; None if nothing was built yet.

    Raises:
        IntegrityError: the manifest was changed, or was built from another export than the one in the folder.
    """
    return read_trt_manifest(Path(package))


def read_manifest(package: Path) -> tuple[Manifest, str]:
    """Return manifest.json and its checksum, which identifies the whole export; `load_manifest` says what it raises."""
    document = _read(package, MANIFEST_NAME)
    return _parse(package / MANIFEST_NAME, _manifest, document), str(document["checksum"])


def read_trt_manifest(package: Path, checksum: str | None = None) -> TrtManifest | None:
    """Return trt/manifest.json; `load_trt_manifest` says what it raises.

    Args:
        package: the package folder.
        checksum: of the export that it must be built from; None means the one in the folder.
    """
    path = package / TRT_FOLDER / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = _parse(path, _trt_manifest, _read(package, f"{TRT_FOLDER}/{MANIFEST_NAME}"))
    if manifest.package_checksum != (checksum or package_checksum(package)):
        raise IntegrityError(
            f"{path}: built from another export than {MANIFEST_NAME} beside it; run: olmo2-export build {package}"
        )
    return manifest


def package_checksum(package: Path) -> str:
    """Return the checksum of the package's manifest as it is now, which identifies the whole export."""
    return str(_read(package, MANIFEST_NAME)["checksum"])


def read_verdicts(package: Path, checksum: str) -> dict[str, bool]:
    """Return what parity.json says of an export, by its checksum: variant -> whether it passed every gate.

    It is a report and no part of the contract: where it is not there, damaged or of another export, it says nothing.
    """
    try:
        document = read_sealed(package / PARITY_NAME)
        known = document["package_checksum"] == checksum
        return {str(name): entry["passed"] is True for name, entry in document["variants"].items()} if known else {}
    except (OSError, PackageError, KeyError, TypeError, AttributeError):
        return {}


def find_variant(package: str | os.PathLike[str], name: str | None) -> tuple[Variant, dict[str, FileEntry]]:
    """Return a variant, of the export or of the TensorRT graphs, and the files table that vouches for it.

    Args:
        package: the package folder.
        name: the variant; None means the only or first one of the export.

    Raises:
        VariantNotFoundError: naming the variants there are.
    """
    manifest = load_manifest(package)
    if name is None:
        name = next(iter(manifest.variants), "")
    if name in manifest.variants:
        return manifest.variants[name], manifest.files
    trt = load_trt_manifest(package)
    if trt is not None and name in trt.variants:
        return trt.variants[name], trt.files
    known = [*manifest.variants, *(trt.variants if trt else ())]
    raise VariantNotFoundError(f"{package}: no variant {name!r}; it has {', '.join(known) or 'none'}")


def _read(package: Path, name: str) -> dict[str, Any]:
    path = package / name
    if not package.is_dir():
        raise PackageNotFoundError(
            f"{package}: no such folder; make a package with: olmo2-export export MODEL --out DIR"
        )
    if not path.is_file():
        raise PackageNotFoundError(
            f"{package}: not a package (no {name}); make one with: olmo2-export export MODEL --out DIR"
        )
    return read_sealed(path)


def _parse(path: Path, parse: Callable[[Mapping[str, Any]], _T], document: Mapping[str, Any]) -> _T:
    try:
        manifest = parse(document)
        _check_types(manifest, type(manifest), "manifest")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PackageError):
            raise
        version = document["format_version"]
        raise PackageError(f"{path}: not the fields of format {version} ({error}); export it again") from error
    return manifest


def _check_types(value: object, hint: Any, where: str) -> None:
    """Check a value against its annotation, all the way down; every integer of a manifest is a size or a count.

    Raises:
        TypeError: naming the field.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        for entry in fields(hint):
            _check_types(getattr(value, entry.name), hints[entry.name], f"{where}.{entry.name}")
    elif kind is dict and isinstance(value, dict):
        for key, item in value.items():
            _check_types(key, arguments[0], where)
            _check_types(item, arguments[1], f"{where}[{key}]")
    elif kind is tuple and isinstance(value, tuple):
        for item in value:
            _check_types(item, arguments[0], where)
    elif kind is UnionType:
        if type(value) not in arguments:
            raise TypeError(f"{where} is {value!r}")
        if is_dataclass(type(value)):
            _check_types(value, type(value), where)
    elif type(value) is not hint or (hint is int and value < 0):  # type: ignore[operator]  # an int here
        raise TypeError(f"{where} is {value!r}")


def _manifest(document: Mapping[str, Any]) -> Manifest:
    source = document["source"]
    return Manifest(
        format_version=document["format_version"],
        exporter_version=document["exporter_version"],
        source=Source(source["model"], source["kind"], source["revision"], _files(source["files"])),
        model=ModelSpec(**document["model"]),
        variants={name: _variant(v) for name, v in document["variants"].items()},
        libraries=dict(document["libraries"]),
        files=_files(document["files"]),
    )


def _trt_manifest(document: Mapping[str, Any]) -> TrtManifest:
    manifest = TrtManifest(
        format_version=document["format_version"],
        exporter_version=document["exporter_version"],
        package_checksum=document["package_checksum"],
        variants={name: _variant(v) for name, v in document["variants"].items()},
        engines={name: _engine(e) for name, e in document["engines"].items()},
        files=_files(document["files"]),
    )
    for engine in manifest.engines.values():
        if engine.plan not in manifest.files:
            raise ValueError(f"plan {engine.plan!r} is not among its files")
    return manifest


def _files(table: Mapping[str, Any]) -> dict[str, FileEntry]:
    for name in table:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise PackageError(f"manifest: file name {name!r} leads out of the package")
    return {name: FileEntry(**entry) for name, entry in table.items()}


def _variant(document: Mapping[str, Any]) -> Variant:
    def tensors(specs: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in specs)

    quantization, quality, prefill = document["quantization"], document["quality"], document["prefill"]
    cache = document["kv_cache"]
    if cache["quantization"] is not None:
        cache = {**cache, "quantization": KVCacheQuantization(**cache["quantization"])}
    if quantization is not None:
        by_name = {name: QuantizedTensor(**entry) for name, entry in quantization["tensors"].items()}
        quantization = Quantization(**{**quantization, "tensors": by_name})
    for graph in (document, prefill or {}):
        if re.fullmatch(r"\d+(\.\d+){1,2}", graph.get("min_onnxruntime") or "0.0") is None:
            raise ValueError(f"min_onnxruntime is {graph['min_onnxruntime']!r}")
    if prefill is not None:
        prefill = PrefillGraph(**{**prefill, "data": tuple(prefill["data"]), "quality": Quality(**prefill["quality"])})
    return Variant(
        **{
            **document,
            "data": tuple(document["data"]),
            "inputs": tensors(document["inputs"]),
            "outputs": tensors(document["outputs"]),
            "kv_cache": KVCacheSpec(**cache),
            "quantization": quantization,
            "quality": None if quality is None else Quality(**quality),
            "prefill": prefill,
        }
    )


def _engine(document: Mapping[str, Any]) -> Engine:
    profiles = {
        name: tuple(ProfileRange(r["name"], tuple(r["min"]), tuple(r["opt"]), tuple(r["max"])) for r in ranges)
        for name, ranges in document["profiles"].items()
    }
    return Engine(
        **{
            **document,
            "profiles": profiles,
            "compute_capabilities": tuple(document["compute_capabilities"]),
            "flags": tuple(document["flags"]),
        }
    )

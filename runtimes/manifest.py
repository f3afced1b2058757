"""The package folder's contract between the exporter and the runners: manifest.json, typed. Standard library only.

    <package>/manifest.json         Manifest         what was exported: model, source, variants, and every file's hash
    <package>/trt/manifest.json     TrtManifest      TensorRT graphs and engines, made later by `olmo2-export build`

Both are sealed: `checksum` is the sha256 of the rest of the document, and the bytes on disk are exactly what
`seal` writes, so that a change of any byte of a manifest is refused. Every other file is vouched for by `files`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

from runtimes.errors import PackageError, UsageError, first_names
from runtimes.sealed import FileEntry

MANIFEST_NAME = "manifest.json"
TRT_FOLDER = "trt"
PARITY_NAME = "parity.json"
EMBEDDINGS = "inputs_embeds"
"""the name of the input of that role"""
LORA_A, LORA_B = ".lora_A", ".lora_B"
"""how the names of inputs of these roles end, behind that of the module"""
HIDDEN_STATES = "hidden_states"
"""the name of an output of that role begins so, and ends in its number"""

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int64", "int8", "uint8"]
"""numpy's name, or `bfloat16`"""

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
"""of the weights"""
OLDEST_GPU: dict[Precision, str] = {
    "fp32": "7.5",
    "fp16": "7.5",
    "bf16": "8.0",
    "int8": "8.0",
    "int4": "8.0",
    "fp8": "8.9",
}
"""compute capability from which TensorRT computes with such weights"""

EngineBackend: TypeAlias = Literal["trt_rtx", "trt"]
"""what an engine is compiled by, and runs on: TensorRT for RTX, or full TensorRT"""

CacheForm: TypeAlias = Literal["concat", "shared", "static"]
"""`concat`: present = past + new tokens, past of any length.
`shared`: past and present are one buffer, of any length that holds them, written behind the tokens it holds.
`static`: past and present are one buffer of max_cache_length, written at write_indices."""

SourceKind: TypeAlias = Literal["hub", "folder", "demo"]
TokensFrom: TypeAlias = Literal["text", "random ids"]
Task: TypeAlias = Literal["language-model", "sequence-classification"]
EngineFlag: TypeAlias = Literal["portable", "refit", "weight_streaming"]

Role: TypeAlias = Literal[
    "token_ids",
    "embeddings",
    "attention_mask",
    "position_ids",
    "write_indices",
    "logit_index",
    "logit_count",
    "past",
    "lora_a",
    "lora_b",
    "logits",
    "candidate_ids",
    "candidate_logits",
    "score",
    "hidden_state",
    "present",
]
"""what an input or output is for; runners go by it and not by the name.
`embeddings`: a vector for each new token, which takes the place of its embedding where its id is negative.
`lora_a` and `lora_b`: an adapter's matrices for a linear, by default of rank 0.
`logit_index`: which new token of a row gets logits; `logit_count`: how many of the last ones do.
`candidate_ids` and `candidate_logits`: the likeliest next tokens, picked by the graph.
`hidden_state`: vectors of the new tokens; the output hidden_states.N has those of number N, see `ModelSpec`.
`score`: what a classifier says of each row, read from one of the tokens of the call; such a graph has no logits.
`past` and `present`: the KV cache before and after; they go together by name, past_key_values.N.key and
present.N.key."""

_ROLES: dict[str, Role] = {
    "input_ids": "token_ids",
    EMBEDDINGS: "embeddings",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "write_indices": "write_indices",
    "logit_index": "logit_index",
    "num_logits_to_keep": "logit_count",
    "logits": "logits",
    "top_ids": "candidate_ids",
    "top_logits": "candidate_logits",
    "score": "score",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]
    """fixed sizes as integers, dynamic ones by their symbol"""
    role: Role


@dataclass(frozen=True)
class KVCacheQuantization:
    """How keys and values are stored in fewer bits; the graph holds the same scales."""

    bits: Literal[8, 4]
    calibration_tokens: int
    scales: dict[str, str] = field(hash=False)
    """`N.key` and `N.value` of each layer N: float32 [num_key_value_heads, head_dim], little-endian, in base64"""


@dataclass(frozen=True)
class KVCacheSpec:
    """How a graph takes and gives its KV cache."""

    form: CacheForm
    dtype: Dtype
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    max_cache_length: int
    """tokens: for `concat` and `shared` the model's context, for `static` the capacity of the buffer"""
    quantization: KVCacheQuantization | None = None
    windows: tuple[int, ...] = ()
    """tokens that each layer sees and keeps, the present one among them, 0: all; empty: every layer keeps all, also one
    with a window. The runner gives back keys and values that no later token sees, some hundred tokens late"""

    @property
    def name(self) -> str:
        """What keys and values are stored in, as users name it: float32, int8, ..."""
        return f"int{self.quantization.bits}" if self.quantization else self.dtype

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
    tokens_from: TokensFrom
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
class PortableGraph:
    """The same weights in a graph that other runtimes load; our runners do not open it.

    Its rows may be padded on either side, and present is past + new tokens, in float32, or past and present are one
    buffer.
    """

    graph: str
    """path of the ONNX file in the package; its weights are in the variant's `data`"""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class OtherCache:
    """The same weights in graphs with another KV cache than the variant's own, which is the default; a choice at run
    time. The fields are the variant's."""

    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv_cache: KVCacheSpec
    quality: Quality | None = None
    prefill: PrefillGraph | None = None
    min_onnxruntime: str | None = None
    missed: tuple[str, ...] = ()
    """the limits of the variant's quality gate that it broke, in words: why it is not the default"""


@dataclass(frozen=True)
class Variant:
    """One graph of a package, or two that share their KV cache; and the same for each other cache that it can have."""

    name: str
    precision: Precision
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
    portable: PortableGraph | None = None
    """for other runtimes; None: `graph` itself, or in a package from before there was one"""
    other_caches: tuple[OtherCache, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Everything a runner opens, whichever KV cache it is given."""
        return tuple(dict.fromkeys(name for entry in self.each_graph for name in (entry.graph, *entry.data)))

    @property
    def each_graph(self) -> tuple[Variant | PrefillGraph, ...]:
        """The graphs that a runner opens, of every KV cache, the default first."""
        found: list[Variant | PrefillGraph] = []
        for own in self.each_cache:
            found += [own] if own.prefill is None else [own, own.prefill]
        return tuple(found)

    @property
    def each_cache(self) -> tuple[Variant, ...]:
        """The variant with each of its KV caches alone, the default first."""
        choices = ({entry.name: getattr(other, entry.name) for entry in _OF_CACHES} for other in self.other_caches)
        return (replace(self, other_caches=()), *(replace(self, other_caches=(), **choice) for choice in choices))

    def with_cache(self, name: str | None) -> Variant:
        """Return the variant with one of its KV caches alone.

        Args:
            name: as `KVCacheSpec.name`; None: the default.

        Raises:
            UsageError: it has no such cache.
        """
        caches = {own.kv_cache.name: own for own in self.each_cache}
        if name is None:
            return next(iter(caches.values()))
        if name not in caches:
            raise UsageError(
                f"KV cache {name}: variant {self.name} has {', '.join(caches)}; choose one of these, or export it again"
            )
        return caches[name]

    def data_of(self, graph: str) -> str:
        """Return the name, without folders, of the file that holds a graph's weights; the graph's own with `_data`,
        unless this variant says otherwise."""
        found = [
            PurePosixPath(name).name
            for entry in self.each_graph
            for name in entry.data
            if PurePosixPath(entry.graph).name == graph
        ]
        return found[0] if found else f"{graph}_data"

    @property
    def answer(self) -> Role:
        """The role of what the model says: `logits`, or of a classifier `score`."""
        return "score" if any(spec.role == "score" for spec in self.outputs) else "logits"

    @property
    def top_k(self) -> int:
        """Candidates per row that the graph itself picks (outputs `top_ids` and `top_logits`); 0: it does not."""
        found = next((spec for spec in self.outputs if spec.role == "candidate_ids"), None)
        return int(found.shape[-1]) if found is not None else 0

    @property
    def caches(self) -> dict[str, str]:
        """The KV cache: the name of each input of role past -> that of the output of role present that follows it."""
        return {spec.name: _present(spec.name) for spec in self.inputs if spec.role == "past"}

    @property
    def results(self) -> dict[str, TensorSpec]:
        """What a step computes: the outputs, by name, without the KV cache."""
        return {spec.name: spec for spec in self.outputs if spec.role != "present"}

    @property
    def hidden_states(self) -> dict[int, str]:
        """The hidden states that the graph gives: number -> name of the output."""
        names = [spec.name for spec in self.outputs if spec.role == "hidden_state"]
        return {int(name.rpartition(".")[2]): name for name in names}

    def name_of(self, role: Role) -> str:
        """Return the name of the one input or output that has a role.

        Raises:
            PackageError: there is none, or several.
        """
        found = [spec.name for spec in (*self.inputs, *self.outputs) if spec.role == role]
        if len(found) != 1:
            raise PackageError(
                f"variant {self.name}: {first_names(found) or 'no input or output'} of role {role}, expected one; "
                "export the package again"
            )
        return found[0]


_OF_CACHES = [entry for entry in fields(OtherCache) if entry.name != "missed"]


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
    task: Task = "language-model"
    """sequence-classification: a classifier or reward model, which gives scores and no logits"""
    labels: tuple[str, ...] = ()
    """of a classifier: what each of its scores is of"""
    pad_token_id: int | None = None
    """of a classifier: the last token that is none of these is scored; None: the last token"""
    hidden_states: tuple[int, ...] = ()
    """those that the graphs give, too, as `hidden_states.N`: 0 the embedding, N what layer N gives, counted from 1,
    num_hidden_layers what the last norm gives"""
    inputs_embeds: bool = False
    """the graphs take vectors in the place of tokens, as `inputs_embeds`"""


@dataclass(frozen=True)
class AdapterSource:
    """A LoRA adapter, and where it came from."""

    name: str
    model: str
    """Hub id, or the name (not the path) of a local folder"""
    kind: SourceKind
    revision: str | None
    """the resolved commit, for kind hub"""
    base: str | None
    """the model that it says it was trained on"""
    files: dict[str, FileEntry] = field(hash=False)
    """its config and its tensors"""


@dataclass(frozen=True)
class Source:
    """Where the weights came from."""

    model: str
    """Hub id, `demo`, or the name (not the path) of a local folder"""
    kind: SourceKind
    revision: str | None
    """the resolved commit, for kind hub"""
    files: dict[str, FileEntry] = field(hash=False)
    """the safetensors files that were read"""
    adapters: tuple[AdapterSource, ...] = ()
    """merged into the weights, in this order"""
    quantized: str | None = None
    """the format in which its linears were stored in few bits, in words; None: they were plain numbers"""


@dataclass(frozen=True)
class SwitchableAdapter:
    """A LoRA adapter that runners may use or not, for each sequence."""

    file: str
    """path in the package: onnxruntime's own format"""
    source: AdapterSource


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
    adapters: dict[str, SwitchableAdapter] = field(default_factory=dict, hash=False)
    """by name, in the order in which they were given"""


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
    precision: Precision
    backend: EngineBackend
    backend_version: str
    compute_capabilities: tuple[str, ...]
    """as in 8.9"""
    profile: Literal["latency", "compact"]
    """latency: batch 1, weights laid out for single tokens too; compact: weights once"""
    profiles: dict[str, tuple[ProfileRange, ...]] = field(hash=False)
    """in the order of the plan's profile indices: decode, prefill"""
    max_batch_size: int
    max_cache_length: int
    prefill_chunk: int
    """tokens per row and prefill call"""
    flags: tuple[EngineFlag, ...]
    """what it was built with; sorted"""
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


def role_of(name: str) -> Role | None:
    """Return the role that a name has in our graphs; None: it says nothing. So manifests without roles are read."""
    if name.startswith("past_key_values."):
        return "past"
    if name.startswith(f"{HIDDEN_STATES}."):
        return "hidden_state"
    return "present" if name.startswith("present.") else _ROLES.get(name)


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")

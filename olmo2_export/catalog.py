"""The variants that this exporter makes, a row each, and the ways to store weights and KV caches that they use.

| variant  | graph    | runs on        | weights                   | activations and cache |
|----------|----------|----------------|---------------------------|-----------------------|
| fp32     | portable | CPUs           | float32                   | float32               |
| q4, q8   | blocks   | CPUs           | blocks of 4 or 8 bits     | float32               |
| fp16     | device   | GPUs           | float16                   | float16               |
| bf16     | device   | GPUs           | bfloat16                  | bfloat16              |
| q4f16    | device   | GPUs           | blocks of 4 bits          | float16               |
| trt_*    | static   | TensorRT       | as the name says          | float32, float16 in   |
|          |          |                |                           | these, else bfloat16  |

What a verb offers, which gate a variant must pass, what it is drawn in, what it is compared with: all of it is asked
here, and `VARIANTS` is read at each call. How fast a variant is beside the others is `runtimes.targets`' to say, which
runs packages without this half. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from runtimes.errors import UsageError, VariantNotFoundError
from runtimes.manifest import OLDEST_GPU, CacheForm, Dtype, Precision

Graph: TypeAlias = Literal["portable", "blocks", "device", "static"]
"""portable: standard operators. blocks: a shared cache and quantised weights, float32 between. device: a shared cache,
all of it in 16 bits. static: what TensorRT compiles"""

BLOCK_SIZES = (32, 64, 128)
DISTILL_STEPS = 150
"""of training, where none are asked for"""
"""that can be asked for"""
HELD_BLOCKS = (16, 32, 64, 128, 256)
"""that the kernels of MatMulNBits read; a quantised checkpoint is imported into these"""


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is quantised in blocks."""

    bits: int
    """4 | 8"""
    block_size: int
    """columns that share a scale: one of `HELD_BLOCKS`"""
    symmetric: bool
    """no stored zero points: each is 2^(bits - 1)"""
    positive: bool = False
    """no scale is negative, as TensorRT demands; symmetric formats alone have a choice"""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block_size not in HELD_BLOCKS:
            raise UsageError(
                f"{self.bits} bits in blocks of {self.block_size}: a format has 4 or 8 bits "
                f"and blocks of {', '.join(map(str, HELD_BLOCKS))}"
            )

    @property
    def bits_per_weight(self) -> float:
        """Codes, float32 scales and packed zero points, where K is a multiple of the block and N x blocks is even."""
        return self.bits + (32 + (0 if self.symmetric else self.bits)) / self.block_size

    @property
    def top(self) -> int:
        """the largest code"""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """the zero point of the symmetric form"""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """Return the blocks of a row; the last may be partly padding."""
        return -(-columns // self.block_size)

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the exact bytes of a quantised [rows, columns] matrix."""
        blocks = self.blocks(columns)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.block_size * self.bits // 8 + 4) + zero_points)


Q4 = BlockFormat(bits=4, block_size=128, symmetric=True)
Q4_EMBEDDING = BlockFormat(bits=4, block_size=32, symmetric=False)
"""finer blocks cost a gather nothing"""
Q8 = BlockFormat(bits=8, block_size=64, symmetric=True)
"""128 would be smaller by 3 %, but the kernels round activations in the same blocks, and 8 bits show that"""


@dataclass(frozen=True)
class QualityGate:
    """The limits of what quantising may cost; each must hold."""

    kl_mean: float
    """most: nats per token"""
    kl_p99: float | None
    top1: float
    """least: share of positions"""
    perplexity_rise: float
    """most: relative"""


Gates: TypeAlias = tuple[QualityGate, QualityGate]
"""of a small model and of a large one (over 100 M weights)"""

_INT8: Gates = (QualityGate(2e-4, None, 0.99, 0.001), QualityGate(0.003, None, 0.97, 0.003))
_INT4: Gates = (QualityGate(0.01, 0.08, 0.93, 0.01), QualityGate(0.03, None, 0.91, 0.02))
# W8A8 rounds activations to bfloat16 and to 8 bits besides weights to 8: its gates are the sum of those of
# bfloat16 and of int8. float8e4m3fn keeps 4 bits of a number where int8 keeps up to 7: fp8 must cost less than the best
# recipe of 4 bits does (GPTQ on the demo: KL 3.2e-3, 95.9 %).
_INT8_W8A8: Gates = (QualityGate(4e-4, None, 0.975, 0.003), QualityGate(0.0035, None, 0.955, 0.005))
_FP8_W8A8: Gates = (QualityGate(0.0025, 0.02, 0.96, 0.004), QualityGate(0.008, None, 0.945, 0.01))


@dataclass(frozen=True)
class WeightFormat:
    """One way to store the weights of a variant."""

    precision: Precision
    """as the manifest says it"""
    bits: int
    """of a code"""
    layout: Literal["plain", "blocks", "channel"]
    """what shares a scale; plain: nothing, as the weights are not quantised"""
    codes: str
    """dtype of the codes, as the manifest names it; uint8 holds packed ones"""
    inputs: str | None = None
    """dtype to which the inputs of its products are rounded, with scales from calibration; None: they are not"""
    kept: tuple[str, ...] = ()
    """linears that are not quantised; of those for TensorRT, the embedding never is"""
    merged: bool = False
    """products of one input are concatenated in a graph for TensorRT"""
    recipes: tuple[str, ...] = ()
    """the recipes that a graph for TensorRT can be given, where there is a choice"""
    recipe: str | None = None
    """the default one, and what the manifest says where there is no choice"""
    on_older: str | None = None
    """the precision to build for GPUs before that"""
    gates: Gates | None = None
    """of a quantised format"""
    score_error: float = 0.25
    """most RMS error of a classifier's scores, and of hidden states, / their standard deviation over texts"""

    @property
    def quantized(self) -> bool:
        """Whether weights are codes and scales."""
        return self.layout != "plain"

    @property
    def oldest_gpu(self) -> str:
        """Compute capability from which TensorRT computes in it."""
        return OLDEST_GPU[self.precision]


# score_error: of three random heads on the trained demo, 48 texts: q8 0.011, q4 0.085; of its hidden states as much.
# The limits are three to five times that, as larger models lose less. With random weights, where rounding costs most
# and which miss the other gates of quality too: bf16 0.015, fp16 0.002, q8 0.04, q4 0.5.
FLOAT32 = WeightFormat("fp32", 32, "plain", "float32", score_error=1e-4)
FLOAT16 = WeightFormat("fp16", 16, "plain", "float16", score_error=0.02)
BFLOAT16 = WeightFormat("bf16", 16, "plain", "bfloat16", on_older="fp16", score_error=0.1)
INT4_BLOCKS = WeightFormat("int4", 4, "blocks", "uint8", gates=_INT4)
INT8_BLOCKS = WeightFormat("int8", 8, "blocks", "uint8", gates=_INT8, score_error=0.05)
# Activations are bfloat16 in all that TensorRT has quantised; fp8 needs arithmetic of its own.
TRT_INT4 = WeightFormat(
    "int4",
    4,
    "blocks",
    "int4",
    merged=True,
    recipes=("rtn", "search", "gptq"),
    recipe="search",
    on_older="fp16",
    gates=_INT4,
)
TRT_INT8 = WeightFormat(
    "int8",
    8,
    "channel",
    "int8",
    inputs="int8",
    kept=("mlp.down_proj", "lm_head"),
    recipe="w8a8",
    on_older="fp16",
    gates=_INT8_W8A8,
)
TRT_FP8 = WeightFormat(
    "fp8",
    8,
    "channel",
    "float8e4m3fn",
    inputs="float8e4m3fn",
    kept=("lm_head",),
    merged=True,
    recipe="w8a8",
    on_older="int8",
    gates=_FP8_W8A8,
)


@dataclass(frozen=True)
class KVCacheFormat:
    """One way to store keys and values."""

    name: str
    """as `KVCacheSpec.name`"""
    bits: Literal[8, 4] | None
    """None: it is not quantised"""
    dtype: Dtype
    written: bool = False
    """where none is named"""
    preferred: bool = False
    """runners take it where none is named, if it passes the gate of the variant"""


KV_CACHES = (
    KVCacheFormat("float32", None, "float32", written=True),
    KVCacheFormat("int8", 8, "int8", written=True, preferred=True),
    KVCacheFormat("int4", 4, "uint8"),  # two values in one
)
"""of those that a variant has, the first is the default, unless a preferred one passes"""


@dataclass(frozen=True)
class QuantizationDefaults:
    """How a variant with weights in blocks is made where the options do not say."""

    recipe: str
    form: BlockFormat
    """of the layers' weights"""
    embedding: BlockFormat | None
    """None, in graphs for devices alone: it is not quantised"""
    head: BlockFormat
    size_budget: float
    """bits per weight, for the recipes that choose"""
    rounded_blocks: tuple[str, ...] = ()
    """linears that stay in blocks in the prefill graph, because their inputs have outliers in most columns"""


@dataclass(frozen=True)
class VariantRow:
    """One variant that can be made."""

    name: str
    graph: Graph
    targets: tuple[str, ...]
    """of `runtimes.targets`: those that it is made for"""
    form: CacheForm
    """of the KV cache"""
    dtype: Dtype
    """of activations, and of a KV cache that is not quantised"""
    weights: WeightFormat
    colour: str
    """in every figure of every report"""
    defaults: QuantizationDefaults | None = None
    """of weights in blocks for onnxruntime"""
    prefill_graph: bool = False
    """it has a second graph for prompts, unless that is not wanted or misses its gate"""
    quantized_cache: bool = False
    """it can be written with each of `KV_CACHES`"""
    peers: Mapping[str, str] = field(default_factory=dict, hash=False)
    """peer of `bench` -> what it runs whose weights have as many bits; of transformers a dtype"""
    suffix: str = ""
    """of the file that transformers.js opens for this dtype, where it is not the name"""

    @property
    def path(self) -> str:
        """Of the graph that our runners open, in the package, its KV cache not quantised."""
        match self.graph:
            case "portable":
                return "onnx/model.onnx"
            case "static":
                return f"trt/model_{self.weights.precision}.onnx"
            case "blocks":
                return f"onnx/model_{self.name}_shared.onnx"
            case "device":
                return f"onnx/model_{self.name}.onnx"

    @property
    def prefill_path(self) -> str:
        """Of its second graph, where it has one."""
        return f"onnx/model_{self.name}_prefill.onnx"

    def with_cache(self, path: str, cache: KVCacheFormat) -> str:
        """Return the path of the graph with another KV cache, of one of the two above."""
        return path if cache.bits is None else f"{path.removesuffix('.onnx')}_kv_{cache.name}.onnx"

    @property
    def portable_path(self) -> str:
        """Of the graph that other runtimes open."""
        return f"onnx/model_{self.suffix or self.name}.onnx" if self.graph == "blocks" else self.path

    @property
    def data(self) -> str:
        """Of the weights of both: a browser looks for the name of the graph that it opens."""
        return f"{self.portable_path}_data"


_STATIC: tuple[tuple[WeightFormat, Dtype, str], ...] = (
    (BFLOAT16, "bfloat16", "#c774e8"),
    (FLOAT16, "float16", "#ef6f9b"),
    (FLOAT32, "float32", "#3fa7d6"),
    (TRT_INT4, "bfloat16", "#f2a13c"),
    (TRT_INT8, "bfloat16", "#4fbf7b"),
    (TRT_FP8, "bfloat16", "#5bb8b0"),
)
"""weights, activations and colour of the graphs for TensorRT"""

VARIANTS: tuple[VariantRow, ...] = (
    VariantRow(
        name="fp32",
        graph="portable",
        targets=("cpu",),
        form="concat",
        dtype="float32",
        weights=FLOAT32,
        colour="#2f7ed8",
        peers={"transformers": "float32", "optimum-onnx": "fp32"},
    ),
    VariantRow(
        name="q4",
        graph="blocks",
        targets=("cpu",),
        form="shared",
        dtype="float32",
        weights=INT4_BLOCKS,
        colour="#e07b00",
        # Blocks of 128 because the kernels read them fastest; see docs/variants.md for what each choice costs.
        defaults=QuantizationDefaults("search", Q4, Q4_EMBEDDING, Q4_EMBEDDING, size_budget=4.8),
        prefill_graph=True,
        quantized_cache=True,
        peers={"llama.cpp": "Q4_K_M", "onnxruntime-genai": "int4", "openvino-genai": "int4"},
    ),
    VariantRow(
        name="q8",
        graph="blocks",
        targets=("cpu",),
        form="shared",
        dtype="float32",
        weights=INT8_BLOCKS,
        colour="#1a9850",
        defaults=QuantizationDefaults("search", Q8, Q8, Q8, size_budget=8.5, rounded_blocks=("mlp.down_proj",)),
        prefill_graph=True,
        quantized_cache=True,
        peers={"llama.cpp": "Q8_0"},
        suffix="quantized",
    ),
    VariantRow(
        name="fp16",
        graph="device",
        targets=("cuda", "nv-rtx"),
        form="shared",
        dtype="float16",
        weights=FLOAT16,
        colour="#d6336c",
        peers={"transformers": "bfloat16", "llama.cpp": "F16"},
    ),
    VariantRow(
        name="bf16",
        graph="device",
        targets=("cuda", "nv-rtx"),
        form="shared",
        dtype="bfloat16",
        weights=BFLOAT16,
        colour="#a24bd0",
        peers={"transformers": "bfloat16", "llama.cpp": "F16"},
    ),
    VariantRow(
        name="q4f16",
        graph="device",
        targets=("cuda", "nv-rtx"),
        form="shared",
        dtype="float16",
        weights=INT4_BLOCKS,
        colour="#b8860b",
        defaults=QuantizationDefaults("search", Q4, None, Q4_EMBEDDING, size_budget=4.8),
        peers={"llama.cpp": "Q4_K_M", "onnxruntime-genai": "int4", "openvino-genai": "int4"},
    ),
    *(
        VariantRow(
            name=f"trt_{weights.precision}",
            graph="static",
            targets=("trt_rtx", "trt"),
            form="static",
            dtype=dtype,
            weights=weights,
            colour=colour,
        )
        for weights, dtype, colour in _STATIC
    ),
)
"""in the order in which they are explained"""


def names(*graphs: Graph) -> list[str]:
    """Return the names of all variants, or of those with such a graph."""
    return [row.name for row in VARIANTS if not graphs or row.graph in graphs]


def exported(has: Callable[[VariantRow], object] | None = None) -> list[str]:
    """Return the names of what `export` writes, or of those whose row has something; `build` makes the others."""
    return [row.name for row in VARIANTS if row.graph != "static" and (has is None or has(row))]


def known(name: str) -> VariantRow | None:
    """Return the row of a variant; None: another version's."""
    return next((row for row in VARIANTS if row.name == name), None)


def find(name: str) -> VariantRow:
    """Return the row of a variant.

    Raises:
        VariantNotFoundError: this version does not know it.
    """
    found = known(name)
    if found is None:
        raise VariantNotFoundError(f"variant {name}: this version knows {', '.join(names())}")
    return found


def is_for_devices(name: str) -> bool:
    """Tell whether a variant computes in 16 bits throughout, for the GPUs of onnxruntime."""
    row = known(name)
    return row is not None and row.graph == "device"


def precisions() -> tuple[Precision, ...]:
    """Return what `build` makes graphs for TensorRT in."""
    return tuple(row.weights.precision for row in VARIANTS if row.graph == "static")


def static_row(precision: str) -> VariantRow:
    """Return the row of a graph for TensorRT.

    Raises:
        UsageError: there is none of that precision.
    """
    found = [row for row in VARIANTS if row.graph == "static" and row.weights.precision == precision]
    if not found:
        raise UsageError(f"precision {precision!r}: expected one of {', '.join(precisions())}")
    return found[0]


def kv_caches(names: Collection[str]) -> tuple[KVCacheFormat, ...]:
    """Return ways to store keys and values, in our order; () gives those that are written where none is named.

    Raises:
        UsageError: there is none of that name.
    """
    known = [cache.name for cache in KV_CACHES]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"KV cache {', '.join(unknown)}: this version writes {', '.join(known)}")
    return tuple(cache for cache in KV_CACHES if (cache.name in names if names else cache.written))


def like_peer(peer: str, runs: str) -> tuple[str, ...]:
    """Return the variants whose weights have as many bits as what a peer runs."""
    return tuple(row.name for row in VARIANTS if row.peers.get(peer) == runs)


def run_by(peer: str) -> tuple[str, ...]:
    """Return what a peer runs beside our variants."""
    return tuple(dict.fromkeys(row.peers[peer] for row in VARIANTS if peer in row.peers))


def listed(words: Iterable[str]) -> str:
    """Return words as a sentence has them: a, b and c."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last

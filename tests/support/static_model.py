"""A static-cache graph of one layer, small enough to write down twice, and a package that has it and engines of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtimes.manifest import (
    MANIFEST_NAME,
    TRT_FOLDER,
    Engine,
    KVCacheSpec,
    Manifest,
    ModelSpec,
    ProfileRange,
    Source,
    TensorSpec,
    TrtManifest,
    Variant,
    role_of,
)
from runtimes.manifest_file import package_checksum, to_document
from runtimes.package import open_package
from runtimes.sealed import FORMAT_VERSION, hash_files, seal

VOCAB, HEADS, HEAD_DIM, TOP_K = 13, 2, 3, 4
WIDTH = HEADS * HEAD_DIM
CAPACITY, CHUNK, BATCH = 32, 5, 3
PLAN_SIZE = 3_000
VERSION = "1.7.1.116"
CAPABILITY = "8.9"


def weights(capacity: int = CAPACITY) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    shapes = {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB), "place": (capacity, WIDTH)}
    return {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def reference(ids: np.ndarray, capacity: int = CAPACITY) -> np.ndarray:
    """The model in numpy, without any cache: float32 [len(ids), VOCAB]."""
    w = weights(capacity)
    x = (w["embed"][ids] + w["place"][: len(ids)]).astype(np.float64)
    heads = x.reshape(len(ids), HEADS, HEAD_DIM).transpose(1, 0, 2)
    scores = heads @ heads.transpose(0, 2, 1)
    scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
    mix = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = mix / mix.sum(-1, keepdims=True) @ (heads * 2)
    return (mixed.transpose(1, 0, 2).reshape(len(ids), WIDTH) @ w["head"]).astype(np.float32)


def graph(capacity: int = CAPACITY, changed: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """past.key holds x by head, past.value twice that; each lies at its position. `changed` replaces weights."""
    cache = ["batch_size", HEADS, capacity, HEAD_DIM]
    constants = {
        **weights(capacity),
        **(changed or {}),
        "zero": np.array(0),
        "one": np.array(1),
        "two": np.array(2.0, np.float32),
        "axis1": np.array([1]),
        "split": np.array([0, 0, HEADS, HEAD_DIM]),
        "join": np.array([0, 0, WIDTH]),
        "slots": np.arange(capacity),
        "hidden": np.array(-np.inf, np.float32),
        "k": np.array([TOP_K]),
    }
    steps: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("Shape", ["input_ids"], ["shape"], {"start": 1, "end": 2}),
        ("Squeeze", ["shape"], ["length"], {}),
        ("Range", ["zero", "length", "one"], ["range"], {}),
        ("Unsqueeze", ["write_indices", "axis1"], ["start"], {}),
        ("Add", ["start", "range"], ["positions"], {}),
        ("Gather", ["embed", "input_ids"], ["embedded"], {}),
        ("Gather", ["place", "positions"], ["placed"], {}),  # out of range beyond the capacity: onnxruntime refuses
        ("Add", ["embedded", "placed"], ["x"], {}),
        ("Reshape", ["x", "split"], ["by_head"], {}),
        ("Transpose", ["by_head"], ["q"], {"perm": [0, 2, 1, 3]}),
        ("Mul", ["q", "two"], ["v"], {}),
        ("TensorScatter", ["past_key_values.0.key", "q", "write_indices"], ["present.0.key"], {"axis": -2}),
        ("TensorScatter", ["past_key_values.0.value", "v", "write_indices"], ["present.0.value"], {"axis": -2}),
        ("Transpose", ["present.0.key"], ["k_t"], {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["q", "k_t"], ["scores"], {}),
        ("Unsqueeze", ["positions", "axis1"], ["positions_1"], {}),
        ("Transpose", ["positions_1"], ["positions_t"], {"perm": [0, 2, 1]}),
        ("LessOrEqual", ["slots", "positions_t"], ["seen_3"], {}),  # (B, S, C)
        ("Unsqueeze", ["seen_3", "axis1"], ["seen"], {}),
        ("Where", ["seen", "scores", "hidden"], ["masked"], {}),
        ("Softmax", ["masked"], ["weights"], {"axis": -1}),
        ("MatMul", ["weights", "present.0.value"], ["mixed"], {}),
        ("Transpose", ["mixed"], ["mixed_t"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["mixed_t", "join"], ["joined"], {}),
        ("GatherND", ["joined", "logit_index"], ["row"], {"batch_dims": 1}),
        ("MatMul", ["row", "head"], ["logits"], {}),
        ("TopK", ["logits", "k"], ["top_logits", "top_ids"], {}),
    ]

    def info(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node(op, inputs, outputs, **attributes) for op, inputs, outputs, attributes in steps],
        "static",
        [
            info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            info("write_indices", TensorProto.INT64, ["batch_size"]),
            info("logit_index", TensorProto.INT64, ["batch_size", 1]),
            *(info(f"past_key_values.0.{k}", TensorProto.FLOAT, cache) for k in ("key", "value")),
        ],
        [
            info("logits", TensorProto.FLOAT, ["batch_size", VOCAB]),
            info("top_ids", TensorProto.INT64, ["batch_size", TOP_K]),
            info("top_logits", TensorProto.FLOAT, ["batch_size", TOP_K]),
            *(info(f"present.0.{k}", TensorProto.FLOAT, cache) for k in ("key", "value")),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def model_spec(capacity: int = CAPACITY) -> ModelSpec:
    return ModelSpec("olmo2", VOCAB, WIDTH, 1, HEADS, HEADS, HEAD_DIM, capacity)


def variant(capacity: int = CAPACITY) -> Variant:
    model = graph(capacity)

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        dtypes = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32"}
        return tuple(
            TensorSpec(
                v.name,
                dtypes[v.type.tensor_type.elem_type],
                tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
                role_of(v.name),
            )
            for v in values
        )

    cache = KVCacheSpec("static", "float32", 1, HEADS, HEAD_DIM, capacity)
    return Variant(
        "trt_fp32",
        "fp32",
        "trt/model_fp32.onnx",
        (),
        24,
        specs(model.graph.input),
        specs(model.graph.output),
        cache,
        {},
    )


def engine(backend: str, graph_variant: Variant, batch: int = BATCH, chunk: int = CHUNK) -> Engine:
    def ranges(width: int) -> tuple[ProfileRange, ...]:
        def shape(spec: TensorSpec, b: int, s: int) -> tuple[int, ...]:
            sizes = {"batch_size": b, "sequence_length": s}
            return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)

        return tuple(
            ProfileRange(i.name, shape(i, 1, 1), shape(i, 1, width), shape(i, batch, width))
            for i in graph_variant.inputs
        )

    return Engine(
        name=f"{backend}_fp32",
        plan=f"trt/model_fp32.{backend}.engine",
        variant="trt_fp32",
        precision="fp32",
        backend=backend,
        backend_version=VERSION,
        compute_capabilities=(CAPABILITY, "12.0"),
        profile="compact",
        profiles={"decode": ranges(1), "prefill": ranges(chunk)},
        max_batch_size=batch,
        max_cache_length=graph_variant.kv_cache.max_cache_length,
        prefill_chunk=chunk,
        flags=(),
        layer_counts={},
        aliases={
            i.name.replace("past_key_values.", "present."): i.name
            for i in graph_variant.inputs
            if i.name.startswith("past_key_values.")
        },
    )


def plan_bytes(name: str) -> bytes:
    """The content of an engine's file."""
    return f"plan of {name}".encode().ljust(PLAN_SIZE, b".")


def write_package(out: Path, capacity: int = CAPACITY, changed: dict[str, np.ndarray] | None = None) -> Path:
    """Write a package with the graph and an engine of each TensorRT; the plans are words, for `fake_tensorrt`."""
    (out / TRT_FOLDER).mkdir(parents=True)
    manifest = Manifest(FORMAT_VERSION, "0", Source("x", "folder", None, {}), model_spec(capacity), {}, {}, {})
    (out / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))
    onnx.save(graph(capacity, changed), out / variant(capacity).graph)
    write_engines(out, variant(capacity))
    return out


def write_engines(out: Path, entry: Variant) -> None:
    """Put an engine of each TensorRT of a graph that is there into a package."""
    engines = [engine(backend, entry) for backend in ("trt", "trt_rtx")]
    for e in engines:
        (out / e.plan).write_bytes(plan_bytes(e.name))
    write_trt_manifest(out, entry, *engines)


def write_trt_manifest(package: Path, entry: Variant, *engines: Engine) -> None:
    files = hash_files(package, [*entry.files, *(e.plan for e in engines)])
    checksum = package_checksum(package)
    manifest = TrtManifest(FORMAT_VERSION, "0", checksum, {entry.name: entry}, {e.name: e for e in engines}, files)
    (package / TRT_FOLDER / MANIFEST_NAME).write_bytes(seal(to_document(manifest)))


def edit_engine(package: Path, name: str, **changes: Any) -> None:
    """Change fields of an engine's entry; every hash is right."""

    manifest = open_package(package).trt
    assert manifest is not None
    engines = {n: replace(e, **changes) if n == name else e for n, e in manifest.engines.items()}
    write_trt_manifest(package, next(iter(manifest.variants.values())), *engines.values())

"""Checkpoint -> F16 GGUF -> quantised GGUF, by llama.cpp's own quantiser. Runs in the interpreter of llama-cpp-python.

    python -m olmo2_export.bench.workers.convert_llama f16 CHECKPOINT F16.gguf [--tokenizer]
    python -m olmo2_export.bench.workers.convert_llama quantize F16.gguf OUT.gguf Q4_K_M
    python -m olmo2_export.bench.workers.convert_llama sizes OUT.gguf
    python -m olmo2_export.bench.workers.convert_llama features

The F16 file is written with llama.cpp's gguf package instead of by its convert_hf_to_gguf.py, which refuses a tokenizer
that it has no name for; the keys and tensor names are those of its conversion/olmo.py (llama.cpp as vendored by
llama-cpp-python 0.3.36). A tokenizer is stored where it is asked for, as llama-server does not answer without: its
tokens and merges, not how it splits words, since prompts are token ids. Ids beyond it have made-up names.
"""

from __future__ import annotations

import argparse
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from olmo2_export.bench.workers.common import finish

FTYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}

_CHUNK = 1 << 22  # weights
_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """Return GGUF's name of a checkpoint's tensor."""
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{kind}"


def write_f16(checkpoint: Path, out: Path, tokenizer: bool = False) -> None:
    """Write the F16 GGUF of a checkpoint in safetensors, one tensor in memory at a time."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = [tensor for path in sorted(checkpoint.glob("*.safetensors")) for tensor in _tensors(path)]
    writer = _writer(config, out)
    if tokenizer:
        _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()), config["vocab_size"])
    else:
        writer.add_tokenizer_model("none")
    for tensor in tensors:
        dtype = np.dtype(np.float32 if len(tensor.shape) == 1 else np.float16)
        count = int(np.prod(tensor.shape))
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, dtype, count * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_converted(tensor))
    writer.close()


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    name: str
    path: Path
    start: int
    """of its bytes in the file"""
    dtype: str
    shape: list[int]


def _tensors(path: Path) -> list[Stored]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, expected {', '.join(_DTYPES)}")
    return [
        Stored(name, path, 8 + size + entry["data_offsets"][0], entry["dtype"], entry["shape"])
        for name, entry in header.items()
    ]


def _writer(config: dict[str, Any], out: Path) -> Any:
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(out, "olmo2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FTYPES["F16"])
    return writer


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], vocab_size: int) -> None:
    tokens = [f"[{number}]" for number in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], int(gguf.TokenType.CONTROL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer["added_tokens"][0]["id"])


def _converted(tensor: Stored) -> np.ndarray:
    """Read a tensor; norms become float32 and all else float16, as llama.cpp has it."""
    count, stored = int(np.prod(tensor.shape)), _DTYPES[tensor.dtype]
    result = np.empty(count, np.float32 if len(tensor.shape) == 1 else np.float16)
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        for start in range(0, count, _CHUNK):
            part = np.frombuffer(file.read(stored.itemsize * min(_CHUNK, count - start)), stored)
            exact = (part.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else part
            result[start : start + len(part)] = exact
    return result.reshape(tensor.shape)


def quantize(source: Path, out: Path, ftype: str) -> None:
    """Quantise a GGUF with llama.cpp's defaults (no importance matrix)."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[ftype]
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if code != 0:
        raise RuntimeError(f"llama_model_quantize of {source} to {ftype} returned {code}")


def sizes(path: Path) -> dict[str, Any]:
    """Return the bytes of a GGUF and of its tensors, and how many tensors have which type."""
    tensors = gguf.GGUFReader(path).tensors
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    embedding = sum(int(t.n_bytes) for t in tensors if t.name == "token_embd.weight")
    return {
        "bytes": path.stat().st_size,
        "tensor_bytes": sum(int(t.n_bytes) for t in tensors),
        "embedding_bytes": embedding,
        "head_is_embedding": all(t.name != "output.weight" for t in tensors),
        "tensor_types": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("f16")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("--tokenizer", action="store_true")
    verb = verbs.add_parser("quantize")
    verb.add_argument("f16", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("type", choices=list(FTYPES))
    verb = verbs.add_parser("sizes")
    verb.add_argument("out", type=Path)
    verbs.add_parser("features")
    args = parser.parse_args()
    if args.verb == "features":
        finish({"features": llama_cpp.llama_print_system_info().decode()})
        return
    if args.verb == "f16":
        write_f16(args.checkpoint, args.out, args.tokenizer)
    elif args.verb == "quantize":
        quantize(args.f16, args.out, args.type)
    finish(sizes(args.out))


if __name__ == "__main__":
    main()

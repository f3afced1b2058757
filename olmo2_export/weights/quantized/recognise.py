"""Tell which library quantised a checkpoint, and find its linears; what cannot be read is refused by name.

| quant_method       | file                    | what is read                                                       |
|--------------------|-------------------------|--------------------------------------------------------------------|
| gptq               | `gptq.py`               | 4 and 8 bits, both formats, symmetric or not, act-order, any group |
| awq                | `awq.py`                | 4 bits, layout gemm                                                |
| auto-round         | the two above           | packing_format auto_round:auto_gptq, auto_round:auto_awq           |
| compressed-tensors | `compressed_tensors.py` | pack-quantized and int-quantized, 4 and 8 bits                     |
| torchao            | `torchao.py`            | Int8Tensor, IntxUnpackedToInt8Tensor; Int4Tensor as floats         |
| bitsandbytes       | `bitsandbytes.py`       | int8; nf4 and fp4 as floats                                        |

A quantization_config beside weights that are plain numbers is left over, and means nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olmo2_export.catalog import listed
from olmo2_export.config import read_json_object
from olmo2_export.weights.quantized.awq import find_awq
from olmo2_export.weights.quantized.bitsandbytes import find_bitsandbytes
from olmo2_export.weights.quantized.codes import REMEDY, StoredLinear
from olmo2_export.weights.quantized.compressed_tensors import find_compressed, rounded_inputs
from olmo2_export.weights.quantized.gptq import find_gptq
from olmo2_export.weights.quantized.torchao import find_torchao
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

_OTHERS = {
    "hqq": "HQQ, whose zero points are floats",
    "fp8": "fp8 with scales",
    "fbgemm_fp8": "fp8 with scales",
    "quanto": "optimum-quanto",
    "aqlm": "AQLM, a code book",
    "vptq": "VPTQ, a code book",
    "higgs": "HIGGS, a code book",
    "eetq": "EETQ",
    "mxfp4": "mxfp4, whose values are floats",
    "spqr": "SpQR",
    "bitnet": "BitNet",
}
_PACKINGS = {"auto_round:auto_gptq": find_gptq, "auto_round:auto_awq": find_awq}
_FORMS = ("checkpoint_format", "packing_format", "format", "version")
"""fields that name a layout"""
_OLD_FILE = "quantize_config.json"


@dataclass(frozen=True)
class Quantized:
    """What quantised a checkpoint, and its linears."""

    title: str
    """such as gptq, 4 bits, groups of 128"""
    linears: Mapping[str, StoredLinear] = field(hash=False, repr=False)
    """by their weights' names"""
    said: str = ""
    """what the library does and no graph here: a warning"""

    @property
    def bits(self) -> int | None:
        """Of the widest code; None: of some linears there are none."""
        widths = [linear.bits for linear in self.linears.values()]
        return None if None in widths else max(bits for bits in widths if bits is not None)


def find_quantized(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray] | None,
    metadata: Callable[[], Mapping[str, str]],
) -> Quantized | None:
    """Return what a checkpoint's linears are; None where its weights are plain numbers, or nothing says what they are.

    Args:
        folder: the checkpoint's, for messages and for AutoGPTQ's own file.
        config: its config.json.
        tensors: by the model's names.
        read: gives one of them; None: they are not here.
        metadata: gives what the files' headers say beside the tensors.

    Raises:
        ConfigError, CheckpointError: a format that is not read, or tensors that do not go together.
    """
    table = _table(folder, config)
    if table is None or not any(map(_is_packed, tensors.items())):
        return None
    method = str(table.get("quant_method") or "")
    try:
        linears = _linears(method, table, tensors, read, metadata)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{folder}: quantised checkpoint ({method or 'no quant_method'}): {error}") from error
    if not linears:
        return None
    rounds = "inputs of products are rounded by the library, and in no graph of 16 or 32 bits: verify compares with "
    rounds += "the dequantised weights"
    active = rounded_inputs(table) or "Dynamic" in str(table.get("quant_type")) or table.get("load_in_8bit")
    return Quantized(_title(method, table, linears), linears, rounds if active else "")


def _table(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = config.get("quantization_config") or config.get("compression_config")
    if isinstance(found, Mapping):
        return found
    if (folder / _OLD_FILE).is_file():  # AutoGPTQ before transformers knew of it
        return {"quant_method": "gptq"} | read_json_object(folder / _OLD_FILE)
    return None


def _is_packed(item: tuple[str, TensorInfo]) -> bool:
    """Tell a tensor that is not the plain weight of a linear."""
    name, info = item
    return info.dtype in ("U8", "I8", "I32") or name.endswith(("weight_scale", "weight_scale_inv"))


def _linears(
    method: str,
    table: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray] | None,
    metadata: Callable[[], Mapping[str, str]],
) -> dict[str, StoredLinear]:
    match method:
        case "gptq":
            return find_gptq(table, tensors)
        case "awq":
            return find_awq(table, tensors)
        case "auto-round":
            packing = str(table.get("packing_format"))
            if packing not in _PACKINGS:
                known = " and ".join(_PACKINGS)
                raise ConfigError(f"auto-round with packing_format {packing}, read are {known}; {REMEDY}")
            return _PACKINGS[packing](table, tensors)
        case "compressed-tensors":
            return find_compressed(table, tensors)
        case "torchao":
            return find_torchao(tensors, metadata())
        case "bitsandbytes":
            return find_bitsandbytes(tensors, read)
    raise ConfigError(
        f"{_OTHERS.get(method, 'a format that is not known')}; read are gptq, awq, auto-round, compressed-tensors, "
        f"torchao and bitsandbytes in integers; {REMEDY}"
    )


def _title(method: str, table: Mapping[str, Any], linears: Mapping[str, StoredLinear]) -> str:
    """Return the format in words, with all sizes of groups that there are."""
    form = next((table[name] for name in _FORMS if isinstance(table.get(name), str)), None)
    if method == "bitsandbytes":
        form = table.get("bnb_4bit_quant_type") if table.get("load_in_4bit") else "int8"
    words = [f"{method} ({form})" if form and form != method else method]
    bits = Counter(linear.bits for linear in linears.values())
    words += [" and ".join(f"{n} bits" if n else "floats" for n in sorted(bits, key=lambda n: n or 0))]
    groups = {linear.group for linear in linears.values() if linear.bits}
    if sizes := sorted(groups - {0}):
        words += [f"groups of {listed(map(str, sizes))}"]
    words += ["a scale per row"] if 0 in groups else []
    return ", ".join([*words, *(["act-order"] if table.get("desc_act") else [])])

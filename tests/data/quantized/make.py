"""How the checkpoints in this folder were made, by the libraries themselves, in an environment that has them.

    PYTHONPATH=tests python tests/data/quantized/make.py DIR

torch 2.13.0, transformers 5.23.0, torchao 0.18.0, bitsandbytes 0.50.2, accelerate 1.15.0, on a CPU. `expected.json` has
the sha256 of each weight as the library dequantises it, in float32, and the logits of `IDS` by transformers running
that checkpoint. 128 and 64 columns: bitsandbytes' kernel for CPUs takes rows of 4 bits for whole blocks of 64, and
dequantises others wrongly.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from support.quantized import SHAPE, make_base

IDS = (3, 8, 13, 18, 2, 7, 12, 17, 1, 6, 11)


def main(out: Path) -> None:
    """Write the checkpoints."""
    import bitsandbytes.functional as bnb
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quant_primitives import MappingType, dequantize_affine
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    base = make_base(out / "base", **SHAPE)
    asymmetric = IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    )
    forms: dict[str, Any] = {
        "torchao_int8": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao_intx4": TorchAoConfig(asymmetric),
        "bnb_int8": BitsAndBytesConfig(load_in_8bit=True),
        "bnb_nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    }

    def dequantized(name: str, module: Any) -> torch.Tensor:
        w = module.weight
        match name:
            case "torchao_int8":
                return w.dequantize()
            case "torchao_intx4":
                size = tuple(w.block_size)
                return dequantize_affine(
                    w.qdata, size, w.scale, w.zero_point, torch.int8, -8, 7, output_dtype=torch.float32
                )
            case "bnb_int8":
                return bnb.int8_vectorwise_dequant(w.CB if w.CB is not None else w.data, w.SCB)
        return bnb.dequantize_4bit(w.data, w.quant_state)

    for name, form in forms.items():
        model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=form, dtype=torch.float32)
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        weights = {
            f"{module_name}.weight": dequantized(name, module).detach().float().contiguous()
            for module_name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module_name != "lm_head"
        }
        with torch.no_grad():
            logits = model(torch.tensor([IDS])).logits[0].float()
        expected = {
            "weights": {k: hashlib.sha256(w.numpy().tobytes()).hexdigest() for k, w in weights.items()},
            "logits": [[round(float(x), 6) for x in row] for row in logits],
        }
        (out / name / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What several test modules run: packages of two models, and PyTorch's logits of one of them.

    PYTHONPATH=tests python tests/support/packages.py DIR     then: python -m pytest --packages DIR

Only functions import the exporter, as the runner's tests also run on Pythons that have none.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

FOR_RUNNERS = ("tiny", "tiny_q8", "tiny_q4", "tiny_q4_caches", "demo", "demo_two")
"""what the runner's tests need on Pythons that have no exporter"""
FLOAT32_CACHE = {"kv_caches": ("float32",)}
"""one graph less to write and to judge"""
PACKAGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "tiny": (["fp32"], {}),
    "tiny_q8": (["q8"], {"prefill_graph": False, **FLOAT32_CACHE}),
    "tiny_q4": (["q4"], FLOAT32_CACHE),
    "tiny_q4_caches": (["q4"], {}),
    "tiny_all": (["fp32", "q4", "q8", "bf16", "fp16", "q4f16"], FLOAT32_CACHE),
    "demo": (["fp32"], {}),
    "demo_two": (["fp32", "q4"], {"prefill_graph": False, **FLOAT32_CACHE}),
    "demo_q4": (["q4"], FLOAT32_CACHE),
}
"""name -> variants, and fields of `Options`"""
LOGITS = "logits.npz"
LENGTHS = (17, 5, 29)
VOCAB = 131


def sequences() -> list[np.ndarray]:
    """Return token ids of the tiny model, one array of each of `LENGTHS`."""
    random = np.random.default_rng(0)
    return [random.integers(0, VOCAB, n) for n in LENGTHS]


def make_package(name: str, tiny_checkpoint: Path, out: Path) -> None:
    """Export one of `PACKAGES`, of the demo or of the tiny model."""
    from olmo2_export.package.export import export
    from olmo2_export.package.weight_choice import Options
    from olmo2_export.weights.checkpoint import open_checkpoint

    variants, options = PACKAGES[name]
    checkpoint = open_checkpoint("demo" if name.startswith("demo") else str(tiny_checkpoint))
    export(checkpoint, out, variants=variants, options=Options(**options))


def make_logits(tiny_checkpoint: Path) -> list[np.ndarray]:
    """Return PyTorch's logits of `sequences`, all positions."""
    import torch
    from transformers import Olmo2ForCausalLM

    model = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
    with torch.no_grad():
        return [model(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in sequences()]


def main(out: Path) -> None:
    """Write what the runner's tests need to a folder."""
    from support.checkpoints import make_checkpoint

    tiny = make_checkpoint(out / "checkpoint" / "tiny")
    for name in FOR_RUNNERS:
        make_package(name, tiny, out / name)
    np.savez(out / LOGITS, *make_logits(tiny))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What several test modules run: packages of two models, and PyTorch's logits of one of them.

    python tests/support/packages.py DIR        make them with the exporter, for: python -m pytest --packages DIR

Only functions import the exporter, as the runner's tests also run on Pythons that have none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

PACKAGES = {
    "tiny": (["fp32"], True),
    "tiny_q8": (["q8"], False),
    "tiny_q4": (["q4"], True),
    "demo": (["fp32"], True),
    "demo_two": (["fp32", "q4"], False),
}
"""name -> variants, and whether those for CPUs may have a prefill graph"""
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
    from olmo2_export.package.variants import Options
    from olmo2_export.weights.checkpoint import open_checkpoint

    variants, prefill_graph = PACKAGES[name]
    checkpoint = open_checkpoint("demo" if name.startswith("demo") else str(tiny_checkpoint))
    export(checkpoint, out, variants=variants, options=Options(prefill_graph=prefill_graph))


def make_logits(tiny_checkpoint: Path) -> list[np.ndarray]:
    """Return PyTorch's logits of `sequences`, all positions."""
    import torch
    from transformers import Olmo2ForCausalLM

    model = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
    with torch.no_grad():
        return [model(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in sequences()]


def main(out: Path) -> None:
    """Write everything to a folder."""
    from support.checkpoints import make_checkpoint

    tiny = make_checkpoint(out / "checkpoint" / "tiny")
    for name in PACKAGES:
        make_package(name, tiny, out / name)
    np.savez(out / LOGITS, *make_logits(tiny))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

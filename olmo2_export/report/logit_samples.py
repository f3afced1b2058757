"""Run a variant on held-out text beside PyTorch and keep what a report draws: some logits, and every KL divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from olmo2_export.evaluate.models import open_measured
from olmo2_export.measure.parity import kl_divergence
from runtimes.package import AnyPackage, open_package

POINTS = 60_000
"""logits that are kept of each variant"""

PIECE = 32
"""positions at a time: float64 logits of a large vocabulary take 0.8 MB each"""

_SEED = 0


@dataclass(frozen=True, eq=False)
class LogitSample:
    """What is drawn of one variant."""

    truth: np.ndarray
    """float32 [n]: logits of PyTorch in float32, drawn at random over positions and vocabulary"""
    test: np.ndarray
    """float32 [n]: the variant's, at the same places"""
    kl: np.ndarray
    """float64 [positions]: KL(PyTorch || variant), nats"""
    top1: float
    """share of positions"""


def sample_logits(
    package: AnyPackage, variant: str, sequences: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> LogitSample:
    """Compare a variant with PyTorch at every position, some at a time.

    Args:
        package: the package folder, or one that is open.
        variant: its name.
        sequences: int64 [S] each; longer ones than its cache are cut.
        reference: per sequence float32 [S, V].
    """
    opened = open_package(package)
    length = opened.variant(variant).kv_cache.max_cache_length
    draw = np.random.default_rng(_SEED)
    share = POINTS / sum(min(len(ids), length) for ids in sequences)
    truths, tests, kls, agreements = [], [], [], []
    with open_measured(opened, variant) as runner:
        for ids, wanted in zip(sequences, reference, strict=True):
            runner.reset()
            for start in range(0, min(len(ids), length), PIECE):
                piece = ids[start : min(start + PIECE, length)]
                (test,) = runner.prefill([piece], all_positions=True)
                truth = wanted[start : start + len(piece)]
                kls.append(kl_divergence(truth, test))
                agreements.append(truth.argmax(-1) == test.argmax(-1))
                places = draw.integers(0, truth.size, max(1, round(share * len(piece))))
                truths.append(truth.reshape(-1)[places].astype(np.float32))
                tests.append(test.reshape(-1)[places].astype(np.float32))
        runner.reset()
    return LogitSample(
        np.concatenate(truths), np.concatenate(tests), np.concatenate(kls), float(np.concatenate(agreements).mean())
    )

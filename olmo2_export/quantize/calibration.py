"""Text -> token sequences that show the model what its activations look like."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import tokenizers

from olmo2_export.config import ModelConfig
from olmo2_export.weights.source import WeightSource
from runtimes.errors import CheckpointError, InputError, UsageError
from runtimes.text.plain_text import plain_lines, read_text

logger = logging.getLogger(__name__)

SEQUENCES = 32
LENGTH = 512
_LEAST = 256  # tokens: fewer say nothing of a distribution


def calibration_tokens(
    checkpoint: WeightSource,
    config: ModelConfig,
    text: Path | None,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> list[np.ndarray]:
    """Cut a text into sequences of tokens, evenly spread over it.

    Args:
        checkpoint: for its tokenizer.json.
        config: for its vocabulary and context.
        text: a UTF-8 text like those the model will see, some 10 kB or more; None: the demo's own text for the demo,
            random ids for a checkpoint without a tokenizer.
        sequences: how many at most.
        length: tokens of each, at most; never more than the context.
        seed: of the random ids.

    Returns:
        int64 [length] each; all of one length.

    Raises:
        UsageError: no text where one is needed, or an unreadable, too short or non-UTF-8 one.
        CheckpointError: the tokenizer does not work, or gives ids beyond the vocabulary.
    """
    length = min(length, config.max_position_embeddings)
    if text is None and checkpoint.kind == "demo":
        text = checkpoint.folder / "calibration.txt"
    if text is None:
        if (checkpoint.folder / "tokenizer.json").exists():
            raise UsageError("this recipe measures activations: give a calibration text (UTF-8, 10 kB or more)")
        logger.warning("no tokenizer.json: calibrating on random token ids, which tells little of real text")
        drawn = np.random.default_rng(seed).integers(0, config.vocab_size, (sequences, length), dtype=np.int64)
        return list(drawn)
    ids = _encode(checkpoint, config, _read(text))
    if len(ids) < _LEAST:
        raise UsageError(f"{text}: {len(ids)} tokens, calibration needs {_LEAST} or more; give a longer text")
    length = min(length, len(ids))
    windows = len(ids) // length
    starts = np.linspace(0, windows - 1, min(sequences, windows)).astype(int) * length
    return [ids[start : start + length] for start in starts]


def _read(path: Path) -> str:
    try:
        return plain_lines("".join(read_text(path)))
    except (InputError, OSError) as error:
        raise UsageError(f"cannot read the calibration text: {error}") from error


def _encode(checkpoint: WeightSource, config: ModelConfig, text: str) -> np.ndarray:
    path = checkpoint.folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"{path}: not there, so no text can calibrate it; without a text, random ids do")
    try:
        encoded = tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    except BaseException as error:  # a bad regex panics: a BaseException of a module that cannot be imported
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise CheckpointError(f"{path}: does not work: {str(error).strip().splitlines()[0][:200]}") from error
    ids = np.array(encoded, dtype=np.int64)
    if len(ids) and ids.max() >= config.vocab_size:
        raise CheckpointError(f"{path}: gives id {ids.max()}, the vocabulary has {config.vocab_size}; wrong tokenizer?")
    return ids

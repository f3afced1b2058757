"""A checkpoint's tokenizer.json: load it, and try whether it is the model's."""

from __future__ import annotations

import logging
from pathlib import Path

import tokenizers

from olmo2_export.config import LFS_POINTER, ModelConfig
from runtimes.errors import CheckpointError, first_names

logger = logging.getLogger(__name__)

_SAMPLES = 200  # tokens that are tried
_LEAST = 0.5  # share of them that must come back, or lie in the vocabulary


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; truncation and padding, which training may have left in it, are off.

    Raises:
        CheckpointError: tokenizers cannot load it.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # a bad regex panics: a BaseException of a module that cannot be imported
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER.encode():
                raise CheckpointError(
                    f"{path}: a Git LFS pointer: run 'git lfs pull', or download the file itself"
                ) from error
        raise CheckpointError(f"{path}: does not work: {_first_line(error)}; get the file again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tested_tokenizer(path: Path, config: ModelConfig) -> tokenizers.Tokenizer | None:
    """Load the tokenizer and try it on its own alphabet, so that a broken one fails the export and not the user.

    Tokens from all over its vocabulary are decoded, and their text encoded and decoded again. A tokenizer may lower
    letters or join spaces; what it made of a text once must come back as it is.

    Raises:
        CheckpointError: it does not work, or is another model's: most ids are none of the model's.
    """
    if not path.exists():
        slow = "; AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes one of vocab.json and merges.txt"
        logger.warning(
            "the checkpoint has no tokenizer.json: the package can be verified but not prompted with text%s",
            slow if (path.parent / "vocab.json").is_file() else "",
        )
        return None
    tokenizer = load_tokenizer(path)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ordinary = sorted(set(vocabulary.values()) - special)
    beyond = sorted(i for i in vocabulary.values() if i >= config.vocab_size)
    step = max(1, len(ordinary) // _SAMPLES)
    tried = back = inside = 0
    for token_id in ordinary[::step]:
        try:
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            if not text.strip() or "\ufffd" in text:  # a part of a character
                continue
            first = tokenizer.encode(text, add_special_tokens=False).ids
            settled = tokenizer.decode(first, skip_special_tokens=False)
            again = tokenizer.decode(tokenizer.encode(settled, add_special_tokens=False).ids, skip_special_tokens=False)
        except BaseException as error:  # as in `load_tokenizer`
            if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                raise
            raise CheckpointError(f"{path}: does not work: {_first_line(error)}; get the file again") from error
        tried += 1
        back += bool(first) and _squeezed(again) == _squeezed(settled) != ""
        inside += bool(first) and max(first) < config.vocab_size
    if inside < _LEAST * tried or (tried == 0 and len(beyond) > _LEAST * len(vocabulary)):
        raise CheckpointError(
            f"{path}: {tried - inside} of {tried} of its own tokens have no id below {config.vocab_size}, the model's "
            "vocabulary; wrong tokenizer?"
        )
    if back < _LEAST * tried:
        raise CheckpointError(
            f"{path}: only {back} of {tried} of its own tokens become text and tokens again; "
            + ("wrong tokenizer?" if tokenizer.decoder else "it has no decoder: get the file again")
        )
    if beyond:
        names = [repr(tokenizer.id_to_token(i)) for i in beyond]
        logger.warning(
            "%s: %d tokens are beyond the model's vocabulary of %d, as %s: text that holds them is refused",
            path, len(beyond), config.vocab_size, first_names(names, 3),
        )  # fmt: skip
    return tokenizer


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Perplexity of a text, and the distance to other models on the same tokens.

    tokens = TokenText(path, tokenizer, prefix)
    with open_package_model(package, variant="q4") as tested, open_torch_model(checkpoint) as reference:
        evaluation = evaluate(tested, tokens, references=[reference])

Perplexity is exp of the mean of -log p(token | what the window holds before it); `text.py` says what that is,
`error_bars.py` where the error bars come from. KL divergence is KL(reference || tested).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from olmo2_export.evaluate.models import Evaluated, logit_pieces
from olmo2_export.evaluate.text import TokenText, Window
from olmo2_export.measure.error_bars import Change, Mean, mean, perplexity, perplexity_change
from olmo2_export.measure.parity import kl_divergence
from olmo2_export.measure.quality import token_losses
from runtimes.errors import PackageError, UsageError
from runtimes.package import AnyPackage, Package
from runtimes.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 1024
"""tokens, or the model's context where that is shorter"""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A model and what the tested one is beside it, on the same tokens."""

    name: str
    """of the model that is compared with"""
    perplexity: Mean
    """its own"""
    change: Change
    """of the perplexity, tested against this, as a share"""
    kl: Mean
    """nats per token, KL(this || tested)"""
    kl_p99: float
    kl_max: float
    top1: float
    """share of tokens where both have the same likeliest next token"""
    losses: Values = field(repr=False, compare=False)
    """float64 [tokens]: this model's -log p, nats"""
    kls: Values = field(repr=False, compare=False)
    """float64 [tokens]: nats"""

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "perplexity": self.perplexity.value,
            "perplexity_se": self.perplexity.se,
            "perplexity_change_share": self.change.value,
            "perplexity_change_se_share": self.change.se,
            "perplexity_change_low_share": self.change.low,
            "perplexity_change_high_share": self.change.high,
            "kl_mean_nats": self.kl.value,
            "kl_mean_se_nats": self.kl.se,
            "kl_p99_nats": self.kl_p99,
            "kl_max_nats": self.kl_max,
            "top1_share": self.top1,
        }


@dataclass(frozen=True)
class Evaluation:
    """One model on one text."""

    name: str
    """of the variant, or PyTorch"""
    text: str
    """the file's name"""
    tokens: int
    """scored"""
    windows: int
    context: int
    """tokens that a window reads at most"""
    stride: int
    """tokens that each window but the first scores"""
    prefix: int | None
    """the id in front of the text; None: the text's own first token stands there and is not scored"""
    loss: Mean
    """nats per token"""
    perplexity: Mean
    comparisons: tuple[Comparison, ...]
    seconds: float
    losses: Values = field(repr=False, compare=False)
    """float64 [tokens]: -log p in the order of the text, nats"""

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form, without what there is per token."""
        return {
            "model": self.name,
            "text": self.text,
            "tokens": self.tokens,
            "windows": self.windows,
            "context_tokens": self.context,
            "stride_tokens": self.stride,
            "prefix_token_id": self.prefix,
            "loss_mean_nats": self.loss.value,
            "loss_mean_se_nats": self.loss.se,
            "perplexity": self.perplexity.value,
            "perplexity_se": self.perplexity.se,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds if self.seconds > 0 else None,
            "against": {c.name: c.to_document() for c in self.comparisons},
        }


def token_text(source: AnyPackage, path: Path, *, most: int | None = None, is_package: bool = True) -> TokenText:
    """Return a file as the tokens of a package or checkpoint.

    Args:
        source: a package, or the folder of a checkpoint: has the tokenizer and the special ids.
        path: UTF-8 text, or token ids as `.npy`; these need no tokenizer, but without one nothing is put in front.
        most: tokens to read; None: all.
        is_package: compare the tokenizer with the manifest first.

    Raises:
        PackageError: text, and no tokenizer to read it with.
    """
    if isinstance(source, Package):
        source.provide(name for name in ("tokenizer.json",) if name in source.manifest.files)
    folder = source.folder if isinstance(source, Package) else Path(source)
    if path.suffix == ".npy" and not (folder / "tokenizer.json").is_file():
        return TokenText(path, None, None, most)
    try:
        tokenizer = Tokenizer.from_package(source) if is_package else Tokenizer.from_folder(folder)
    except PackageError as error:
        if (folder / "tokenizer.json").is_file():
            raise
        raise PackageError(f"{error}; or give token ids: --text IDS.npy") from error
    ends = tokenizer.eos_token_ids
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends[0] if ends else None
    return TokenText(path, tokenizer, prefix, most)


def evaluate(
    tested: Evaluated,
    tokens: TokenText,
    *,
    references: Sequence[Evaluated] = (),
    context: int | None = None,
    stride: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Read a text with a model, and with others beside it, and say how well it is predicted.

    Args:
        tested: the model.
        tokens: the text, read twice: once to check and count it before any model computes.
        references: models of the same vocabulary that it is compared with.
        context: tokens that a window reads at most; None: 1024, or what fits.
        stride: tokens that each window but the first scores, so that all but the first `context` tokens have at least
            context - stride before them; None: as many as the context, each window on its own.
        progress: show a bar on standard error.

    Raises:
        UsageError: a context or stride out of range, or models of different vocabularies.
        InputError: the text is not UTF-8, or has nothing to score.
        NumericError: a model broke down.
    """
    models = [tested, *references]
    capacity = min(model.max_context for model in models)
    context = min(DEFAULT_CONTEXT, capacity) if context is None else context
    if not 1 <= context <= capacity:
        raise UsageError(f"context {context}: expected 1 to {capacity} tokens, what the model holds")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"stride {stride}: expected 1 to {context}, the context")
    if len(sizes := {model.vocab_size for model in models}) > 1:
        raise UsageError(f"vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens cannot be compared")
    scored = tokens.count(tested.vocab_size)
    started = time.monotonic()
    tables = [_Table() for _ in references]
    losses: list[Values] = []
    windows = 0
    with tqdm(total=scored, desc=f"evaluating {tested.name}", unit="token", leave=False, disable=not progress) as bar:
        for group in _groups(tokens.windows(context, stride), max(model.group_tokens for model in models)):
            for model in models:
                model.begin(group)
            windows += len(group)
            for index, window in enumerate(group):
                for loss in _window(models, index, window, tables):
                    losses.append(loss)
                    bar.update(len(loss))
    all_losses = np.concatenate(losses)
    return Evaluation(
        name=tested.name,
        text=tokens.path.name,
        tokens=len(all_losses),
        windows=windows,
        context=context,
        stride=stride,
        prefix=tokens.prefix,
        loss=mean(all_losses),
        perplexity=perplexity(all_losses),
        comparisons=tuple(t.comparison(m.name, all_losses) for t, m in zip(tables, references, strict=True)),
        seconds=time.monotonic() - started,
        losses=all_losses,
    )


class _Table:
    """What is gathered of one reference."""

    def __init__(self) -> None:
        self.losses: list[Values] = []
        self.kls: list[Values] = []
        self.same = 0

    def add(self, truth: np.ndarray, test: np.ndarray, targets: np.ndarray) -> None:
        self.losses.append(token_losses(truth, targets))
        self.kls.append(kl_divergence(truth, test))
        self.same += int((truth.argmax(-1) == test.argmax(-1)).sum())

    def comparison(self, name: str, tested: Values) -> Comparison:
        losses, kls = np.concatenate(self.losses), np.concatenate(self.kls)
        return Comparison(
            name=name,
            perplexity=perplexity(losses),
            change=perplexity_change(tested, losses),
            kl=mean(kls),
            kl_p99=float(np.quantile(kls, 0.99)),
            kl_max=float(kls.max()),
            top1=self.same / len(losses),
            losses=losses,
            kls=kls,
        )


def _window(models: Sequence[Evaluated], index: int, window: Window, tables: Sequence[_Table]) -> Iterator[Values]:
    """Run one window through all models in step; yield the tested one's losses."""
    piece = logit_pieces(models[0].vocab_size)
    start = 0
    for logits in zip(*(model.logits(index, piece) for model in models), strict=True):
        test, *truths = logits
        targets = window.targets[start : start + len(test)]
        start += len(test)
        for table, truth in zip(tables, truths, strict=True):
            table.add(truth, test, targets)
        yield token_losses(test, targets)


def _groups(windows: Iterable[Window], tokens: int) -> Iterator[list[Window]]:
    """Gather windows until they have so many ids."""
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(len(w.ids) for w in group) >= tokens:
            yield group
            group = []
    if group:
        yield group

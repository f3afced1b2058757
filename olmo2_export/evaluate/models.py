"""What can be evaluated: a variant of a package, or a checkpoint in PyTorch, whole or one layer in memory at a time.

Each takes windows of token ids and gives logits in pieces of few positions, so that the logits of a vocabulary of a
hundred thousand tokens never fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.evaluate.text import Window
from olmo2_export.measure.quality import Measured
from olmo2_export.truth.reference import Reference, open_reference
from olmo2_export.truth.torch_layers import open_layers
from olmo2_export.views import runners
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes import Backend, Device, open_runner
from runtimes.errors import ConfigError
from runtimes.manifest import ModelSpec, Variant
from runtimes.package import AnyPackage, open_package
from runtimes.runners.runner import Logits
from runtimes.targets import find_target

PYTORCH = "PyTorch float32"
"""the name of what variants are compared with"""

_CONTEXT_PIECE = 512  # positions at a time where no logits are wanted
_HIDDEN_BYTES = 1 << 28  # of the windows that go through the layers together


class Evaluated(Protocol):
    """A model that reads windows."""

    name: str
    vocab_size: int
    max_context: int
    """tokens that a window may have"""
    group_tokens: int
    """ids of the windows that `begin` takes at once, about"""

    def begin(self, windows: Sequence[Window]) -> None:
        """Take the windows that are asked for next."""
        ...

    def logits(self, index: int, piece: int) -> Iterator[Logits]:
        """Yield the logits of one window's scored positions, float32 [up to piece, vocab_size] at a time."""
        ...


class PackageModel:
    """A variant of a package on a runner; implements `Evaluated`."""

    group_tokens = 1

    def __init__(self, runner: Measured, variant: Variant, model: ModelSpec, name: str, decode_graph: bool) -> None:
        self.name = name
        self.vocab_size = model.vocab_size
        self.max_context = variant.kv_cache.max_cache_length
        self._runner = runner
        self._decode_graph = decode_graph
        self._all_positions = variant.kv_cache.form == "static"  # made for it
        self._windows: Sequence[Window] = ()

    def begin(self, windows: Sequence[Window]) -> None:
        self._windows = windows

    def logits(self, index: int, piece: int) -> Iterator[Logits]:
        window, runner = self._windows[index], self._runner
        runner.reset()
        for start in range(0, window.first, _CONTEXT_PIECE):
            part = window.ids[start : min(window.first, start + _CONTEXT_PIECE)]
            if self._decode_graph:
                runner.decode_block(part)
            else:
                runner.prefill([part], all_positions=self._all_positions)
        for start in range(window.first, len(window.ids), piece):
            part = window.ids[start : start + piece]
            yield runner.decode_block(part) if self._decode_graph else runner.prefill([part], all_positions=True)[0]


class TorchModel:
    """transformers' model in float32; implements `Evaluated`."""

    name = PYTORCH
    group_tokens = 1

    def __init__(self, reference: Reference, config: ModelConfig) -> None:
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self._reference = reference
        self._windows: Sequence[Window] = ()

    def begin(self, windows: Sequence[Window]) -> None:
        self._windows = windows

    def logits(self, index: int, piece: int) -> Iterator[Logits]:
        window = self._windows[index]
        yield from self._reference.stream(window.ids, window.first, piece)


class LayeredTorchModel:
    """transformers' model in float32, one layer in memory: a group of windows goes through all layers together.

    Implements `Evaluated`.
    """

    name = PYTORCH

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.group_tokens = max(1, _HIDDEN_BYTES // (4 * config.hidden_size))
        self._model, self._layers = open_layers(checkpoint, config), config.num_hidden_layers
        self._hidden: list[torch.Tensor] = []

    @torch.no_grad()
    def begin(self, windows: Sequence[Window]) -> None:
        hidden = [self._model.embed(torch.from_numpy(window.ids)) for window in windows]
        for index in range(self._layers):
            layer = self._model.layer(index)
            hidden = [layer(x) for x in hidden]
            del layer
        self._hidden = [x[0, w.first :] for x, w in zip(hidden, windows, strict=True)]

    @torch.no_grad()
    def logits(self, index: int, piece: int) -> Iterator[Logits]:
        for part in torch.split(self._hidden[index], piece):
            yield self._model.head(self._model.norm(part)).numpy()


@contextmanager
def open_package_model(
    package: AnyPackage,
    *,
    variant: str | None = None,
    backend: Backend = "ort",
    device: Device | None = None,
    decode_graph: bool = False,
    kv_cache: str | None = None,
) -> Iterator[PackageModel]:
    """Open a variant for evaluation.

    Args:
        package: the package folder, or one that is open.
        variant, backend, device: as `open_runner`; on the CPU a named variant for a GPU runs in its rounded form.
        decode_graph: use the graph that generates text for all tokens, also where the package has another for prompts.
        kv_cache: as `open_runner`.

    Raises:
        Olmo2ExportError: as `open_runner`.
    """
    opened = open_package(package)
    opened.check_logits("evaluate")
    model, entry = opened.model, opened.variant(variant) if variant is not None else None
    if entry is not None and not find_target(backend, device).on_gpu and _rounded_here(entry):
        with open_measured(opened, entry.with_cache(kv_cache).name) as measured:
            yield PackageModel(measured, entry, model, f"{entry.name}, rounded as on its device", decode_graph)
        return
    with open_runner(opened, variant=variant, backend=backend, device=device, kv_cache=kv_cache) as runner:
        name = runner.variant.name if kv_cache is None else f"{runner.variant.name}, {kv_cache} KV cache"
        yield PackageModel(runner, runner.variant, model, name, decode_graph)


@contextmanager
def open_measured(package: AnyPackage, variant: str) -> Iterator[Measured]:
    """Open what the CPU can run of a variant: its graph, or where that has no kernels there its rounded form.

    Raises:
        VariantNotFoundError: the package has no such variant.
        PackageError: the graph does not load.
    """
    opened = open_package(package)
    with runners.open_measured(opened, opened.variant(variant)) as measured:
        yield measured


def _rounded_here(variant: Variant) -> bool:
    """Whether onnxruntime's CPU provider runs another form of the graph, rounded where the graph rounds."""
    return variant.kv_cache.form == "static" or variant.kv_cache.dtype == "bfloat16"


@contextmanager
def open_torch_model(checkpoint: Checkpoint, *, low_memory: bool = False) -> Iterator[Evaluated]:
    """Open a checkpoint in PyTorch, in float32, for evaluation.

    Args:
        checkpoint: the weights.
        low_memory: with one layer in memory at a time, instead of all.

    Raises:
        ConfigError, CheckpointError: it cannot be loaded.
    """
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    if config.labels:
        raise ConfigError(f"{checkpoint.folder}: a classifier, which gives scores and no logits; evaluate needs logits")
    if low_memory:
        yield LayeredTorchModel(checkpoint, config)
        return
    with open_reference(checkpoint, "fp32") as reference:
        yield TorchModel(reference, config)


def logit_pieces(vocab_size: int) -> int:
    """Return how many positions are compared at a time: their logits in float64 are some 32 MB."""
    return int(np.clip((1 << 22) // vocab_size, 8, 256))

"""A checkpoint and LoRA adapters: merged ones, so that its tensors read as W + s B A, and those that stay apart.

Nothing is written: a weight is changed when it is read, in parts of whole rows, in float64, and is float32 then; the
others are read as they are stored. Several adapters are merged in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint, open_headers
from olmo2_export.weights.lora import Adapter, Rows, open_adapter
from runtimes.errors import CheckpointError, UsageError, first_names
from runtimes.manifest import AdapterSource, Manifest, Source


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are those of a merged model."""

    adapters: tuple[Adapter, ...] = field(default=(), kw_only=True)
    switchable: tuple[Adapter, ...] = field(default=(), kw_only=True)
    """not merged: a package has them beside its graphs"""

    @property
    def changed(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset().union(*(adapter.changed for adapter in self.adapters))

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; float32 where an adapter changes it. See `Checkpoint`."""
        if name not in self.changed:
            return super().tensor(name)
        whole = torch.empty(self.tensors[name].shape)
        start = 0
        for part in self.rows(name):
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def rows(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in blocks of whole rows; float32 where an adapter changes it. See `Checkpoint`."""
        if name not in self.changed:
            yield from super().rows(name)
            return
        change, start = self._change(name), 0
        for part in super().rows(name):
            yield change(part, slice(start, start + len(part)))
            start += len(part)

    def picked(self, name: str, rows: Tensor) -> Tensor:
        """Read some rows of one tensor; float32 where an adapter changes it. See `Checkpoint`."""
        part = super().picked(name, rows)
        return self._change(name)(part, rows) if name in self.changed else part

    def validate(self, expected: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str] | None = None) -> None:
        """See `Checkpoint`; then look for NaN and Inf in the adapters, and compare what must be as in the base model.

        Raises:
            CheckpointError: naming every tensor that is wrong.
        """
        super().validate(expected, aliases)
        for adapter in (*self.adapters, *self.switchable):
            problems = adapter.problems()
            for weight, name in adapter.unchanged.items():
                if not torch.equal(super().tensor(weight).float(), adapter.stored.tensor(name).float()):
                    problems.append(f"{name}: not equal to {weight} of {self.model}; was it trained on another model?")
            if problems:
                raise CheckpointError(f"{adapter.stored.folder}: {'; '.join(problems)}")

    def _change(self, name: str) -> Callable[[Tensor, Rows], Tensor]:
        changes = [adapter.change(name) for adapter in self.adapters if name in adapter.changed]

        def changed(part: Tensor, rows: Rows) -> Tensor:
            for change in changes:
                part = change(part, rows)
            return part.float()

        return changed


def open_merged(
    model: str,
    revision: str | None = None,
    lora: Sequence[str] = (),
    *,
    switchable: Sequence[str] = (),
    headers: bool = False,
) -> Checkpoint:
    """Open a checkpoint, and merge LoRA adapters into it, in order.

    Args:
        model, revision: as for `open_checkpoint`.
        lora: as for `lora.open_adapter`; none: the checkpoint as it is.
        switchable: likewise, of adapters that are not merged.
        headers: leave the weights of one on the Hub there, as `open_headers` does.

    Raises:
        CheckpointNotFoundError, CheckpointError, ConfigError, UsageError: as `open_checkpoint` and `open_adapter`.
    """
    checkpoint = open_headers(model, revision) if headers else open_checkpoint(model, revision)
    if not lora and not switchable:
        return checkpoint
    if lora and checkpoint.quantized is not None:
        raise UsageError(
            f"--lora: the weights of {model} are {checkpoint.quantized.title}, which take over none; keep it apart "
            "with --lora-inputs, or merge it into the model as it was before"
        )
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    rows = operations(config)
    tied = config.tie_word_embeddings
    adapters, others = (tuple(open_adapter(given, rows, tied=tied) for given in some) for some in (lora, switchable))
    names = [adapter.name for adapter in (*adapters, *others)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--lora: {first_names(twice)} twice; give each a name of its own, as in DIR=NAME")
    given = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}
    return MergedCheckpoint(**given, adapters=adapters, switchable=others)


def switchable_adapters(checkpoint: Checkpoint) -> tuple[Adapter, ...]:
    """Return the adapters that go with a checkpoint and are not merged."""
    return checkpoint.switchable if isinstance(checkpoint, MergedCheckpoint) else ()


def adapter_sources(checkpoint: Checkpoint) -> tuple[AdapterSource, ...]:
    """Return what a manifest says of the adapters that are merged into a checkpoint."""
    adapters = checkpoint.adapters if isinstance(checkpoint, MergedCheckpoint) else ()
    return tuple(adapter.source for adapter in adapters)


def check_adapters(source: Source, checkpoint: Checkpoint) -> None:
    """Refuse a reference that has other adapters merged than a package has, or in another order.

    Raises:
        UsageError: it has.
    """
    wanted, found = ([entry.files for entry in entries] for entries in (source.adapters, adapter_sources(checkpoint)))
    if wanted == found:
        return
    names = ", ".join(entry.name for entry in source.adapters)
    if not source.adapters:
        raise UsageError("--lora: the package was exported without an adapter; leave it out")
    if not found:
        raise UsageError(f"--lora: missing; the package has {names} merged: give --lora DIR for each, in this order")
    given = ", ".join(entry.name for entry in adapter_sources(checkpoint))
    raise UsageError(f"--lora: {given} has other files than were merged; the package has {names}, in this order")


def check_switchable(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Refuse a reference without the very adapters that a package takes at run time.

    Raises:
        UsageError: it lacks one, or has another.
    """
    wanted = {name: entry.source.files for name, entry in manifest.adapters.items()}
    found = {adapter.name: adapter.source.files for adapter in switchable_adapters(checkpoint)}
    if wanted == found:
        return
    if lost := sorted(wanted.keys() - found.keys()):
        raise UsageError(f"--lora-inputs: the package takes {first_names(lost)}; give --lora-inputs DIR=NAME for each")
    if extra := sorted(found.keys() - wanted.keys()):
        raise UsageError(f"--lora-inputs: the package does not have {first_names(extra)}; leave it out")
    other = sorted(name for name in wanted if wanted[name] != found[name])
    raise UsageError(f"--lora-inputs: {first_names(other)} has other files than were exported")

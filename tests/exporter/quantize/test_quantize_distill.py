"""A model's own text, and training on it: the right draws, the right gradients, never worse, one layer at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import OLMO1, OLMO3, make_checkpoint
from torch import Tensor

from olmo2_export.catalog import BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.quantize import distill, self_text
from olmo2_export.quantize.distill import Distillation, Latent, Schedule
from olmo2_export.quantize.recipes import tensor_formats
from olmo2_export.quantize.search import search
from olmo2_export.quantize.spool import Spool
from olmo2_export.quantize.walk import Head, WalkedLayer, embed, walked_layers
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.source import Replaced, WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, stored_weight
from runtimes.errors import NumericError, UsageError

FORM, HEAD_FORM = BlockFormat(4, 64, True), BlockFormat(4, 32, False)


def opened(folder: Path, **fields: Any) -> tuple[Checkpoint, ModelConfig]:
    checkpoint = open_checkpoint(str(make_checkpoint(folder, **fields)))
    return checkpoint, ModelConfig.from_json(folder / "config.json")


def spooled(checkpoint: Checkpoint, config: ModelConfig, folder: Path) -> tuple[Spool, list[str]]:
    """Every tensor, searched."""
    spool = Spool(folder)
    formats = tensor_formats(config, form=FORM, head=HEAD_FORM, embedding=HEAD_FORM)
    for name, form in formats.items():
        spool.save(name, search(stored_weight(checkpoint, config, name), form))
    return spool, list(formats)


def log_probabilities(source: WeightSource, config: ModelConfig, ids: np.ndarray, head: Tensor | None = None) -> Tensor:
    """[S, V], by the walk that the other recipes use."""
    (x,) = embed(source, [ids])
    for layer in walked_layers(source, config):
        x = layer(x)
    return torch.log_softmax(Head(source, config).logits(x, head)[0].double(), dim=-1)


def divergence(checkpoint: Checkpoint, config: ModelConfig, spool: Spool, sequences: list[np.ndarray]) -> float:
    """Mean KL of what a spool holds, in its stored form."""
    stored = {name.stem: spool.load(name.stem).dequantize() for name in spool.folder.glob("*.npz")}
    head = stored.pop(HEAD)
    total = 0.0
    with torch.no_grad():
        for ids in sequences:
            p = log_probabilities(checkpoint, config, ids)
            q = log_probabilities(Replaced(checkpoint, stored), config, ids, head)
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(sequences)


@pytest.mark.parametrize("fields", [{}, OLMO1, OLMO3, {"tie_word_embeddings": True}], ids=str)
def test_text_is_drawn_from_the_models_own_distribution(tmp_path: Path, fields: dict[str, object]) -> None:
    """Each token is the one that the same noise draws from logits without a cache."""
    checkpoint, config = opened(tmp_path, **fields)
    text = self_text.self_text(checkpoint, config, sequences=3, length=20, seed=5)
    assert [(x.dtype, x.shape, x[0]) for x in text] == [(np.int64, (20,), 130)] * 3
    generator = torch.Generator().manual_seed(5)
    found = [log_probabilities(checkpoint, config, ids) for ids in text]
    for position in range(19):
        logits = torch.stack([x[position] for x in found])
        noise = torch.empty(logits.shape, dtype=torch.float32).exponential_(generator=generator)
        drawn = (logits - noise.log()).argmax(dim=-1)
        assert drawn.tolist() == [ids[position + 1] for ids in text]


def test_text_in_parts_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, config = opened(tmp_path / "a", max_position_embeddings=40)
    first, again, other = (
        np.stack(self_text.self_text(checkpoint, config, sequences=5, length=999, seed=s)) for s in (0, 0, 1)
    )
    assert first.shape == (5, config.max_position_embeddings)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 1 << 16)  # two sequences at a time
    parts = np.stack(self_text.self_text(checkpoint, config, sequences=5, length=40))
    assert parts.shape == first.shape
    assert len(np.unique(parts, axis=0)) == 5

    checkpoint, config = opened(tmp_path / "b", bos_token_id=None, eos_token_id=None)
    starts = [ids[0] for ids in self_text.self_text(checkpoint, config, sequences=9, length=2)]
    assert len(set(starts)) > 4


def test_who_writes_no_text(tmp_path: Path) -> None:
    checkpoint, config = opened(tmp_path / "scores", num_labels=3)
    with pytest.raises(UsageError, match="a classifier writes no text to learn from; take search or gptq"):
        self_text.self_text(checkpoint, config, sequences=1, length=9)
    checkpoint, config = opened(tmp_path / "text")
    broken = Replaced(checkpoint, {EMBEDDING: torch.full((config.vocab_size, config.hidden_size), torch.nan)})
    with pytest.raises(NumericError, match="no text to learn from"):
        self_text.self_text(broken, config, sequences=1, length=9)


def test_gradients_are_those_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, config = opened(tmp_path / "checkpoint")
    spool, names = spooled(checkpoint, config, tmp_path)
    text = self_text.self_text(checkpoint, config, sequences=3, length=17)
    latents = {n: Latent(tmp_path, n, spool.load(n), stored_weight(checkpoint, config, n)) for n in names}
    for name, latent in latents.items():  # it begins as what it begins with
        assert torch.equal(latent.weight(), spool.load(name).dequantize())
        np.testing.assert_array_equal(latent.matrix().packed, spool.load(name).packed)
    with torch.no_grad():
        model = Distillation(checkpoint, config, text, latents, tmp_path)
    found: dict[str, Tensor] = {}
    rows = torch.from_numpy(np.unique(np.stack(text[:2])))

    def record(self: Latent, gradient: Tensor, *rates: float, of: Tensor | None = None) -> None:
        (name,) = (n for n, latent in latents.items() if latent is self)
        found[name] = gradient
        assert rates == (7, 0.25, 0.5)
        assert (of is not None) == (name == EMBEDDING)
        assert of is None or torch.equal(of, rows)

    monkeypatch.setattr(Latent, "update", record)
    with torch.no_grad():
        loss = model.step(torch.tensor([0, 1]), 7, 0.25, 0.5)
        assert loss == pytest.approx(model.divergence(torch.tensor([0, 1])), rel=1e-5)

    weights = {name: spool.load(name).dequantize().requires_grad_() for name in names}
    student = Replaced(checkpoint, {name: w for name, w in weights.items() if name != HEAD})
    total = torch.zeros((), dtype=torch.float64)
    for ids in text[:2]:
        p = log_probabilities(checkpoint, config, ids)
        total = total + (p.exp() * (p - log_probabilities(student, config, ids, weights[HEAD]))).sum(-1).mean() / 2
    assert loss == pytest.approx(float(total.detach()), rel=1e-4)
    for (name, weight), wanted in zip(weights.items(), torch.autograd.grad(total, list(weights.values())), strict=True):
        truth = wanted[rows] if name == EMBEDDING else wanted
        assert weight.shape == wanted.shape
        error = (found[name] - truth).square().mean() / truth.square().mean()
        assert error < 1e-6, name


def test_a_step_moves_codes_and_scales_by_their_rates(tmp_path: Path) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    start = search(weight, FORM)
    gradient = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    latent = Latent(tmp_path, "a", start, weight)
    latent.update(gradient, 1, codes=0.0, scales=0.01)
    moved = latent.matrix()
    np.testing.assert_array_equal(moved.packed, start.packed)
    assert torch.equal(moved.dequantize(), latent.weight())
    against = torch.nn.functional.pad(gradient * start.dequantize(), (0, 32)).view(5, 2, 64).sum(-1)
    wanted = np.exp(-0.01 * np.sign(against.numpy()))  # the first step of Adam has the size of its rate
    np.testing.assert_allclose(moved.scales / start.scales, wanted, rtol=1e-5)

    latent = Latent(tmp_path, "b", start, weight)
    latent.update(gradient, 1, codes=0.6, scales=0.0)
    changed = latent.matrix().codes().float() - start.codes().float()
    np.testing.assert_array_equal(latent.matrix().scales, start.scales)
    slope = torch.nn.functional.pad(gradient, (0, 32)).view(5, 2, 64) * torch.from_numpy(start.scales)[..., None]
    assert 0.2 < float((changed != 0).float().mean()) < 0.8
    assert bool((changed * slope <= 0).all())
    assert 0 <= latent.matrix().codes().min() <= latent.matrix().codes().max() <= 15

    rows = torch.tensor([3, 1])
    latent = Latent(tmp_path, "c", start, weight)
    latent.update(gradient[rows], 1, codes=0.6, scales=0.01, of=rows)
    assert torch.equal(latent.weight()[[0, 2, 4]], start.dequantize()[[0, 2, 4]])
    assert (latent.weight()[[1, 3]] != start.dequantize()[[1, 3]]).any()
    assert torch.equal(latent.weight(rows), latent.weight()[rows])


@pytest.mark.parametrize("tied", [False, True])
def test_the_divergence_falls_the_same_way_twice(tmp_path: Path, tied: bool) -> None:
    checkpoint, config = opened(tmp_path / "checkpoint", tie_word_embeddings=tied, num_hidden_layers=2)
    text = self_text.self_text(checkpoint, config, sequences=36, length=20)
    schedule = Schedule(steps=12, batch=8, every=6, warmup=2, codes=0.01, scales=1e-3)
    results = []
    for folder in ("a", "b"):
        spool, names = spooled(checkpoint, config, tmp_path / folder)
        before = divergence(checkpoint, config, spool, text[32:])
        first, best = distill.distill(checkpoint, config, text[:32], text[32:], spool, names, schedule)
        assert first == pytest.approx(before, rel=1e-4)
        assert best == pytest.approx(divergence(checkpoint, config, spool, text[32:]), rel=1e-4)  # as it is stored
        assert best < 0.9 * first
        assert not (spool.folder / "training").exists()
        results.append([first, best, *(spool.load(name).packed.tobytes() for name in names)])
    assert results[0] == results[1]


def test_what_runs_away_is_stopped_and_the_start_kept(tmp_path: Path) -> None:
    checkpoint, config = opened(tmp_path / "checkpoint")
    text = self_text.self_text(checkpoint, config, sequences=6, length=12)
    spool, names = spooled(checkpoint, config, tmp_path / "spool")
    before = {name: spool.load(name).packed.tobytes() for name in names}
    wild = Schedule(steps=1000, batch=4, warmup=1, codes=3.0, scales=0.5, every=1)
    first, best = distill.distill(checkpoint, config, text[:4], text[4:], spool, names, wild)  # 1000 take minutes
    assert best == first
    assert {name: spool.load(name).packed.tobytes() for name in names} == before


def test_memory_is_one_layer_and_the_rest_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, config = opened(tmp_path / "checkpoint")
    text = self_text.self_text(checkpoint, config, sequences=6, length=12)
    spool, names = spooled(checkpoint, config, tmp_path / "spool")
    alive: list[weakref.ref[object]] = []

    def watched(*args: Any, **options: Any) -> Iterator[WalkedLayer]:
        for layer in walked_layers(*args, **options):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1  # the loop variable holds the one before
            alive.append(weakref.ref(layer.weights[f"model.layers.{layer.index}.mlp.up_proj.weight"]))
            yield layer

    sizes: list[int] = []
    step = Distillation.step

    def measured(self: Distillation, *args: Any) -> float:
        files = [path.stat() for path in (spool.folder / "training").iterdir()]
        assert all(file.st_blocks * 512 >= file.st_size for file in files)  # a full disk was found out before
        sizes.append(sum(file.st_size for file in files))
        return step(self, *args)

    monkeypatch.setattr(distill, "walked_layers", watched)
    monkeypatch.setattr(Distillation, "step", measured)
    monkeypatch.setattr(distill, "LENGTH", 12)
    monkeypatch.setattr(distill, "SEQUENCES", 4)
    monkeypatch.setattr(distill, "HELD_OUT", 2)
    distill.distill(checkpoint, config, text[:4], text[4:], spool, names, Schedule(steps=2, batch=4))
    assert len(alive) == config.num_hidden_layers * (1 + 2 + 2 * 2)  # truth, two measurements, two steps there and back
    formats = {name: spool.load(name).form for name in names}
    assert sizes == [distill.training_bytes(config, formats)] * 2

"""Each recipe on odd shapes, each better than the simpler one, and the demo within its quality gates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

from olmo2_export.catalog import Q4, Q4_EMBEDDING, Q8, BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.measure.parity import kl_divergence
from olmo2_export.quantize import distill
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.quantize.encode import cut
from olmo2_export.quantize.gptq import Hessian, factor, gptq
from olmo2_export.quantize.int8 import LARGEST_CODE, quantize_int8
from olmo2_export.quantize.recipes import DISTILLED, MIXED, QUANTIZERS, RECIPES, SPOOLED, QuantizedWeights, quantize
from olmo2_export.quantize.search import search
from olmo2_export.quantize.sensitivity import choose_formats, measure_sensitivity
from olmo2_export.quantize.spool import Spool
from olmo2_export.quantize.walk import Head, embed, walked_layers
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, linear_names, weight_shapes
from runtimes.errors import CheckpointError, NumericError, UsageError

FORM = BlockFormat(bits=4, block_size=64, symmetric=False)


def run(checkpoint: Checkpoint, sequences: list[np.ndarray], weights: QuantizedWeights | None = None) -> np.ndarray:
    """Logits of all positions with those weights in the place of the original ones, by the sweep: [positions, V]."""
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    replaced = {} if weights is None else {name: weights.matrix(name).dequantize() for name in weights.formats}
    with torch.no_grad():
        hidden = embed(checkpoint, sequences)
        if EMBEDDING in replaced:
            hidden = [replaced[EMBEDDING][torch.from_numpy(ids)][None] for ids in sequences]
        for layer in walked_layers(checkpoint, config):
            for name in layer.weights.keys() & replaced.keys():
                layer.replace(name, replaced[name])
            hidden = [layer(x) for x in hidden]
        head = Head(checkpoint, config)
        return np.concatenate([head.logits(x, replaced.get(HEAD))[0].numpy() for x in hidden])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_on_odd_shapes(tmp_path: Path, recipe: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden 96 and intermediate 160 are no multiples of the block, vocabulary 131 is odd."""
    monkeypatch.setattr(distill, "LENGTH", 24)
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=tied)))
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    weights = quantize(
        checkpoint,
        config,
        recipe,
        form=FORM,
        head=BlockFormat(8, 32, True),
        size_budget=7.5 if recipe in MIXED else None,
        steps=2 if recipe == DISTILLED else None,
        spool=tmp_path / "spool" if recipe in SPOOLED else None,
    )
    assert list(weights.formats) == [EMBEDDING, *linear_names(config), HEAD]
    assert weights.formats[HEAD] == BlockFormat(8, 32, True)
    eights = [name for name, form in weights.formats.items() if form.bits == 8]
    assert (len(eights) > 1) == (recipe in MIXED)
    for name, shape in weight_shapes(config).items():
        matrix = weights.matrix(name)
        assert matrix.form == weights.formats[name]
        assert (matrix.rows, matrix.columns) == shape == weights.source(name).shape
    for error in weights.errors():
        bits = weights.formats[error.name].bits
        assert error.bits == bits
        assert error.nmse < (0.03 if bits == 4 else 1e-4), error
        truth, matrix = weights.source(error.name), weights.matrix(error.name)
        squares = cut(matrix.dequantize() - truth, matrix.form).square().sum(1)
        worst = float(squares.max() * len(squares) / truth.square().sum())  # of a block, beside a block's mean
        assert error.nmse < worst < 60 * error.nmse, error


def test_gptq_has_less_output_error_than_search() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(160, 160, generator=generator) * torch.linspace(0.1, 2, 160)
    train, test = (torch.randn(700, 160, generator=generator) @ mixing for _ in range(2))
    weight = torch.randn(33, 160, generator=generator)
    hessian = Hessian(160)
    for x in train.split(100):
        hessian.add(x)
    torch.testing.assert_close(hessian.mean, train.T @ train / 700, rtol=1e-4, atol=1e-4)
    for form in (BlockFormat(4, 32, True), BlockFormat(4, 128, False), BlockFormat(8, 64, True)):
        by_rounding, by_search, by_gptq = (
            float((test @ (matrix.dequantize() - weight).T).square().sum())
            for matrix in (
                QUANTIZERS["rtn"](weight, form),
                search(weight, form),
                gptq(weight, hessian.mean, form),
            )
        )
        assert by_search <= by_rounding
        assert by_gptq <= 0.7 * by_search


def test_gptq_of_uncorrelated_inputs_is_rounding() -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    for hessian in (torch.eye(96), torch.zeros(96, 96)):  # zeros: inputs that were never seen to be anything else
        np.testing.assert_array_equal(gptq(weight, hessian, FORM).packed, search(weight, FORM).packed)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 70)
    hessian = x.T @ x / 300
    factored = factor(hessian, damping=0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(70)
    inverse = torch.linalg.inv(damped.double())[factored.order][:, factored.order]
    torch.testing.assert_close((factored.upper.T @ factored.upper).double(), inverse, rtol=1e-3, atol=1e-3)
    assert torch.equal(factored.upper, factored.upper.triu())
    assert factored.order[0] == 69


def test_gptq_keeps_going_on_dead_and_duplicate_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 128, generator=generator)  # fewer than columns: singular
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    x[:, 9] *= 1e4
    weight = torch.randn(6, 128, generator=generator)
    matrix = gptq(weight, x.T @ x / 40, FORM)
    error, energy = ((x @ w.T).square().sum() for w in (matrix.dequantize() - weight, weight))
    assert error < 1e-3 * energy
    with pytest.raises(NumericError, match="NaN, Inf or too large"):
        gptq(weight, torch.full((128, 128), torch.inf), FORM)
    with pytest.raises(NumericError, match="too dependent"):
        gptq(weight, torch.ones(128, 128), FORM, damping=-1e-3)


@pytest.mark.parametrize("recipe", ["rtn", "search", "gptq"])
def test_a_nan_names_its_tensor(tmp_path: Path, recipe: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    config = ModelConfig.from_json(folder / "config.json")
    with pytest.raises(CheckpointError, match=name):
        quantize(checkpoint, config, recipe, form=FORM, spool=tmp_path / "spool" if recipe == "gptq" else None).errors()


def test_options_that_mean_nothing_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    with pytest.raises(UsageError, match="expected one of rtn, search, gptq, mixed, gptq-mixed, distill"):
        quantize(checkpoint, config, "awq", form=FORM)
    with pytest.raises(UsageError, match="no use for a calibration text"):
        quantize(checkpoint, config, "search", form=FORM, calibration=tmp_path)
    with pytest.raises(UsageError, match="size budget goes with"):
        quantize(checkpoint, config, "mixed", form=FORM)
    with pytest.raises(UsageError, match="spool folder goes with"):
        quantize(checkpoint, config, "gptq", form=FORM)
    with pytest.raises(UsageError, match="recipe gptq has no steps, distill has"):
        quantize(checkpoint, config, "gptq", form=FORM, steps=3, spool=tmp_path)
    with pytest.raises(UsageError, match="recipe distill: a spool folder goes with"):
        quantize(checkpoint, config, "distill", form=FORM)
    with pytest.raises(UsageError, match="recipe distill has no use for a calibration text"):
        quantize(checkpoint, config, "distill", form=FORM, calibration=tmp_path, spool=tmp_path)
    with pytest.raises(UsageError, match="raise the budget"):
        quantize(checkpoint, config, "mixed", form=FORM, size_budget=3.0)


def test_sensitivity_is_the_divergence_of_each_tensor_alone(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    sequences = list(np.random.default_rng(0).integers(0, config.vocab_size, (3, 23), dtype=np.int64))
    formats = dict.fromkeys(weight_shapes(config), FORM)
    measured = measure_sensitivity(checkpoint, config, sequences, formats, search)
    assert list(measured) == list(formats)
    truth = run(checkpoint, sequences)
    for alone in (EMBEDDING, "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight", HEAD):
        weights = QuantizedWeights(
            {alone: FORM}, lambda name, form: search(checkpoint.tensor(name), form), checkpoint.tensor
        )
        assert measured[alone] == pytest.approx(
            kl_divergence(truth, run(checkpoint, sequences, weights)).mean(), rel=1e-3
        )


def test_the_budget_goes_to_the_most_sensitive_bytes(tiny_checkpoint: Path) -> None:
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    shapes = weight_shapes(config)
    formats = dict.fromkeys(shapes, BlockFormat(4, 32, True))
    better = BlockFormat(8, 32, True)
    sensitivity = dict.fromkeys(shapes, 1e-9)
    loud = ["model.layers.0.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    sensitivity |= dict.fromkeys(loud, 1.0)
    weights = sum(math.prod(shape) for shape in shapes.values())
    extra = sum(4 * math.prod(shapes[name]) for name in loud)
    chosen = choose_formats(config, formats, sensitivity, 5.0 + extra / weights, better)
    assert [name for name, form in chosen.items() if form == better] == loud
    assert choose_formats(config, formats, sensitivity, 5.0, better) == formats
    assert set(choose_formats(config, formats, sensitivity, 9.0, better).values()) == {better}

    # One large tensor saves the most, but the small bargains before it would leave no room for it.
    sensitivity = dict.fromkeys(shapes, 1e-9) | {HEAD: 1.0, loud[0]: 0.3}
    budget = 5.0 + 4 * math.prod(shapes[HEAD]) / weights
    chosen = choose_formats(config, formats, sensitivity, budget, better)
    assert [name for name, form in chosen.items() if form == better] == [HEAD]


def test_the_spool_gives_back_what_it_got(tmp_path: Path) -> None:
    store = Spool(tmp_path / "new" / "spool")
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    for form in (FORM, BlockFormat(8, 32, True)):
        matrix = search(weight, form)
        store.save("a.weight", matrix)
        back = store.load("a.weight")
        assert (back.form, back.rows, back.columns) == (form, 5, 100)
        assert (back.zero_points is None) == form.symmetric
        assert torch.equal(back.dequantize(), matrix.dequantize())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot keep a"):
        Spool(tmp_path / "file").save("a", matrix)


@pytest.mark.parametrize("shape", [(7, 96), (33, 2000)], ids=str)
def test_int8_channels(shape: tuple[int, int]) -> None:
    weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1e-3, 10, shape[0])[:, None]
    )
    weight[1] = 0
    weight[2, 5] = 1e30
    weight = weight.bfloat16()
    codes, scales = quantize_int8(weight)
    assert (codes.shape, codes.dtype) == (shape[::-1], np.int8)
    assert (scales.shape, scales.dtype) == (shape[:1], np.float32)
    assert np.abs(codes).max() <= LARGEST_CODE
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    wanted = weight.double().numpy()
    error = np.square((codes * scales).T.astype(np.float64) - wanted).sum(1)
    step = np.maximum(np.abs(wanted).max(1), 1e-30)[:, None] / LARGEST_CODE
    rounded = np.square(np.round(wanted / step) * step - wanted).sum(1)
    assert error[2] <= 1e-12 * np.square(wanted[2]).sum()
    assert (np.delete(error, 2) <= np.delete(rounded, 2) * (1 + 1e-5)).all()
    assert error[3:].sum() < 0.99 * rounded[3:].sum()
    weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        quantize_int8(weight)


# The gates of int4 and int8 on the demo: KL mean and p99 in nats, top-1 agreement, rise of perplexity.
GATES = {4: (0.01, 0.08, 0.93, 0.01), 8: (2e-4, 0.002, 0.99, 0.001)}


@pytest.fixture(scope="module")
def held_out() -> tuple[list[np.ndarray], np.ndarray]:
    """Sequences of held-out text, and the demo's logits of all their positions, [positions, V]."""
    checkpoint = open_checkpoint("demo")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    sequences = calibration_tokens(checkpoint, config, checkpoint.folder / "heldout.txt", sequences=12, length=512)
    return sequences, run(checkpoint, sequences)


@pytest.mark.parametrize(
    ("recipe", "form", "head", "kl_limit"),
    [
        ("search", Q4, Q8, 0.007),
        ("gptq", Q4, Q4, 0.005),
        ("gptq", Q4, Q8, 0.00256),  # Q4_K_M of llama.cpp, which is larger
        ("search", Q8, Q8, 1e-4),
    ],
    ids=str,
)
def test_the_demo_is_within_its_gates(
    tmp_path: Path,
    held_out: tuple[list[np.ndarray], np.ndarray],
    recipe: str,
    form: BlockFormat,
    head: BlockFormat,
    kl_limit: float,
) -> None:
    checkpoint = open_checkpoint("demo")
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    embedding = Q4_EMBEDDING if form == Q4 else Q8
    spool = tmp_path / "spool" if recipe == "gptq" else None
    weights = quantize(checkpoint, config, recipe, form=form, head=head, embedding=embedding, spool=spool)
    sequences, truth = held_out
    got = run(checkpoint, sequences, weights)
    kl = kl_divergence(truth, got)
    targets = np.concatenate([np.append(ids[1:], -1) for ids in sequences])
    rise = log_perplexity(got, targets) - log_perplexity(truth, targets)
    mean, p99, top1, perplexity = GATES[form.bits]
    assert kl.mean() <= min(mean, kl_limit)
    assert np.quantile(kl, 0.99) <= p99
    assert (truth.argmax(1) == got.argmax(1)).mean() >= top1
    assert math.expm1(rise) <= perplexity


def log_perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    kept = targets >= 0
    log_p = torch.log_softmax(torch.from_numpy(logits[kept]), dim=-1)
    return -float(log_p[torch.arange(len(log_p)), torch.from_numpy(targets[kept])].mean())

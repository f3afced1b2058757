"""Quantised linears for TensorRT: what their codes and scales stand for, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint

from olmo2_export.catalog import BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions, check_trt_options, write_trt_variant
from olmo2_export.quantize.linear import fp8_linear, int4_linear, int8_linear, side_by_side, squared_error
from olmo2_export.quantize.round_to_nearest import round_to_nearest
from olmo2_export.quantize.search import search
from olmo2_export.quantize.static import check_recipe, static_block_size, static_weights
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.package_weights import PackageWeights
from olmo2_export.weights.stored_names import HEAD, linear_names
from runtimes.errors import CheckpointError, UsageError
from runtimes.manifest import Manifest
from runtimes.package import open_package

POSITIVE = BlockFormat(4, 32, symmetric=True, positive=True)


def weight(rows: int = 48, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def manifest(tiny_package: Path) -> Manifest:
    return open_package(tiny_package).manifest


@pytest.mark.parametrize("quantizer", [round_to_nearest, search])
def test_int4_has_positive_scales_and_stands_for_the_same_numbers(quantizer: type) -> None:
    w = weight()
    w[5, 32:64] = 0
    w[6, :32] = w[6, :32].abs()  # the largest magnitude is positive, where there is one code less
    matrix = quantizer(w, POSITIVE)
    linear = int4_linear(matrix)
    assert linear.codes.dtype == ml_dtypes.int4
    assert linear.codes.shape == (96, 48)
    assert linear.scales.shape == (3, 48)
    assert linear.block_size == 32
    assert (linear.scales.astype(np.float32) > 0).all()
    torch.testing.assert_close(linear.dequantize(), matrix.dequantize(), rtol=2**-8, atol=0)
    assert squared_error(linear, w) == pytest.approx({search: 0.0071, round_to_nearest: 0.009}[quantizer], rel=0.25)
    torch.testing.assert_close(linear.dequantize(7, 11), linear.dequantize()[7:11])


@pytest.mark.parametrize(
    "form", [BlockFormat(4, 32, False), BlockFormat(4, 32, True), BlockFormat(8, 32, True, positive=True)]
)
def test_what_tensorrt_does_not_take_is_refused(form: BlockFormat) -> None:
    with pytest.raises(UsageError, match="TensorRT takes 4 bits, symmetric, with positive scales, in whole blocks"):
        int4_linear(search(weight(), form))
    with pytest.raises(UsageError, match="whole blocks"):
        int4_linear(search(weight(columns=90), POSITIVE))


def test_int8_uses_the_full_range_and_fits_each_channel() -> None:
    w = weight() * torch.linspace(0.01, 3, 48)[:, None]
    linear = int8_linear(w)
    assert (linear.codes.min(), linear.codes.max()) == (-127, 127)
    assert linear.scales.dtype == ml_dtypes.bfloat16
    assert linear.scales.shape == (48,)
    assert linear.block_size == 0
    per_channel = (linear.dequantize() - w).square().sum(1) / w.square().sum(1)
    assert float(per_channel.max()) < 1.2e-4
    assert squared_error(linear, w) < 6e-5


def test_fp8_keeps_four_bits_of_each_weight_and_never_overflows() -> None:
    w = weight() * torch.linspace(0.01, 3, 48)[:, None]
    w[3] = 0
    w[4, 7] = 1e30
    linear = fp8_linear(w)
    assert linear.codes.dtype == ml_dtypes.float8_e4m3fn
    codes = linear.codes.astype(np.float32)
    assert np.isfinite(codes).all()
    peaks = np.abs(codes).max(0)
    assert (np.delete(peaks, 3) >= 416).all()
    assert (peaks[3], peaks.max()) == (0, 448)
    stored, normal = linear.dequantize(), w.abs() > w.abs().amax(1, keepdim=True) * 2**-13
    error = (stored - w).abs() / w.abs().clamp_min(1e-30)
    assert float(error[normal].max()) <= 2**-4 + 2**-8
    with pytest.raises(CheckpointError, match="NaN"):
        fp8_linear(torch.full((2, 4), torch.nan))


def test_parts_side_by_side_are_their_channels() -> None:
    parts = [int8_linear(weight(rows)) for rows in (16, 8, 24)]
    whole = side_by_side(parts)
    for start, part in zip((0, 16, 24), parts, strict=True):
        torch.testing.assert_close(whole.channels(start, start + len(part.scales)).dequantize(), part.dequantize())


def test_weights_of_a_package_are_the_checkpoints(
    tiny_package: Path, tiny_checkpoint: Path, manifest: Manifest
) -> None:
    checkpoint, package = open_checkpoint(str(tiny_checkpoint)), PackageWeights(tiny_package, manifest)
    for name in checkpoint.tensors:
        assert torch.equal(package.tensor(name), checkpoint.tensor(name)), name


def test_each_precision_quantises_what_it_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    everything = {*linear_names(config), HEAD}
    kept = {"int4": (), "int8": ("mlp.down_proj", "lm_head"), "fp8": ("lm_head",)}
    for precision, left_out in kept.items():
        weights = static_weights(checkpoint, config, precision, spool=tmp_path / "spool")
        expected = {name for name in everything if not name.removesuffix(".weight").endswith(left_out)}
        assert weights.forms.keys() == expected
        assert all((form.input_scale is None) == (precision == "int4") for form in weights.forms.values())
        entries = weights.tensors()
        assert max(entry.nmse for entry in entries.values()) < {"int4": 0.01, "int8": 1e-4, "fp8": 1e-3}[precision]
    # blocks of 32, as 96 and 160 are multiples of no larger one: half a bit of scale for each weight
    assert static_weights(checkpoint, config, "int4", spool=tmp_path).bits_per_weight == 4.5


def test_gptq_costs_less_than_search(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In squared error of the outputs on like inputs; the weights themselves are further off."""
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    found = static_weights(checkpoint, config, "int4", recipe="gptq", spool=tmp_path / "spool")
    plain = static_weights(checkpoint, config, "int4", spool=tmp_path)
    name = linear_names(config)[6]
    assert found.tensors()[name].nmse > plain.tensors()[name].nmse
    assert (found.linear(name).scales.astype(np.float32) > 0).all()


def test_shapes_that_no_block_divides_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", intermediate_size=168, num_hidden_layers=1)
    config = ModelConfig.from_json(folder / "config.json")
    with pytest.raises(UsageError, match="blocks of 32, 64, 128 weights do not divide 96, 168 inputs"):
        static_block_size(config, "int4")
    check_recipe(config, "int8", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "recipe": "rtn"}, "int4 alone has a choice"),
        ({"precision": "int4", "recipe": "mixed"}, "it mixes precisions; TensorRT's int4 takes rtn, search, gptq"),
        ({"precision": "int4", "recipe": "distill"}, "it is for onnxruntime's variants"),
        ({"precision": "int4", "recipe": "best"}, "it is unknown"),
        ({"precision": "int4", "calibration": Path("x")}, "only int8, fp8 and int4 with --recipe gptq"),
        ({"precision": "bf16", "calibration": Path("x")}, "only int8, fp8 and int4 with --recipe gptq"),
        ({"precision": "fp8", "calibration": Path("/no/such")}, "/no/such: no such calibration text"),
        ({"precision": "bf16", "top_k": 0}, "top_k 0: expected 1 to 131"),
        ({"precision": "bf16", "top_k": 132}, "top_k 132: expected 1 to 131"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, object], message: str, tiny_package: Path, manifest: Manifest
) -> None:
    with pytest.raises(UsageError, match=message):
        check_trt_options(tiny_package, manifest, TrtOptions(max_cache_length=64, **options))  # type: ignore[arg-type]


def test_calibration_is_recorded_and_random_ids_warn(
    tiny_package: Path, manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        variant = write_trt_variant(tiny_package, manifest, tmp_path, TrtOptions("fp8", 64))
    assert "calibrating on random token ids" in caplog.text
    quantization = variant.quantization
    assert quantization is not None
    assert (quantization.recipe, quantization.calibration) == ("w8a8", None)
    assert len(quantization.input_scales) == 21
    assert 8.1 < quantization.bits_per_weight < 8.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_fp8.onnx", "model_fp8.onnx_data"]


def test_the_package_is_all_that_is_needed(tmp_path: Path) -> None:
    """Two writes from one package are the same bytes, and the spool of gptq is gone."""
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "c", num_hidden_layers=1)))
    manifest = export(checkpoint, tmp_path / "p")
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        write_trt_variant(tmp_path / "p", manifest, folder, TrtOptions("int4", 64, recipe="gptq"))
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"model_int4.onnx", "model_int4.onnx_data"}

"""Quantised checkpoints: the weights that each format means, number by number, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantized import (
    LINEARS,
    Writer,
    awq,
    compressed,
    gptq,
    int_quantized,
    integers,
    make_base,
    make_quantized,
    pack_quantized,
)

from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.quantized import awq as awq_file
from olmo2_export.weights.quantized import codes as codes_file
from olmo2_export.weights.quantized import gptq as gptq_file
from olmo2_export.weights.quantized.bitsandbytes import find_bitsandbytes
from olmo2_export.weights.quantized.codes import Codes
from olmo2_export.weights.quantized.torchao import find_torchao
from olmo2_export.weights.stored_tensors import TensorInfo
from runtimes.errors import CheckpointError, ConfigError

MADE = Path(__file__).parents[2] / "data" / "quantized"
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
ROUND: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
V2 = partial(gptq, first_format=False)
WHOLE_ZEROS = partial(pack_quantized, packed_zeros=False)
PACKED, BYTES = "pack-quantized", "int-quantized"

CASES: dict[str, tuple[dict[str, Any], Writer, dict[str, Any]]] = {
    "gptq": (GPTQ, gptq, {}),
    "gptq, format 2": (GPTQ | {"checkpoint_format": "gptq_v2"}, V2, {}),
    "gptq, asymmetric": (GPTQ | {"sym": False}, gptq, {"symmetric": False}),
    "gptq, format 2, asymmetric": (GPTQ | {"format": "gptq_v2"}, V2, {"symmetric": False}),
    "gptq, act-order": (GPTQ | {"desc_act": True}, gptq, {"act_order": True, "symmetric": False}),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, gptq, {"bits": 8, "symmetric": False}),
    "gptq, a scale per row": (GPTQ | {"group_size": -1}, gptq, {"group": -1}),
    "gptq, groups of 16": (GPTQ | {"group_size": 16}, gptq, {"group": 16}),
    "awq": (AWQ, awq, {"symmetric": False}),
    "awq, bfloat16 scales": (AWQ, awq, {"symmetric": False, "scales": torch.bfloat16}),
    "auto-round as gptq": (ROUND | {"packing_format": "auto_round:auto_gptq"}, gptq, {}),
    "auto-round as awq": (ROUND | {"packing_format": "auto_round:auto_awq"}, awq, {"symmetric": False}),
    "compressed-tensors": (compressed(PACKED, 4, group=32, symmetric=True), pack_quantized, {}),
    "compressed-tensors, asymmetric": (
        compressed(PACKED, 4, group=32, symmetric=False),
        pack_quantized,
        {"symmetric": False, "scales": torch.bfloat16},
    ),
    "compressed-tensors, whole zero points": (
        compressed(PACKED, 4, group=32, symmetric=False),
        WHOLE_ZEROS,
        {"symmetric": False},
    ),
    "compressed-tensors, act-order": (
        compressed(PACKED, 4, group=32, symmetric=True, actorder="group"),
        pack_quantized,
        {"act_order": True},
    ),
    "compressed-tensors, 8 bits": (
        compressed(PACKED, 8, group=-1, symmetric=True),
        pack_quantized,
        {"bits": 8, "group": -1},
    ),
    "compressed-tensors, bytes": (
        compressed(BYTES, 8, group=-1, symmetric=True),
        int_quantized,
        {"bits": 8, "group": -1, "scales": torch.bfloat16},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_integers_say_in_every_bit(base: Path, tmp_path: Path, case: str) -> None:
    config, write, fields = CASES[case]
    wanted = make_quantized(tmp_path / "q", base, config, write, **fields)
    checkpoint = open_checkpoint(str(tmp_path / "q"))
    assert checkpoint.quantized is not None
    assert checkpoint.quantized.linears.keys() == wanted.keys()
    assert checkpoint.quantized.bits == fields.get("bits", 4)
    for name, weight in wanted.items():
        assert checkpoint.tensors[name].shape == weight.shape
        assert np.array_equal(checkpoint.tensor(name).numpy(), weight), name
    name = next(iter(wanted))
    assert torch.equal(torch.cat(list(checkpoint.rows(name))), checkpoint.tensor(name))
    assert torch.equal(checkpoint.picked(name, torch.tensor([5, 0, 5])), checkpoint.tensor(name)[[5, 0, 5]])


def swapped_nibbles(words: np.ndarray, bits: int) -> np.ndarray:
    assert bits == 4
    octets = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([octets >> 4, octets & 15], axis=-1).reshape(len(octets), -1)


def g_idx_ignored(index: np.ndarray, _size: object, groups: int) -> np.ndarray:
    return np.arange(len(index)) // (len(index) // groups)


BUGS: dict[str, tuple[str, Any, str, Any]] = {
    "zero points off by one": ("gptq, asymmetric", gptq_file, "_ONES", {4: 0}),
    "format 2 read as the first": ("gptq, format 2, asymmetric", gptq_file, "_FORMATS", None),
    "halves of a byte swapped": ("gptq", gptq_file, "unpack", swapped_nibbles),
    "g_idx ignored": ("gptq, act-order", gptq_file, "given_groups", g_idx_ignored),
    "outputs of a word in order": ("awq", awq_file, "_ORDER", tuple(range(8))),
    "scale of the next group": ("gptq", gptq_file, "given_groups", lambda i, _, n: (i.astype(np.int64) + 1) % n),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_reader_with_a_bug_is_seen(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    case, file, name, wrong = BUGS[bug]
    config, write, fields = CASES[case]
    wanted = make_quantized(tmp_path / "q", base, config, write, **fields)
    if wrong is None:
        path = tmp_path / "q" / "config.json"
        path.write_text(path.read_text().replace("gptq_v2", "gptq"))
    else:
        monkeypatch.setattr(file, name, wrong)
    checkpoint = open_checkpoint(str(tmp_path / "q"))
    assert not any(np.array_equal(checkpoint.tensor(name).numpy(), weight) for name, weight in wanted.items())


def test_a_zero_point_of_0_borrows_from_its_neighbour_and_gets_it_back(base: Path, tmp_path: Path) -> None:
    """1 added to each integer instead of the word is wrong by a whole scale where a zero point is 0."""
    make_quantized(tmp_path / "q", base, GPTQ | {"sym": False}, gptq, symmetric=False, only=["self_attn.q_proj"])
    codes = open_checkpoint(str(tmp_path / "q")).codes("model.layers.0.self_attn.q_proj.weight")
    assert codes is not None
    drawn = integers(64, 64, 0, bits=4, group=32, symmetric=False, order=None)
    assert drawn.zeros.min() == 0
    assert np.array_equal(codes.zero_points, drawn.zeros)
    stored = load_file(tmp_path / "q" / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"].numpy()
    each = (codes_file.unpack(stored, 4) + 1) & 15
    assert not np.array_equal(each.T, drawn.zeros)


def test_integers_are_handed_out_as_they_are(base: Path, tmp_path: Path) -> None:
    make_quantized(tmp_path / "q", base, GPTQ, gptq, act_order=True)
    checkpoint = open_checkpoint(str(tmp_path / "q"))
    codes = checkpoint.codes("model.layers.0.mlp.down_proj.weight")
    assert isinstance(codes, Codes)
    drawn = integers(64, 128, list(LINEARS).index("mlp.down_proj"), bits=4, group=32, symmetric=True, order=1)
    assert np.array_equal(codes.codes, drawn.codes)
    assert codes.symmetric
    assert codes.order is not None
    assert np.array_equal(codes.order, np.argsort(codes.groups, kind="stable"))
    assert checkpoint.codes("lm_head.weight") is None


@pytest.mark.parametrize("name", ["torchao_int8", "torchao_intx4", "bnb_int8", "bnb_nf4"])
def test_weights_are_what_the_library_itself_dequantises(name: str) -> None:
    """Written by the libraries; see `tests/data/quantized/make.py`."""
    checkpoint = open_checkpoint(str(MADE / name))
    wanted = json.loads((MADE / name / "expected.json").read_text())["weights"]
    assert checkpoint.quantized is not None
    assert checkpoint.quantized.linears.keys() == wanted.keys()
    for weight, digest in wanted.items():
        found = checkpoint.tensor(weight).numpy()
        if name == "bnb_int8":  # it rounds twice: the difference is one unit in the last place
            stored = load_file(MADE / name / "model.safetensors")
            scale = stored[weight.replace("weight", "SCB")].numpy()[:, None]
            theirs = stored[weight].numpy() * scale * np.float32(7.874015718698502e-3)
            assert np.abs(found - theirs).max() <= np.abs(theirs).max() * 2.0**-23
            found = theirs
        assert hashlib.sha256(found.tobytes()).hexdigest() == digest, weight


def test_int4_tensor_has_float_zero_points_and_is_read_as_floats() -> None:
    """torchao's Int4WeightOnly, which no CPU here makes; from its source: q * scale + zero, the lower half first."""
    codes = np.array([[-8, 7, 3, -1], [0, 1, -2, 5]], np.int8)
    packed = ((codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)).astype(np.int8)
    scale, zero = np.array([[0.5, 2.0], [0.25, 4.0]], np.float32), np.array([[0.1, -3.0], [7.0, 0.3]], np.float32)
    tensors = {
        "x._weight_qdata": TensorInfo("f", "I8", (2, 2)),
        "x._weight_scale": TensorInfo("f", "BF16", (2, 2)),
        "x._weight_zero_point": TensorInfo("f", "BF16", (2, 2)),
    }
    described = {"x.weight": json.dumps({"_type": "Int4Tensor", "_data": {"block_size": [1, 2]}})}
    linear = find_torchao(tensors, described)["x.weight"]
    assert (linear.shape, linear.bits) == ((2, 4), None)
    found = linear.decode({"qdata": packed, "scale": scale, "zero_point": zero})
    assert isinstance(found, np.ndarray)
    groups = [0, 0, 1, 1]
    assert np.array_equal(found, codes * scale.T[:, groups] + zero.T[:, groups])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": (GPTQ | {"bits": 3}, "GPTQ of 3 bits, read are 4 and 8"),
    "pack_dtype": (GPTQ | {"pack_dtype": "int16"}, "pack_dtype int16"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "layout marlin"),
    "gemv": (AWQ | {"version": "gemv"}, "AWQ in the layout gemv"),
    "5 bits": (AWQ | {"bits": 5}, "AWQ of 5 bits"),
    "auto-round": (ROUND | {"packing_format": "auto_round:gptqmodel"}, "packing_format auto_round:gptqmodel"),
    "hqq": ({"quant_method": "hqq"}, "HQQ, whose zero points are floats"),
    "unknown": (
        {"quant_method": "nextgen"},
        "quantised checkpoint (nextgen): a format that is not known; read are gptq",
    ),
    "unnamed": ({"bits": 4}, "quantised checkpoint (no quant_method): a format that is not known"),
    "bits of some modules": (
        GPTQ | {"dynamic": {"-:.*gate.*": {}, r"+:.*\.down_proj.*": {"bits": 8, "group_size": 64}}},
        r"dynamic gives +:.*\.down_proj.* bits 8, group_size 64, read is one form for all",
    ),
    "bits of some modules, auto-round": (
        ROUND | {"packing_format": "auto_round:auto_awq", "extra_config": {"q_proj": {"bits": 8}}},
        "extra_config gives q_proj bits 8",
    ),
    "fp8": ({"quant_method": "fp8"}, "fp8 with scales"),
    "kv cache": (compressed(PACKED, 4, group=32, symmetric=True) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache"),
    "transforms": (
        compressed(PACKED, 4, group=32, symmetric=True) | {"transform_config": {"a": 1}},
        "transform_config",
    ),
    "sparsity": (
        compressed(PACKED, 4, group=32, symmetric=True) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config sparse-24-bitmask",
    ),
    "floats": (compressed(PACKED, 8, group=32, symmetric=True, type="float"), "weights of float8"),
    "6 bits": (compressed(PACKED, 6, group=32, symmetric=True), "weights of int6"),
    "nvfp4": (compressed("nvfp4-pack-quantized", 4, group=16, symmetric=True), "format nvfp4-pack-quantized"),
    "blocks": (compressed(PACKED, 4, group=32, symmetric=True, strategy="block"), "strategy block"),
}


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "q"
    make_quantized(out, base, GPTQ, gptq)
    return out


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_with_a_remedy(one: Path, tmp_path: Path, case: str) -> None:
    config, said = REFUSED[case]
    changed = with_config(one, tmp_path, config)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        open_checkpoint(str(changed))
    assert said in str(caught.value)
    assert "give the checkpoint that it was made from" in str(caught.value)
    assert str(caught.value).count("\n") == 0


def with_config(folder: Path, out: Path, config: dict[str, Any] | None) -> Path:
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (out / "config.json").write_text(json.dumps(raw if config is None else raw | {"quantization_config": config}))
    return out


def test_old_autogptq_has_a_file_of_its_own(one: Path, tmp_path: Path) -> None:
    folder = with_config(one, tmp_path, None)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.quantized is not None
    assert checkpoint.quantized.title == "gptq, 4 bits, groups of 32"


def test_a_quantization_config_beside_plain_numbers_is_left_over(base: Path, tmp_path: Path) -> None:
    raw = json.loads((base / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(base / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "hqq"}}))
    assert open_checkpoint(str(tmp_path)).quantized is None


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return open_checkpoint(str(out))


Q = "model.layers.0.self_attn.q_proj."


def test_tensors_that_are_not_of_one_linear_are_refused(one: Path, tmp_path: Path) -> None:
    def other_bits(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}qweight"] = torch.cat([tensors[f"{Q}qweight"]] * 2)

    with pytest.raises(CheckpointError, match=r"q_proj.\*: shapes that are not of one linear of 4 bits: mixed bits\?"):
        changed(one, tmp_path / "a", other_bits)


def test_rules_that_leave_modules_alone_are_no_other_form(one: Path, tmp_path: Path) -> None:
    rules = {"dynamic": {"-:.*lm_head.*": {}, "+:.*": {"bits": 4}}, "extra_config": {"lm_head": {"bits": 16}}}
    assert open_checkpoint(str(with_config(one, tmp_path, GPTQ | rules))).quantized is not None


@pytest.mark.parametrize(
    ("config", "write", "fields", "title"),
    [
        (
            compressed(PACKED, 4, group=32, symmetric=True),
            pack_quantized,
            {},
            "compressed-tensors (pack-quantized), 4 bits, groups of 32",
        ),
        (GPTQ | {"group_size": 128}, gptq, {"group": -1}, "gptq, 4 bits, a scale per row"),
        (GPTQ | {"group_size": None}, gptq, {"group": 64}, "gptq, 4 bits, groups of 64, a scale per row"),
    ],
    ids=["the config has it elsewhere", "a group is a row or more", "a group is a row in some"],
)
def test_the_title_has_the_groups_that_there_are(
    base: Path, tmp_path: Path, config: dict[str, Any], write: Writer, fields: dict[str, Any], title: str
) -> None:
    make_quantized(tmp_path / "q", base, config, write, **fields)
    quantized = open_checkpoint(str(tmp_path / "q")).quantized
    assert quantized is not None
    assert quantized.title == title


def test_the_last_group_may_have_fewer_columns_in_any_order() -> None:
    index = np.array([0] * 24 + [1] * 16 + [0] * 8)
    assert np.array_equal(codes_file.given_groups(index, 32, 2), index)
    with pytest.raises(CheckpointError, match="g_idx: expected 2 groups of one size"):
        codes_file.given_groups(1 - index, 32, 2)  # the first has fewer


@pytest.mark.parametrize("index", [[0] * 33 + [1] * 31, [0] * 32 + [2] * 32, [-1] * 32 + [1] * 32])
def test_a_g_idx_of_uneven_or_unknown_groups_is_refused(one: Path, tmp_path: Path, index: list[int]) -> None:
    def wrong(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}g_idx"] = torch.tensor(index, dtype=torch.int32)

    checkpoint = changed(one, tmp_path / "a", wrong)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: g_idx: expected 2 groups of one size"):
        checkpoint.tensor(f"{Q}weight")


def test_a_scale_that_is_no_number_is_found_before_anything_is_written(one: Path, tmp_path: Path) -> None:
    def wrong(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}scales"][0, 3] = float("nan")

    checkpoint = changed(one, tmp_path / "a", wrong)
    expected = {f"{Q}weight": (64, 64)}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: 1 NaN or Inf"):
        checkpoint.validate(expected | {n: i.shape for n, i in checkpoint.tensors.items() if n != f"{Q}weight"})


def test_torchao_without_a_word_of_its_types_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MADE / "torchao_int8", tmp_path / "q")
    save_file(load_file(tmp_path / "q" / "model.safetensors"), tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match="the file's header does not say its type"):
        open_checkpoint(str(tmp_path / "q"))


def test_4_bits_of_bitsandbytes_whose_files_are_not_here_are_refused() -> None:
    """Their shapes are in the files, not in the headers."""
    tensors = {
        f"{Q}weight": TensorInfo("f", "U8", (2048, 1)),
        f"{Q}weight.quant_state.bitsandbytes__nf4": TensorInfo("f", "U8", (80,)),
    }
    with pytest.raises(CheckpointError, match="its shape is in the files, not in their headers; download them"):
        find_bitsandbytes(tensors, None)


def test_int8_that_is_not_row_by_row_is_refused(tmp_path: Path) -> None:
    def column(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}weight_format"] = torch.tensor(1, dtype=torch.uint8)

    checkpoint = changed(MADE / "bnb_int8", tmp_path / "q", column)
    with pytest.raises(CheckpointError, match="weight_format 1, read is 0"):
        checkpoint.tensor(f"{Q}weight")


def test_the_packing_of_compressed_tensors_itself_is_read() -> None:
    """Its own functions, where it is installed, in the place of the writer that the other tests have."""
    pack = pytest.importorskip("compressed_tensors.compressors").pack_to_int32
    for rows, columns, bits in ((64, 128, 4), (32, 64, 8)):
        drawn = integers(rows, columns, 5, bits=bits, group=32, symmetric=False, order=None)
        middle = 1 << (bits - 1)
        signed = torch.from_numpy(drawn.codes - middle).to(torch.int8)
        zeros = torch.from_numpy(drawn.zeros - middle).to(torch.int8)
        ours = pack_quantized(drawn)
        assert np.array_equal(pack(signed, bits).numpy(), ours["weight_packed"])
        assert np.array_equal(pack(zeros, bits, packed_dim=0).numpy(), ours["weight_zero_point"])


@pytest.fixture
def ordered(base: Path, tmp_path: Path) -> Path:
    make_quantized(tmp_path / "ordered", base, GPTQ | {"desc_act": True}, gptq, act_order=True)
    return tmp_path / "ordered"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{Q}g_idx"), r"q_proj\.g_idx is missing, which desc_act needs"),
        (
            lambda tensors: tensors.update({f"{Q}weight": torch.zeros(64, 64)}),
            r"q_proj\.weight is there as numbers and in few bits",
        ),
    ],
    ids=["no g_idx", "numbers beside"],
)
def test_what_would_give_other_weights_without_a_word_is_refused(
    ordered: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        changed(ordered, tmp_path / "a", change)


def test_a_group_size_that_is_not_of_the_scales_is_refused(ordered: Path) -> None:
    raw = json.loads((ordered / "config.json").read_text())
    raw["quantization_config"]["group_size"] = 16
    (ordered / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"down_proj\.scales: 4 groups of 128 inputs, config\.json says 16"):
        open_checkpoint(str(ordered))


@pytest.mark.parametrize(
    ("config", "fields", "part"),
    [
        ({"symmetric": True, "actorder": "group"}, {"act_order": True}, "weight_g_idx"),
        ({"symmetric": False}, {"symmetric": False}, "weight_zero_point"),
    ],
    ids=["act-order", "asymmetric"],
)
def test_compressed_tensors_lack_nothing_that_their_config_asks_for(
    base: Path, tmp_path: Path, config: dict[str, Any], fields: dict[str, Any], part: str
) -> None:
    make_quantized(tmp_path / "c", base, compressed(PACKED, 4, group=32, **config), pack_quantized, **fields)
    with pytest.raises(CheckpointError, match=rf"q_proj\.{part} is missing, which config\.json asks for"):
        changed(tmp_path / "c", tmp_path / "a", lambda tensors: tensors.pop(f"{Q}{part}"))

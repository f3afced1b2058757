"""LoRA adapters: read by name, refused by name, merged as the formula says; from export to verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import PREFIX, factors, write_adapter
from support.checkpoints import make_checkpoint
from support.hub import local_hub, point_to

from olmo2_export import cli
from olmo2_export.config import ModelConfig
from olmo2_export.views.weight_checks import weight_checks
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.merged import open_merged
from runtimes.errors import CheckpointError, CheckpointNotFoundError, ConfigError, Olmo2ExportError, UsageError
from runtimes.manifest_file import read_manifest
from runtimes.package import open_package

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "chatty", factors(tiny_checkpoint))


def merged(base: Path, *adapters: Path | str) -> Checkpoint:
    return open_merged(str(base), lora=list(map(str, adapters)))


def test_a_weight_reads_as_w_plus_s_b_a_by_row_by_part_and_whole(tiny_checkpoint: Path, adapter: Path) -> None:
    tensors, base = factors(tiny_checkpoint), open_checkpoint(str(tiny_checkpoint))
    found = merged(tiny_checkpoint, adapter)
    a, b = (tensors[f"{PREFIX}{Q0}.lora_{factor}.weight"].double() for factor in "AB")
    want = (base.tensor(f"{Q0}.weight").double() + 2 * (b @ a)).float()
    assert torch.equal(found.tensor(f"{Q0}.weight"), want)
    assert torch.equal(torch.cat([part.clone() for part in found.rows(f"{Q0}.weight")]), want)
    rows = torch.tensor([5, 0, 5, 95])
    assert torch.equal(found.picked(f"{Q0}.weight", rows), want[rows])
    norm = "model.layers.0.self_attn.q_norm.weight"
    assert torch.equal(found.tensor(norm), base.tensor(norm))  # no adapter has it
    assert len(found.changed) == 7 * 3
    assert base.changed == frozenset()


def test_adapters_are_merged_in_order_and_dora_sees_what_was_merged_before(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = factors(tiny_checkpoint, ["q_proj"], seed=1)
    magnitudes = {
        f"{PREFIX}model.layers.{n}.self_attn.q_proj.lora_magnitude_vector": torch.rand(96) + 0.5 for n in range(3)
    }
    dora = write_adapter(tmp_path / "dora", tensors | magnitudes, target_modules=["q_proj"], use_dora=True)
    first = merged(tiny_checkpoint, adapter).tensor(f"{Q0}.weight").double()
    a, b = (tensors[f"{PREFIX}{Q0}.lora_{factor}.weight"].double() for factor in "AB")
    v = first + 2 * (b @ a)
    want = v / v.norm(dim=1, keepdim=True) * magnitudes[f"{PREFIX}{Q0}.lora_magnitude_vector"].double()[:, None]
    torch.testing.assert_close(merged(tiny_checkpoint, adapter, dora).tensor(f"{Q0}.weight"), want.float())
    other = merged(tiny_checkpoint, dora, adapter).tensor(f"{Q0}.weight")
    assert (other - want.float()).abs().max() > 0.1


def test_a_bfloat16_base_is_merged_in_float32(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    found = merged(base, write_adapter(tmp_path / "lora", factors(base)))
    assert found.tensor(f"{Q0}.weight").dtype == torch.float32
    assert not torch.equal(found.tensor(f"{Q0}.weight"), found.tensor(f"{Q0}.weight").bfloat16().float())


def _config(**fields: Any) -> Callable[[Path, dict[str, torch.Tensor]], dict[str, Any]]:
    return lambda _, __: fields


def _renamed(old: str, new: str) -> Callable[[Path, dict[str, torch.Tensor]], dict[str, Any]]:
    def change(_: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        tensors[f"{PREFIX}{new}"] = tensors.pop(f"{PREFIX}{old}")
        return {}

    return change


def _added(name: str, *shape: int, **fields: Any) -> Callable[[Path, dict[str, torch.Tensor]], dict[str, Any]]:
    def change(_: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        tensors[f"{PREFIX}{name}"] = torch.zeros(shape)
        return fields

    return change


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (_config(peft_type="IA3"), ConfigError, "peft_type 'IA3'; this version reads LORA"),
        (_config(lora_bias=True), ConfigError, "lora_bias (a bias of its own"),
        (_config(trainable_token_indices=[1]), ConfigError, "trainable_token_indices (rows of the embedding"),
        (_config(layer_replication=[[0, 2], [1, 3]]), ConfigError, "layer_replication (copies of layers)"),
        (_config(target_parameters=["x"]), ConfigError, "target_parameters (parameters that are no module's"),
        (_config(alora_invocation_tokens=[7]), ConfigError, "alora_invocation_tokens (aLoRA"),
        (_config(use_qalora=True), ConfigError, "use_qalora (QALoRA"),
        (_config(use_bdlora={"nblocks": 2}), ConfigError, "use_bdlora (block-diagonal"),
        (_config(kasa_config={"a": 1}), ConfigError, "kasa_config (KaSA)"),
        (_config(arrow_config={"a": 1}), ConfigError, "arrow_config (Arrow"),
        (_config(velora_config={"a": 1}), ConfigError, "velora_config (VeLoRA)"),
        (_config(monteclora_config={"a": 1}), ConfigError, "monteclora_config (MonteCLoRA)"),
        (_config(megatron_config={"a": 1}), ConfigError, "megatron_config (Megatron"),
        *(
            (_config(init_lora_weights=init), ConfigError, f"init_lora_weights '{init}' (its training began with")
            for init in ("pissa", "pissa_niter_16", "olora", "corda", "eva", "loftq", "lora_ga")
        ),
        (_config(new_kind={"a": 1}), ConfigError, "new_kind {'a': 1} (not known here); merge it with PEFT"),
        (_config(r=0), ConfigError, "r 0 (an integer from 1 to"),
        (_config(lora_alpha="8"), ConfigError, "lora_alpha '8' (a positive number)"),
        (_config(target_modules="q_proj("), ConfigError, "target_modules 'q_proj(' (a list of names, or"),
        (_config(rank_pattern={"q_proj": -1}), ConfigError, "rank_pattern {'q_proj': -1}"),
        (_config(layers_to_transform=[0], layers_pattern="blocks"), ConfigError, "layers_pattern 'blocks'"),
        (_config(r=8), CheckpointError, "lora_A.weight: shape [4, 160], expected [8, 160]"),
        (_config(target_modules=["q_proj"]), CheckpointError, "for no module that the model has and the config names"),
        (_config(target_modules=["q_proj", "c_attn"]), CheckpointError, "none that can be adapted: c_attn"),
        (_config(modules_to_save=["value_head"]), CheckpointError, "none that can be adapted: value_head"),
        (_config(modules_to_save=["lm_head"]), CheckpointError, "missing, though in modules_to_save: lm_head.weight"),
        (_config(use_dora=True), CheckpointError, "missing: model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        (_renamed(f"{Q0}.lora_A.weight", f"{Q0}.lora_C.weight"), CheckpointError, f"missing: {Q0}.lora_A"),
        (_renamed(f"{Q0}.lora_A.weight", "x.lora_A.weight"), CheckpointError, f"{PREFIX}x.lora_A.weight"),
        (_added(f"{Q0}.lora_magnitude_vector", 96), CheckpointError, "not what the config says"),
        (_added(f"{Q0}.base_layer.bias", 96, bias="lora_only"), CheckpointError, "base_layer.bias"),
        (_added("lm_head.weight", 133, 96), CheckpointError, "lm_head.weight: shape [133, 96], expected [131, 96]"),
    ],
)
def test_what_is_another_formula_or_does_not_fit_is_refused_by_name(
    tiny_checkpoint: Path,
    tmp_path: Path,
    change: Callable[[Path, dict[str, torch.Tensor]], dict[str, Any]],
    kind: type[Olmo2ExportError],
    said: str,
) -> None:
    tensors = factors(tiny_checkpoint)
    fields = change(tiny_checkpoint, tensors)
    with pytest.raises(kind) as caught:
        merged(tiny_checkpoint, write_adapter(tmp_path / "lora", tensors, **fields))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_change_nothing_are_let_through(tiny_checkpoint: Path, tmp_path: Path) -> None:
    fields = {"lora_dropout": 0.1, "bias": "all", "init_lora_weights": "gaussian", "peft_version": "0.99", "new": None}
    found = merged(tiny_checkpoint, write_adapter(tmp_path / "lora", factors(tiny_checkpoint), **fields))
    assert f"{Q0}.weight" in found.changed


def test_a_tied_embedding_is_not_adapted_as_the_head_would_change_too(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = factors(base, ["q_proj"]) | {f"{PREFIX}lm_head.weight": torch.zeros(131, 96)}
    lora = write_adapter(tmp_path / "lora", tensors, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: changed, but embedding and lm_head are one weight"):
        merged(base, lora)


def test_what_is_not_finite_or_of_another_base_is_found_when_the_weights_are_checked(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = factors(tiny_checkpoint, ["q_proj"])
    tensors[f"{PREFIX}{Q0}.lora_A.weight"][1, 2] = float("nan")
    embedding = open_checkpoint(str(tiny_checkpoint)).tensor("model.embed_tokens.weight")
    tensors |= {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(4, 131),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.zeros(96, 4),
        f"{PREFIX}model.embed_tokens.base_layer.weight": embedding * 2,
    }
    found = merged(tiny_checkpoint, write_adapter(tmp_path / "x", tensors, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(CheckpointError) as caught:
        found.validate({name: info.shape for name, info in found.tensors.items()})
    assert "q_proj.lora_A.weight: 1 NaN or Inf" in str(caught.value)
    assert "not equal to model.embed_tokens.weight of tiny; was it trained on another model?" in str(caught.value)


def test_what_is_no_adapter_is_refused(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no adapter_config\.json; expected a LoRA adapter as PEFT"):
        merged(tiny_checkpoint, tiny_checkpoint)
    with pytest.raises(CheckpointNotFoundError, match="expected the folder of a LoRA adapter, or a Hub id"):
        merged(tiny_checkpoint, tmp_path / "nothing")
    with pytest.raises(UsageError, match="chatty twice; give each a name of its own, as in DIR=NAME"):
        merged(tiny_checkpoint, adapter, adapter)
    with pytest.raises(UsageError, match=r"the name '\.\./x'; expected letters"):
        merged(tiny_checkpoint, f"{adapter}=../x")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointNotFoundError, match=r"adapter_model\.bin is never read: convert it to safetensors"):
        merged(tiny_checkpoint, adapter)
    with pytest.raises(CheckpointNotFoundError, match="give its base model, and the adapter with --lora"):
        open_checkpoint(str(write_adapter(tmp_path / "alone", factors(tiny_checkpoint))))


def test_an_adapter_on_the_hub_is_downloaded_as_a_checkpoint_is(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_hub(adapter) as hub:
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        found = merged(tiny_checkpoint, "owner/tiny-olmo2@main=chat")
        here = merged(tiny_checkpoint, adapter)
        assert torch.equal(found.tensor(f"{Q0}.weight"), here.tensor(f"{Q0}.weight"))
        with pytest.raises(CheckpointNotFoundError):
            merged(tiny_checkpoint, "owner/other")


@pytest.mark.usefixtures("traces", "remembered")
def test_a_merged_package_says_so_and_is_compared_with_base_and_adapter_alone(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, base = tmp_path / "package", str(tiny_checkpoint)
    write = ["export", base, "--out", str(out), "--lora", f"{adapter}=chat"]
    assert cli.main([*write, "--dry-run"]) == 0
    assert (
        cli.main([*write, "--variant", "fp32", "--variant", "q8", "--no-prefill-graph", "--kv-cache", "float32"]) == 0
    )
    package, merged_too = open_package(out), merged(tiny_checkpoint, adapter)
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    for checkpoint, right in ((merged_too, True), (open_checkpoint(base), False)):
        checks = weight_checks(package, package.variant("q8"), checkpoint, config)
        assert all(check.passed for check in checks) == right
    (source,) = read_manifest(out)[0].source.adapters
    assert (source.name, source.model, source.kind, source.base) == ("chat", "chatty", "folder", "owner/base")
    assert sorted(source.files) == ["adapter_config.json", "adapter_model.safetensors"]
    verify = ["verify", str(out), "--reference", base, "--variant", "fp32"]
    assert cli.main([*verify, "--locate", "--lora", f"{adapter}=chat"]) == 0
    capsys.readouterr()
    assert cli.main(verify) == 2
    assert "--lora: missing; the package has chat merged: give --lora DIR" in capsys.readouterr().err
    other = write_adapter(tmp_path / "other", factors(tiny_checkpoint, seed=3))
    assert cli.main([*verify, "--lora", str(other)]) == 2
    assert "--lora: other has other files than were merged; the package has chat" in capsys.readouterr().err
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["adapters"][0]["name"] == "chat"


def test_a_package_of_the_base_alone_is_not_verified_with_an_adapter(
    tiny_checkpoint: Path, tiny_package: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_package), "--reference", str(tiny_checkpoint), "--lora", str(adapter)]
    for verb in (["verify"], ["verify", "--locate"], ["report", "--out", str(adapter.parent / "report")]):
        assert cli.main([verb[0], *command, *verb[1:]]) == 2
        assert "--lora: the package was exported without an adapter; leave it out" in capsys.readouterr().err

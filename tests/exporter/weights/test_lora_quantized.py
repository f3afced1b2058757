"""LoRA adapters beside a quantised checkpoint (QLoRA): its integers are taken over, the adapters are inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import LINEARS, factors, write_adapter
from support.quantized import gptq, make_base, make_quantized
from transformers import Olmo2ForCausalLM

from olmo2_export.config import ModelConfig
from olmo2_export.measure import quality
from olmo2_export.package.export import export
from olmo2_export.quantize.imported import IMPORTED
from olmo2_export.verify.adapters import adapter_checks
from olmo2_export.views.runners import open_form
from olmo2_export.views.table import variant_views
from olmo2_export.weights.merged import open_merged
from runtimes import Package, open_package, open_runner
from runtimes.errors import UsageError
from runtimes.ort.adapters import Adapters
from runtimes.targets import find_target

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Setting `save_embedding_layers`")
IDS = np.random.default_rng(0).integers(0, 19, 21)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, q: the same in integers with act-order, chat: an adapter, plain: the dequantised weights."""
    root = tmp_path_factory.mktemp("qlora")
    base = make_base(root / "base")
    weights = make_quantized(root / "q", base, CONFIG, gptq, act_order=True, symmetric=False)
    write_adapter(root / "chat", factors(base))
    (root / "plain").mkdir()
    (root / "plain" / "config.json").write_bytes((base / "config.json").read_bytes())
    state = load_file(base / "model.safetensors") | {name: torch.from_numpy(w) for name, w in weights.items()}
    save_file(state, root / "plain" / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    checkpoint = open_merged(str(folder / "q"), switchable=[str(folder / "chat")])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quality, "_MOST_TOKENS", 64)  # it is not what is looked at here
        monkeypatch.setattr(quality, "_LENGTH", 64)
        export(checkpoint, folder / "package", variants=["fp32", "q4"])
    return open_package(folder / "package")


@pytest.fixture(scope="module")
def want(folder: Path) -> np.ndarray:
    """PEFT's logits of IDS, on the dequantised weights."""
    model = peft.PeftModel.from_pretrained(Olmo2ForCausalLM.from_pretrained(folder / "plain"), folder / "chat").eval()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(LINEARS)
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return logits


@pytest.mark.parametrize(("variant", "limit"), [("fp32", 2e-5), ("q4", 2e-5)])
def test_logits_are_those_of_peft_on_the_dequantised_weights(
    folder: Path, package: Package, want: np.ndarray, variant: str, limit: float
) -> None:
    """Of q4 in the form that rounds no inputs: what its kernels round, they round with or without an adapter."""
    checkpoint = open_merged(str(folder / "q"), switchable=[str(folder / "chat")])
    config = ModelConfig.from_json(folder / "q" / "config.json")
    view = variant_views(package, package.variant(variant), checkpoint, config, find_target("ort"))[0]
    if view.as_stored:
        opened = open_runner(package, variant=variant)
    else:
        adapters = Adapters(package.folder, {"chat": package.manifest.adapters["chat"].file}, view.variant, None)
        opened = open_form(view.graph, view.model, view.variant, package.model, adapters=adapters)
    with opened as runner:
        found = runner.prefill([IDS], all_positions=True, adapter="chat")[0]
        runner.reset()
        plain = runner.prefill([IDS], all_positions=True)[0]
    assert np.abs(found - want).max() < limit
    assert np.abs(plain - want).max() > 0.3


def test_the_integers_are_taken_over_and_verify_runs_the_adapter(folder: Path, package: Package) -> None:
    entry = package.variant("q4")
    assert entry.quantization is not None
    assert entry.quantization.recipe == IMPORTED
    checkpoint = open_merged(str(folder / "q"), switchable=[str(folder / "chat")])
    config = ModelConfig.from_json(folder / "q" / "config.json")
    view = variant_views(package, entry, checkpoint, config, find_target("ort"))[0]
    (check,) = adapter_checks(package, view, checkpoint, config, IDS)
    assert (check.name, check.failures) == ("adapter chat", ())


def test_an_adapter_is_not_merged_into_integers(folder: Path) -> None:
    with pytest.raises(UsageError, match="take over none; keep it apart with --lora-inputs"):
        open_merged(str(folder / "q"), lora=[str(folder / "chat")])

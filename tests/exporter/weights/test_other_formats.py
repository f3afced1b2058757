"""What is near to a checkpoint of an OLMo 2, and none: each is named in one line that says what to do.

Locally and on a hub of our own, of which no weights are downloaded to find out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support.checkpoints import SHAPE
from support.hub import REPOSITORY, Hub, local_hub
from support.matrix import refused as seen_refused

from olmo2_export import cli
from olmo2_export.config import ModelConfig
from olmo2_export.weights import hub
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import ConfigError

OLMO2 = SHAPE | {"model_type": "olmo2"}
CORE = {"model": {"d_model": 96, "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig"}, "trainer": {}}
# mlx-lm writes its table under both names
MLX = OLMO2 | {key: {"group_size": 64, "bits": 4} for key in ("quantization", "quantization_config")}
# as AI2's own code writes it, in names of its own
HF_OLMO = {"model_type": "hf_olmo", "d_model": 96, "n_heads": 6, "n_layers": 3, "architectures": ["OLMoForCausalLM"]}

Files = Mapping[str, object]


def write(folder: Path, files: Files) -> Path:
    """Write files, tables as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


Refused = Callable[..., str]


@pytest.fixture
def refused(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run export on a model, which must be refused; give the line, which the support matrix has under `kind`."""

    def run(model: str, kind: str = "") -> str:
        assert cli.main(["export", model, "--out", str(tmp_path / "out")]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]  # beside progress bars
        assert error.startswith("olmo2-export: error: ")
        assert not (tmp_path / "out").exists()
        if kind:
            seen_refused(request, kind, error)
        return error

    return run


def test_olmoe_is_a_mixture_of_experts(tmp_path: Path, refused: Refused) -> None:
    error = refused(str(write(tmp_path / "m", whole({"model_type": "olmoe", "num_experts": 64}))), "OLMoE")
    assert "model_type olmoe: OLMoE, a mixture of experts, which no graph here has; transformers, vLLM and" in error
    assert "vocab_size" not in error  # what is missing of an OLMo 2 is no news


def test_flex_olmo_is_a_mixture_of_experts(tmp_path: Path, refused: Refused) -> None:
    error = refused(str(write(tmp_path / "m", whole(SHAPE | {"model_type": "flex_olmo"}))), "FlexOlmo")
    assert "model_type flex_olmo: FlexOlmo, a mixture of experts, which no graph here has; transformers and" in error


def test_olmo_hybrid_has_linear_attention(tmp_path: Path, refused: Refused) -> None:
    error = refused(str(write(tmp_path / "m", whole(SHAPE | {"model_type": "olmo_hybrid"}))), "OLMo Hybrid")
    assert "model_type olmo_hybrid: OLMo Hybrid, most of whose layers are linear attention" in error


def test_hf_olmo_names_the_repository_with_hf(tmp_path: Path, refused: Refused) -> None:
    for weights in ("model.safetensors", "pytorch_model.bin"):  # the pickle is not what is wrong with it
        folder = write(tmp_path / weights, {"config.json": HF_OLMO, weights: ""})
        error = refused(str(folder), "OLMo 1 as `hf_olmo`")
        assert "model_type hf_olmo: OLMo 1 in the form for AI2's own code; give the repository whose" in error
        assert "ends in -hf, such as allenai/OLMo-7B-hf" in error


def test_olmo_1124_names_the_released_repository(tmp_path: Path, refused: Refused) -> None:
    error = refused(str(write(tmp_path / "m", whole(SHAPE | {"model_type": "olmo_1124"}))), "OLMo 2 as `olmo_1124`")
    assert "model_type olmo_1124: OLMo 2 under its preview's name; give the released repository" in error


@pytest.mark.parametrize(("kind", "said"), [("molmo", "Molmo, which"), ("molmo2", "Molmo 2, which")])
def test_molmo_reads_pictures(tmp_path: Path, refused: Refused, kind: str, said: str) -> None:
    error = refused(
        str(write(tmp_path / "m", whole({"model_type": kind, "text_config": {}}))), said.removesuffix(", which")
    )
    assert f"model_type {kind}: {said} reads pictures, and no graph here does; transformers" in error


def test_a_model_type_that_is_no_word_is_none_of_them() -> None:
    for kind in (["olmoe"], {"olmoe": 1}, None, "OLMoE"):
        with pytest.raises(ConfigError, match=r"cannot express model_type .*only"):
            ModelConfig.from_dict(SHAPE | {"model_type": kind})


def test_mlx_weights_have_a_float_bias(tmp_path: Path, refused: Refused) -> None:
    error = refused(str(write(tmp_path / "m", whole(MLX))), "weights of MLX")
    assert "weights quantised by MLX (quantization, of group_size and bits), which have a float bias per group" in error
    assert "give the model that they were made from, or run it with mlx-lm" in error
    assert "weights of MLX" in refused(str(write(tmp_path / "old", {"config.json": OLMO2, "weights.npz": ""})))


def test_a_gguf_file_or_folder_names_llama_cpp(tmp_path: Path, refused: Refused) -> None:
    said = "it is llama.cpp's, which runs it; give the checkpoint it was made from, in Hugging Face format"
    folder = write(tmp_path / "m", {"olmo2-q4_k_m.gguf": "GGUF", "blob": "GGUF and more"})
    assert f"{folder}: GGUF files, not a checkpoint; {said}" in refused(str(folder), "GGUF")
    for name in ("olmo2-q4_k_m.gguf", "blob"):  # a blob of ollama's has no ending
        assert f"{name}: a GGUF file; {said}" in refused(str(folder / name))
    nested = write(tmp_path / "n", {"Q4_K_M/olmo2-00001-of-00002.gguf": ""})
    assert f"GGUF files, not a checkpoint; {said}" in refused(str(nested))


def test_a_safetensors_file_is_part_of_a_folder(tmp_path: Path, refused: Refused) -> None:
    folder = write(tmp_path / "m", whole(OLMO2))
    assert "a file; give the folder that it is in" in refused(str(folder / "model.safetensors"))


def test_an_olmo_core_checkpoint_names_its_converter(tmp_path: Path, refused: Refused) -> None:
    said = "a checkpoint of OLMo-core; convert it to Hugging Face format first, with OLMo-core's src/examples/hugg"
    parts = {"model_and_optim/.metadata": "", "model_and_optim/__0_0.distcp": "", ".metadata.json": "{}"}
    for name, files in {
        "whole": {"config.json": CORE, "train/rank0.pt": "", **parts},
        "without-config": parts,
        "config-alone": {"config.json": {"model": {"d_model": 96}}},
        "beside-weights": {"config.json": CORE, "model.safetensors": ""},
    }.items():
        assert said in refused(str(write(tmp_path / name, files)), "OLMo-core's checkpoints"), name
    assert said in refused(str(tmp_path / "whole" / "model_and_optim"))
    assert said not in refused(str(write(tmp_path / "torch", {"__0_0.distcp": "", ".metadata": ""})))


def test_an_old_olmo_checkpoint_names_hf_and_its_converters(tmp_path: Path, refused: Refused) -> None:
    for weights in ("model.pt", "model.safetensors"):
        error = refused(
            str(write(tmp_path / weights, {"config.yaml": "model:\n  d_model: 96\n", weights: ""})),
            "checkpoints of AI2's trainer",
        )
        assert "a checkpoint of AI2's OLMo trainer (config.yaml beside model.pt or model.safetensors)" in error
        assert "whose name ends in -hf" in error
        assert "scripts/convert_olmo2_to_hf.py" in error


# On the Hub


def whole(config: Mapping[str, object]) -> Files:
    return {"config.json": config, "model.safetensors": "not read before config.json"}


@contextmanager
def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a folder as `REPOSITORY`."""
    with local_hub(folder) as running, monkeypatch.context() as patch:
        cache = folder.parent / f"cache-{folder.name}"
        patch.setattr(hub, "snapshot_download", partial(hub.snapshot_download, endpoint=running.url, cache_dir=cache))
        patch.setattr(hub, "HfApi", partial(hub.HfApi, endpoint=running.url))
        yield running


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (whole({"model_type": "olmoe"}), "config.json: model_type olmoe: OLMoE"),
        (whole({"model_type": "molmo2"}), "config.json: model_type molmo2: Molmo 2"),
        (whole(HF_OLMO), "such as allenai/OLMo-7B-hf"),
        (whole(MLX), "config.json: weights quantised by MLX"),
        (whole(CORE), "config.json: a checkpoint of OLMo-core"),
        ({"olmo2-q4_k_m.gguf": "", "README.md": ""}, "GGUF files, not a checkpoint; it is llama.cpp's"),
        ({"config.json": OLMO2, "Q8/olmo2.gguf": ""}, "GGUF files, not a checkpoint; it is llama.cpp's"),
        ({"model_and_optim/.metadata": "", "README.md": ""}, "a checkpoint of OLMo-core"),
        ({"config.yaml": "", "model.pt": ""}, "a checkpoint of AI2's OLMo trainer"),
        ({"config.json": OLMO2, "pytorch_model.bin": ""}, "pytorch_model.bin is never read: convert it"),
        ({"step-9/config.json": OLMO2, "step-10/config.json": OLMO2}, f"{REPOSITORY} --include 'step-10/*'"),
    ],
)
def test_a_repository_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, files: Files, said: str
) -> None:
    with on_the_hub(write(tmp_path / "served", files), monkeypatch) as running:
        error = refused(REPOSITORY)
    assert f"error: {REPOSITORY}: " in error
    assert said in error
    assert not re.search(r"Fetching|Download|\d%|it/s|0\.00", error), error  # no bar of what is not taken
    fetched = {name for name, _ in running.downloads}
    assert fetched <= {"config.json"}, fetched


def test_a_repository_that_cannot_be_asked_again_is_told_by_what_is_here(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_the_hub(write(tmp_path / "served", {"config.json": OLMO2, "m.gguf": ""}), monkeypatch):

        class Offline:
            def list_repo_files(self, *_: object, **__: object) -> None:
                raise ConnectionResetError("reset")

        monkeypatch.setattr(hub, "HfApi", Offline)
        assert "neither model.safetensors nor model.safetensors.index.json" in refused(REPOSITORY)


def test_a_checkpoint_beside_other_formats_is_read(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file, a trainer's config.yaml or an MLX folder's neighbour change nothing."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    write(folder, {"m.gguf": "GGUF", "config.yaml": "", "quantization.json": {"group_size": 64, "bits": 4}})
    tensors = open_checkpoint(str(tiny_checkpoint)).tensors
    assert open_checkpoint(str(folder)).tensors == tensors
    with on_the_hub(folder, monkeypatch) as running:
        assert open_checkpoint(REPOSITORY).tensors == tensors
    assert "m.gguf" not in {name for name, _ in running.downloads}

"""What quantising costs OLMo 1 and Olmo 3: of trained weights, as the quality of random ones says nothing.

`python -m olmo2_export.demo.train kjv.txt --out DIR --model-type olmo --small --epochs 1` made `tests/data/olmo1`,
whose held-out perplexity is 81.4. Olmo 3 takes the demo's weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import olmo2_export.demo
from olmo2_export.catalog import find
from olmo2_export.cli import main
from olmo2_export.measure.quality import broken_limits
from runtimes.package import open_package

DEMO = Path(olmo2_export.demo.__file__).parent
OLMO1 = Path(__file__).parents[2] / "data" / "olmo1"


@pytest.fixture(scope="module")
def olmo3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's weights, whose mathematics Olmo 3 has too, with a window of 128 tokens in two layers of three."""
    folder = tmp_path_factory.mktemp("olmo3") / "demo"
    folder.mkdir()
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    plain = config["rope_parameters"]
    config |= {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": plain, "sliding_attention": plain},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["olmo", "olmo3"])
def trained(request: pytest.FixtureRequest) -> Path:
    return OLMO1 if request.param == "olmo" else request.getfixturevalue("olmo3")


@pytest.mark.usefixtures("remembered", "short_rows")
def test_quantised_it_holds_the_gates_of_quality(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "--out", str(tmp_path / "p"), "--variant", "q4"]) == 0
    variant = open_package(tmp_path / "p").manifest.variants["q4"]
    gates = find("q4").weights.gates
    assert gates is not None
    assert variant.quality is not None
    assert variant.quality.tokens_from == "text"
    assert broken_limits(variant.quality, gates[0]) == []
    assert variant.prefill is not None  # int8 by int8 holds them too
    verify = ["verify", str(tmp_path / "p"), "--reference", str(trained), "--longest", "64"]
    assert main(verify) == 0
    assert "q4 on ort: kernel parity passed, quality passed" in capsys.readouterr().out

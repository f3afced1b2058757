"""What the exporter asks of a package on the Hub: it reads it, and writes nothing to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.hub import REPOSITORY, fetched, local_hub, point_to

from olmo2_export import cli

NAME = f"hf:{REPOSITORY}"


@pytest.mark.usefixtures("remembered", "little_text", "short_rows")
def test_it_is_verified_and_evaluated_where_it_lies(
    tiny_package: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids, out, cache = tmp_path / "ids.npy", tmp_path / "parity.json", tmp_path / "cache"
    np.save(ids, np.arange(200) % 131)
    with local_hub(tiny_package) as hub:
        point_to(monkeypatch, hub.url, cache)
        assert cli.main(["evaluate", NAME, "--variant", "fp32", "--text", str(ids)]) == 0
        assert fetched(hub) == ["config.json", "manifest.json", "model.onnx", "model.onnx_data"]
        verify = ["verify", NAME, "--reference", str(tiny_checkpoint), "--longest", "16"]
        assert cli.main(verify) == 0
        assert "the report is not kept; --out FILE writes it elsewhere" in caplog.text
        assert not list(cache.rglob("parity.json"))
        assert cli.main([*verify, "--out", str(out)]) == 0
        assert out.is_file()
        assert f"verified: {NAME} against tiny" in capsys.readouterr().out

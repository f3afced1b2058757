"""Checkpoint -> ONNX by optimum-onnx's own exporter. Runs in the interpreter of optimum-onnx.

    python -m olmo2_export.bench.workers.convert_optimum CHECKPOINT OUT

Its validation, a second model in memory, is left out. Its transformers is of version 4, which finds the base of RoPE
beside the other fields of config.json; newer checkpoints have it in `rope_parameters`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from optimum.exporters.onnx import main_export  # type: ignore[import-not-found]

from olmo2_export.bench.workers.common import finish


def old_form(config: dict[str, object]) -> dict[str, object]:
    """Return config.json as transformers 4 writes it.

    Raises:
        ValueError: RoPE is scaled, which has another form there.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"RoPE of type {rope['rope_type']}: expected default")
    rest = {name: value for name, value in config.items() if name != "rope_parameters"}
    return {**rest, "rope_theta": rope["rope_theta"], "rope_scaling": None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="olmo2-bench-") as name:
        folder = Path(name)
        for path in args.checkpoint.resolve().iterdir():
            if path.name != "config.json" and path.suffix in (".json", ".safetensors"):
                (folder / path.name).symlink_to(path)
        config = old_form(json.loads((args.checkpoint / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config))
        main_export(
            str(folder), args.out, task="text-generation-with-past", dtype="fp32", device="cpu", do_validation=False
        )
    finish({"bytes": sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())})


if __name__ == "__main__":
    main()

"""Measure the exporter on a real shape with random weights: seconds and peak memory of each stage.

    python -m olmo2_export.bench --size 1B

Each stage runs as a process of its own, as a user runs it, so that its peak memory is its own: the largest resident
set that the kernel saw, mapped files included. The weights are one random block repeated; neither time nor memory of
an export depends on their values. The last line of stdout is JSON; its keys carry the units.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from olmo2_export.config import ModelConfig
from olmo2_export.model import Olmo2ForCausalLM
from runtimes.errors import FailedError

SIZES: dict[str, dict[str, int]] = {
    "demo": {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "1B": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 100_352,
    },
}
"""the shapes that can be measured; 1B is that of allenai/OLMo-2-0425-1B"""

_BLOCK = 1 << 22  # weights


def write_checkpoint(folder: Path, size: str) -> int:
    """Write a bfloat16 checkpoint of a size of `SIZES`; return its bytes."""
    raw = {
        **SIZES[size],
        "model_type": "olmo2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "eos_token_id": SIZES[size]["vocab_size"] - 1,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in Olmo2ForCausalLM(ModelConfig.from_dict(raw)).state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator).mul_(0.02).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for start in tqdm(range(0, end, len(block)), desc=f"writing a random {size} checkpoint", leave=False):
            file.write(block[: end - start])
    return end


def measure(stage: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run one stage of the command line as its own process.

    Returns:
        seconds, and peak_memory_mb: of the process, or of the largest it started.

    Raises:
        FailedError: it did not exit with 0.
    """
    command = [sys.executable, "-m", "olmo2_export", stage, *arguments]
    started = time.monotonic()
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status) != 0:
        raise FailedError(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    return {"stage": stage, "seconds": round(seconds, 1), "peak_memory_mb": round(usage.ru_maxrss * 1024 / 1e6)}


def run(size: str, work: Path, build: bool) -> dict[str, Any]:
    """Measure export, and build if asked for, in an empty folder; return what the last line of stdout says."""
    checkpoint, package = work / "checkpoint", work / "package"
    checkpoint.mkdir(parents=True)
    stored = write_checkpoint(checkpoint, size)
    rows = [measure("export", [str(checkpoint), "--out", str(package)])]
    if build:
        rows.append(measure("build", [str(package), "--compute-capability", "8.9"]))
    for row in rows:
        print(f"{row['stage']:<8} {row['seconds']:>8.1f} s {row['peak_memory_mb']:>8,} MB peak")
    package_bytes = sum(p.stat().st_size for p in package.rglob("*") if p.is_file())
    print(f"checkpoint {stored / 1e6:,.0f} MB, package {package_bytes / 1e6:,.0f} MB, {os.cpu_count()} cores")
    return {
        "size": size,
        "cores": os.cpu_count(),
        "checkpoint_mb": round(stored / 1e6),
        "package_mb": round(package_bytes / 1e6),
        "stages": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m olmo2_export.bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m olmo2_export.bench", description="Time and memory of the exporter."
    )
    parser.add_argument("--size", choices=list(SIZES), default="1B")
    parser.add_argument("--work", type=Path, help="where to put some 15 GB for 1B; default: a temporary folder")
    parser.add_argument("--no-build", action="store_true", help="leave the TensorRT engine out")
    args = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="olmo2-bench-", dir=args.work))
    try:
        result = run(args.size, work, not args.no_build)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

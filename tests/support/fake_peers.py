"""Peers that are not installed here: interpreters which do as the real ones do, with fixed figures.

    python fake_peers.py LOG GRAPH -m MODULE ARGUMENTS

LOG gets a line per worker; GRAPH is an ONNX file that stands for what a peer's exporter writes. A task of llama.cpp
Q8_0 ends as a process does that the kernel kills; it was built with all that a processor has but AMX.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

STEP_SECONDS = {"llama": 0.010, "genai": 0.020, "openvino": 0.030, "hugging_face": 0.040}
TTFT_SECONDS = 0.5
MEMORY = 123_000_000


def install(peers: Path, log: Path, graph: Path, venvs: list[str]) -> None:
    """Write the venvs as make peers leaves them."""
    for name in venvs:
        python = peers / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        command = f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "{log}" "{graph}"'
        for path, words in ((python, ""), (python.with_name("optimum-cli"), " -m optimum-cli")):
            path.write_text(f'{command}{words} "$@"\n')
            path.chmod(0o755)
        (peers / name / ".installed").touch()


def _points(task: dict[str, object], step: float) -> dict[str, object]:
    contexts, batch_sizes, new_tokens = task["contexts"], task["batch_sizes"], task["new_tokens"]
    assert isinstance(contexts, list)
    assert isinstance(batch_sizes, list)
    assert isinstance(new_tokens, int)
    points = [
        {"context_tokens": c, "batch_size": b, "ttft_s": TTFT_SECONDS, "itl_s": [step] * (new_tokens - 1)}
        for b in batch_sizes
        for c in contexts
    ]
    return {"load_s": 1.5, "peak_memory_bytes": MEMORY, "points": points}


def main() -> None:
    log, graph, _, module, *words = sys.argv[1:]
    name = module.rpartition(".")[2]
    result: dict[str, object] = {}
    if name == "builder":
        folder = Path(words[words.index("-o") + 1])
        folder.mkdir()
        (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"session_options": {}}}}))
        shutil.copy(graph, folder / "model.onnx")
    elif name == "convert_optimum":
        Path(words[1]).mkdir()
        shutil.copy(graph, Path(words[1], "model.onnx"))
    elif name == "optimum-cli":
        Path(words[-1]).mkdir()
        Path(words[-1], "openvino_model.bin").write_bytes(bytes(20_000))
    elif name == "convert_llama" and words[0] == "features":
        result = {"features": "CPU : AVX512 = 1 | AVX512_VNNI = 1 | "}
    elif name == "convert_llama" and words[0] == "sizes":
        size = Path(words[1]).stat().st_size
        result = {"bytes": size, "tensor_bytes": 1000, "embedding_bytes": 262, "head_is_embedding": False}
    elif name == "convert_llama":
        Path(words[2]).write_bytes(b"GGUF" * 5)
    else:
        what = words[1] if name == "llama" else words[0]
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{name} {Path(what).name}\n")
        if "Q8_0" in what:
            os.kill(os.getpid(), signal.SIGKILL)
        result = _points(json.loads(words[-1]), STEP_SECONDS[name])
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

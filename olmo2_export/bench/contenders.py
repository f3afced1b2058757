"""Who is compared, and what has to be made first: packages of ours, a GGUF for llama.cpp, genai's own folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import olmo2_export.demo
from olmo2_export.bench.checkpoint import SIZES, Form, shape_of, write_checkpoint
from olmo2_export.bench.machine import multiplies_in_tiles
from olmo2_export.bench.processes import run, stage, worker
from olmo2_export.catalog import find
from runtimes.package import open_package

LLAMA_VENV, GENAI_VENV, OPTIMUM_VENV = ".venv-peers-llama", ".venv-peers-genai", ".venv-peers-optimum"
OPENVINO_VENV = ".venv-peers-openvino"
LLAMA_8_BIT_CACHE = ("--kv", "q8_0")
"""arguments of llama.cpp's worker: its KV cache in Q8_0, with flash attention"""
SPEED = ("decode_128", "decode_3000", "prefill_512", "streams_8", "load", "memory_1024")
WITH_CACHE = ("decode_128", "decode_3000", "prefill_512", "memory_1024")
"""what an 8-bit KV cache changes"""
DEMO = Path(olmo2_export.demo.__file__).parent
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Contender:
    """A column of samples: a worker with a model."""

    key: str
    name: str
    """what people call it"""
    python: Path
    worker: str
    arguments: tuple[str, ...]
    """of the worker, before the task"""
    tasks: tuple[str, ...]
    """what it is measured in"""
    made: dict[str, float]
    """seconds and peak_memory_mb of the process that made the model"""

    def sample(self, task: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Measure a task once, in a fresh process that has so long."""
        return worker(self.python, self.worker, [*self.arguments, json.dumps(task)], seconds)


def peer_python(peers: Path, venv: str) -> Path | None:
    """Return the interpreter of a peer, if `make peers` has made it."""
    python = peers / venv / "bin" / "python"
    return python if (peers / venv / ".installed").exists() else None


class Workshop:
    """A folder where things are made once; a second run with the same folder finds them, and what they cost."""

    def __init__(self, folder: Path, size: str, reference: Path | None = None) -> None:
        """Take a size of `SIZES`, or any other word for the checkpoint that is given as `reference`."""
        self.folder = folder
        self.size = size
        self.reference = reference

    def checkpoint(self, form: Form) -> Path:
        """Return the reference, or else one with made-up weights; as a Llama always the latter."""
        if form == "olmo2" and self.reference is not None:
            return self.reference
        shape = SIZES[self.size] if self.reference is None else shape_of(self.reference)

        def make(out: Path) -> dict[str, float]:
            out.mkdir()
            return {"checkpoint_mb": round(write_checkpoint(out, shape, form) / 1e6)}

        self._once(f"checkpoint-{self.size}-{form}", make)
        return self.folder / f"checkpoint-{self.size}-{form}"

    def package(
        self, name: str, checkpoint: Path, variant: str, flags: Sequence[str] = ()
    ) -> tuple[Path, dict[str, float]]:
        """Export; return the package and what that cost."""

        def make(out: Path) -> dict[str, float]:
            cost = stage("export", [checkpoint, "--out", out, "--variant", variant, *flags])
            return {key: cost[key] for key in ("seconds", "peak_memory_mb")}

        folder = f"package-{self.size}-{variant}-{name}"
        return self.folder / folder, self._once(folder, make)

    def bundle(self, variants: Sequence[str]) -> Path:
        """Export several variants into one package; return it."""

        def make(out: Path) -> dict[str, float]:
            flags = [word for variant in variants for word in ("--variant", variant)]
            cost = stage("export", [self.checkpoint("olmo2"), "--out", out, *flags])
            return {key: cost[key] for key in ("seconds", "peak_memory_mb")}

        folder = f"package-{self.size}-{'-'.join(variants)}"
        self._once(folder, make)
        return self.folder / folder

    def engine(self, checkpoint: Path, precision: str, backend: str) -> tuple[Path, dict[str, float]]:
        """Export to fp32 and build an engine for the GPU at hand; return the package and what the build cost."""

        def make(out: Path) -> dict[str, float]:
            stage("export", [checkpoint, "--out", out])
            flags = ["--precision", precision, "--backend", backend, "--compute-capability", "current"]
            cost = stage("build", [out, *flags, "--max-batch-size", "8"])
            return {key: cost[key] for key in ("seconds", "peak_memory_mb")}

        folder = f"package-{self.size}-{backend}-{precision}"
        return self.folder / folder, self._once(folder, make)

    def served(self, variant: str) -> Path:
        """Export with a tokenizer, which a server wants: the checkpoint's, or that of the demo; return the package."""
        checkpoint = self.checkpoint("olmo2")
        if not (checkpoint / _TOKENIZER[0]).exists():
            for name in _TOKENIZER:
                shutil.copy(DEMO / name, checkpoint)
        return self.package("served", checkpoint, variant)[0]

    def gguf(self, python: Path, ftype: str, *, tokenizer: bool = False) -> tuple[Path, dict[str, float]]:
        """Convert for llama.cpp; with the checkpoint's tokenizer, for llama-server.

        Returns:
            The file, and what it cost: the seconds of writing F16 and of quantising that, the larger peak of the two.
        """

        def make(out: Path) -> dict[str, float]:
            out.mkdir()
            convert: list[str | Path] = [python, "-m", "olmo2_export.bench.workers.convert_llama"]
            f16 = out / "intermediate.gguf"
            flags = ["--tokenizer"] if tokenizer else []
            costs = [
                run([*convert, "f16", self.checkpoint("olmo2"), f16, *flags]).cost,
                run([*convert, "quantize", f16, out / f"{ftype}.gguf", ftype]).cost,
            ]
            f16.unlink()
            return {
                "seconds": sum(cost["seconds"] for cost in costs),
                "peak_memory_mb": max(cost["peak_memory_mb"] for cost in costs),
            }

        folder = f"gguf-{self.size}-{ftype}{'-served' if tokenizer else ''}"
        cost = self._once(folder, make)
        return self.folder / folder / f"{ftype}.gguf", cost

    def genai(self, python: Path, threads: int) -> tuple[Path, dict[str, float]]:
        """Build for onnxruntime-genai; return the folder and what its builder cost."""

        def make(out: Path) -> dict[str, float]:
            checkpoint = self.checkpoint("llama")
            for name in _TOKENIZER:  # the builder wants one, of any model
                shutil.copy(DEMO / name, checkpoint)
            cache = self.folder / "genai-cache"
            builder: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out]
            cost = run([*builder, "-p", "int4", "-e", "cpu", "-c", cache]).cost
            path = out / "genai_config.json"
            config = json.loads(path.read_text())
            config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
            path.write_text(json.dumps(config, indent=4))
            return cost

        folder = f"genai-{self.size}-{threads}-threads"
        cost = self._once(folder, make)
        return self.folder / folder, cost

    def optimum(self, python: Path) -> tuple[Path, dict[str, float]]:
        """Export with optimum-onnx; return the folder and what that cost."""

        def make(out: Path) -> dict[str, float]:
            convert: list[str | Path] = [python, "-m", "olmo2_export.bench.workers.convert_optimum"]
            return run([*convert, self.checkpoint("olmo2"), out]).cost

        folder = f"optimum-{self.size}"
        cost = self._once(folder, make)
        return self.folder / folder, cost

    def openvino(self, python: Path) -> tuple[Path, dict[str, float]]:
        """Export with optimum-intel, its defaults for 4 bits; return the folder and what that cost."""

        def make(out: Path) -> dict[str, float]:
            model: list[str | Path] = ["--model", self.checkpoint("olmo2"), "--task", "text-generation-with-past"]
            weights = ["--weight-format", "int4", "--group-size-fallback", "adjust"]  # of rows that 128 does not divide
            return run([python.with_name("optimum-cli"), "export", "openvino", *model, *weights, out]).cost

        folder = f"openvino-{self.size}"
        cost = self._once(folder, make)
        return self.folder / folder, cost

    def _once(self, name: str, make: Callable[[Path], dict[str, float]]) -> dict[str, float]:
        note, out = self.folder / f"{name}.json", self.folder / name
        if not note.exists():
            shutil.rmtree(out, ignore_errors=True)
            note.write_text(json.dumps(make(out)))
        found: dict[str, float] = json.loads(note.read_text())
        return found


def ours(workshop: Workshop, variants: Sequence[str]) -> list[Contender]:
    """Return our contenders: each variant, and the first one also with one graph, and of the demo model.

    Args:
        workshop: where to make the packages.
        variants: the first one is `ours`, which the claims are about.
    """
    first, *others = variants
    package, made = workshop.package("bench", workshop.checkpoint("olmo2"), first)
    tasks = [*SPEED, "load_trusted", "lookup_repeats", "lookup_new"]
    if open_package(package).variant(first).prefill is None:  # nothing to say then about the memory of two graphs
        tasks.remove("memory_1024")
        one = _ours("one_graph", f"ours {first}, one graph", package, first, ("memory_1024",), made)
    else:
        alone, cost = workshop.package("one-graph", workshop.checkpoint("olmo2"), first, ["--no-prefill-graph"])
        one = _ours("one_graph", f"ours {first}, one graph", alone, first, ("memory_1024", "prefill_512"), cost)
    found = [_ours("ours", f"ours {first}", package, first, tuple(tasks), made), one]
    if find(first).quantized_cache:
        int8 = _ours("int8_cache", f"ours {first}, int8 KV cache", package, first, WITH_CACHE, made)
        found.append(replace(int8, arguments=(*int8.arguments, "--kv-cache", "int8")))
    package, made = workshop.package("demo-model", DEMO, first)
    found.append(_ours("demo", f"ours {first}, demo model", package, first, ("lookup_demo",), made))
    for variant in others:
        package, made = workshop.package("bench", workshop.checkpoint("olmo2"), variant)
        found.append(_ours(f"ours_{variant}", f"ours {variant}", package, variant, SPEED, made))
    return found


def _ours(
    key: str, name: str, package: Path, variant: str, tasks: tuple[str, ...], made: dict[str, float]
) -> Contender:
    return Contender(key, name, Path(sys.executable), "ours", (str(package), variant), tasks, made)


def peers(
    workshop: Workshop, folder: Path, threads: int, llama_types: Sequence[str]
) -> tuple[list[Contender], list[str]]:
    """Return the peers whose interpreters are there, and a line for each that is not, or was built in a special way."""
    found, said = [], []
    python = peer_python(folder, LLAMA_VENV)
    if python is None:
        said.append(left_out("llama.cpp", folder / LLAMA_VENV))
    else:
        said += filter(None, [f"llama.cpp: {how}" if (how := llama_build(python)) else ""])
        for ftype in llama_types:
            key = "llama" if ftype == llama_types[0] else f"llama_{ftype}"
            path, made = workshop.gguf(python, ftype)
            found.append(Contender(key, f"llama.cpp {ftype}", python, "llama", ("task", str(path)), SPEED, made))
            if ftype == llama_types[0]:
                arguments = ("task", str(path), *LLAMA_8_BIT_CACHE)
                name = f"llama.cpp {ftype}, q8_0 KV cache"
                found.append(Contender("llama_int8_cache", name, python, "llama", arguments, WITH_CACHE, made))
    python = peer_python(folder, GENAI_VENV)
    if python is None:
        said.append(left_out("onnxruntime-genai", folder / GENAI_VENV))
    else:
        path, made = workshop.genai(python, threads)
        found.append(Contender("genai", "onnxruntime-genai int4", python, "genai", (str(path),), SPEED, made))
    python = peer_python(folder, OPENVINO_VENV)
    if python is None:
        said.append(left_out("openvino-genai", folder / OPENVINO_VENV))
    else:
        path, made = workshop.openvino(python)
        found.append(Contender("openvino", "OpenVINO GenAI int4", python, "openvino", (str(path),), SPEED, made))
    return found, said


def llama_build(python: Path) -> str:
    """Say how llama.cpp was compiled where that is not what its own build does here; else nothing."""
    if not multiplies_in_tiles() or "AMX_INT8 = 1" in worker(python, "convert_llama", ["features"])["features"]:
        return ""
    return "built without AMX, which this processor has: with it, it dies of SIGSEGV"


def left_out(peer: str, venv: Path) -> str:
    """Say that a peer is not installed."""
    return f"{peer} is left out: {venv} is not there; make peers installs it"

"""What quantisation costs on the demo model, or on another small one, ours beside llama.cpp's: one table over the same
tokens.

The reference is transformers in float32. Everybody sees the held-out text in windows of 512 tokens, each begun with
bos, and is compared at every position: KL(reference || test) in nats with its standard error over blocks of tokens,
top-1 agreement, perplexity; and bits per weight, scales and the like included, over the matrices alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from olmo2_export.bench.contenders import DEMO, LLAMA_VENV, peer_python
from olmo2_export.bench.processes import stage, worker
from olmo2_export.measure.error_bars import mean
from olmo2_export.measure.parity import kl_divergence
from olmo2_export.measure.quality import token_losses
from olmo2_export.truth.reference import open_reference
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import Runner, open_runner
from runtimes.package import Package, open_package

WINDOW = 512
OURS: dict[str, tuple[str, tuple[str, ...]]] = {
    "q4": ("q4", ()),
    "q4 gptq": ("q4", ("--recipe", "gptq")),
    "q4 distill": ("q4", ("--recipe", "distill")),
    "q4 gptq-mixed": ("q4", ("--recipe", "gptq-mixed", "--size-budget", "5.18")),
    "q8": ("q8", ()),
}
"""what is compared -> the variant and the flags it is exported with; 5.18 is what Q4_K_M has on this model"""


def windows(ids: Sequence[int], bos: int, length: int = WINDOW) -> npt.NDArray[np.int64]:
    """Cut token ids into rows that each begin with bos; what the last row does not fill is -1.

    Returns:
        int64 [rows, length].
    """
    rows = math.ceil(len(ids) / (length - 1))
    body = np.full(rows * (length - 1), -1, np.int64)
    body[: len(ids)] = ids
    return np.concatenate([np.full((rows, 1), bos, np.int64), body.reshape(rows, -1)], axis=1)


def metrics(
    rows: Sequence[npt.NDArray[np.int64]], reference: npt.NDArray[np.float32], test: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Compare logits at all positions.

    Args:
        rows: token ids, each [length].
        reference: logits of all rows, one after the other [positions, vocab_size].
        test: the same.
    """
    kl, same, nll = [], [], []
    end = 0
    for ids in rows:  # a row at a time: all in float64 would be gigabytes
        start, end = end, end + len(ids)
        truth, got = (a[start:end].astype(np.float64) for a in (reference, test))
        kl.append(kl_divergence(truth, got))
        same.append(truth.argmax(axis=-1) == got.argmax(axis=-1))
        nll.append(token_losses(got[:-1], ids[1:]))
    divergences, losses = np.concatenate(kl), np.concatenate(nll)
    perplexity = math.exp(losses.mean())
    return {
        "kl_mean_nats": float(divergences.mean()),
        "kl_se_nats": mean(divergences).se or 0.0,
        "kl_p99_nats": float(np.quantile(divergences, 0.99)),
        "top1_share": float(np.concatenate(same).mean()),
        "perplexity": perplexity,
        "perplexity_se": perplexity * float(losses.std()) / math.sqrt(len(losses)),
    }


def run(
    work: Path,
    peers_folder: Path,
    *,
    variants: Sequence[str],
    llama_types: Sequence[str],
    most_windows: int | None,
    model: Path | None = None,
) -> dict[str, Any]:
    """Export, convert and compare, in an empty folder.

    Args:
        work: some 2 GB of logits are put here.
        peers_folder: where the interpreter of llama.cpp may be.
        variants: names out of `OURS`; of one with two graphs, each graph is a line.
        llama_types: of GGUF.
        most_windows: None means the whole text.
        model: a checkpoint whose folder has heldout.txt too, and calibration.txt for the recipes that want one; None:
            the demo model.

    Returns:
        What the last line of stdout says.
    """
    folder, name = (DEMO, "demo") if model is None else (model, str(model))
    bos: int = json.loads((folder / "config.json").read_text())["bos_token_id"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8")).ids
    table = windows(ids, bos)[:most_windows]
    rows = [row[row >= 0] for row in table]
    with open_reference(open_checkpoint(name), "fp32") as truth:
        reference = _stored(work / "reference.f32", (truth.logits([row])[0] for row in rows), len(np.concatenate(rows)))
    shapes = [info.shape for info in open_checkpoint(name).tensors.values()]
    weights, norms = (sum(math.prod(s) for s in shapes if len(s) == n) for n in (2, 1))
    models = {"transformers fp32": {"bits_per_weight": 16.0, **metrics(rows, reference, reference)}}

    for form in tqdm(variants, desc="ours", leave=False):
        variant, flags = OURS[form]
        out = work / f"package-{form}"
        needs_text = model is not None and "gptq" in form
        text: list[str | Path] = ["--calibration", folder / "calibration.txt"] if needs_text else []
        stage("export", [name, "--out", out, "--variant", variant, *flags, *text])
        package = open_package(out)
        found = package.variant(variant)
        assert found.quantization is not None  # all of OURS are
        test = _run_ours(package, variant, rows, work / "test.f32", exact=True)
        size = found.quantization.bits_per_weight
        models[f"ours {form}"] = {"bits_per_weight": size, **metrics(rows, reference, test)}
        if found.prefill is not None:
            test = _run_ours(package, variant, rows, work / "test.f32")
            models[f"ours {form}, prefill graph"] = {"bits_per_weight": 8.0, **metrics(rows, reference, test)}

    python = peer_python(peers_folder, LLAMA_VENV)
    missing = []
    if python is None:
        missing.append(f"llama.cpp is left out: {peers_folder / LLAMA_VENV} is not there; make peers installs it")
    else:
        np.save(work / "ids.npy", table)
        worker(python, "convert_llama", ["f16", folder, work / "f16.gguf"])
        for ftype in tqdm(llama_types, desc="llama.cpp", leave=False):
            made = worker(python, "convert_llama", ["quantize", work / "f16.gguf", work / "test.gguf", ftype])
            out = work / "test.f32"
            worker(python, "llama", ["logits", work / "test.gguf", work / "ids.npy", out])
            test = np.memmap(out, np.float32, "r").reshape(reference.shape)
            size = 8 * (made["tensor_bytes"] - 4 * norms) / weights
            models[f"llama.cpp {ftype}"] = {"bits_per_weight": size, **metrics(rows, reference, test)}
    tokens = sum(len(row) - 1 for row in rows)
    return {"model": name, "tokens": tokens, "left_out": missing, "models": models}


def table(result: dict[str, Any]) -> str:
    """Return the result in markdown."""
    lines = [
        f"{result['model']}, {result['tokens']:,} held-out tokens in windows of {WINDOW}",
        *result["left_out"],
        "| | bits per weight | KL mean | KL p99 | top-1 | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in result["models"].items():
        kl = f"{m['kl_mean_nats']:.2e} ± {m['kl_se_nats']:.0e}"
        numbers = f"{kl} | {m['kl_p99_nats']:.2e} | {m['top1_share']:.2%} | {m['perplexity']:.3f}"
        lines.append(f"| {name} | {m['bits_per_weight']:.2f} | {numbers} ± {m['perplexity_se']:.2f} |")
    return "\n".join(lines)


def _stored(path: Path, logits: Iterable[npt.NDArray[np.float32]], positions: int) -> npt.NDArray[np.float32]:
    """Write rows of logits to a file, one after the other, and map it [positions, vocab_size]."""
    with path.open("wb") as file:
        for row in logits:
            row.astype(np.float32).tofile(file)
    return np.memmap(path, np.float32, "r").reshape(positions, -1)


def _run_ours(
    package: Package, variant: str, rows: Sequence[npt.NDArray[np.int64]], out: Path, exact: bool = False
) -> npt.NDArray[np.float32]:
    """Run a variant as a prompt, or `exact` with the decode graph alone."""

    def logits(runner: Runner) -> Iterator[npt.NDArray[np.float32]]:
        for row in rows:
            runner.reset()
            yield runner.decode_block(row) if exact else runner.prefill([row], all_positions=True)[0]

    with open_runner(package, variant=variant) as runner:
        return _stored(out, logits(runner), sum(len(row) for row in rows))

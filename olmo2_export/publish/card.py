"""The model card of a published package: README.md, its facts in front as YAML. The same package gives the same card.

Whatever comes from a checkpoint, a manifest or a report is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from olmo2_export.publish.contents import Contents
from olmo2_export.report.parts import FAILED, PASSED, UNKNOWN, figures, markdown_text, number, percent
from olmo2_export.summary.text import size
from olmo2_export.verify.feeds import MODES
from runtimes.manifest import AdapterSource, Variant
from runtimes.targets import TARGETS, find_target

CARD = "README.md"

_PROMPT = "In the beginning"
_LIMITS = (("error_ratio", "≤", ".2f"), ("kl_mean", "≤", ".1e"), ("top1", "≥", ".1%"))
"""of parity.json: a metric of the cases that has a limit in the gate, which side of it is right, how it is written"""


def make_card(contents: Contents, repository: str, licence: Mapping[str, str]) -> str:
    """Return the card.

    Args:
        contents: what is published.
        repository: OWNER/NAME, where.
        licence: `license`, `license_name`, `license_link` as the checkpoint's own card has them; {}: not known.
    """
    sections = [
        [*_front(contents, licence), "", f"# {markdown_text(repository.partition('/')[2])}", "", *_first(contents)],
        ["## Run it", "", *_run(contents, repository)],
        ["## Variants", "", *_variants(contents)],
        ["## What was verified", "", *_verified(contents)],
        ["## What was not", "", *(f"- {line}" for line in _not_verified(contents))],
        ["## Where it is from", "", *(f"- {line}" for line in _provenance(contents, licence))],
    ]
    return "\n\n".join("\n".join(lines).rstrip() for lines in sections) + "\n"


def _front(contents: Contents, licence: Mapping[str, str]) -> Iterator[str]:
    """Yield the facts that the Hub reads; strings as JSON has them, which YAML reads too."""
    source, model = contents.package.manifest.source, contents.package.model
    yield "---"
    for name in ("license", "license_name", "license_link"):
        if name in licence:
            yield f"{name}: {json.dumps(licence[name])}"
    if source.kind == "hub":
        yield f"base_model: {json.dumps(source.model)}"
        yield "base_model_relation: quantized"
    yield "library_name: onnxruntime"
    yield f"pipeline_tag: {'text-classification' if model.labels else 'text-generation'}"
    yield "tags:"
    yield from (f"- {json.dumps(tag)}" for tag in ("olmo2-export", "onnx", model.model_type))
    yield "---"


def _base(contents: Contents) -> str:
    source = contents.package.manifest.source
    match source.kind:
        case "hub":
            return f"[{markdown_text(source.model)}](https://huggingface.co/{source.model})"
        case "demo":
            return "the demo model of olmo2-export"
    return f"a checkpoint in a folder, {markdown_text(source.model)}"


def _first(contents: Contents) -> Iterator[str]:
    engines = ", and engines for TensorRT," if contents.engines else ""
    yield f"ONNX graphs for onnxruntime{engines} of {_base(contents)}, made by olmo2-export."


def _run(contents: Contents, repository: str) -> list[str]:
    name, model = f"hf:{repository}", contents.package.model
    extra = next((t.extra for t in TARGETS if t.backend == "ort" and set(t.variants) & contents.variants.keys()), None)
    verb, more, call = "generate", f'--prompt "{_PROMPT}"', "logits = runner.prefill([[1, 2, 3]])[0]"
    if model.labels:
        verb, more, call = "score", "texts.txt", "scores = runner.score([[1, 2, 3]])"
    lines = ["```sh", f"pip install 'olmo2-export[{extra or find_target().extra},hub]'"]
    lines += [f"olmo2-run {verb} {name} {more}", "```", "", "```python", "from runtimes import open_runner", ""]
    lines += [f'with open_runner("{name}") as runner:', f"    {call}"]
    return [
        *lines,
        "```",
        "",
        "The files of one variant are downloaded, and each is compared with the manifest; `--variant` names which. "
        f"`{name}@COMMIT` stays what it is when this repository changes.",
    ]


def _variants(contents: Contents) -> list[str]:
    rows = [("variant", "weights", "KV cache", "needs", "size", "verified")]
    for name, variant in contents.variants.items():
        needs = f"onnxruntime {variant.min_onnxruntime}" if variant.min_onnxruntime else ""
        files = sum(contents.files[file] for file in variant.files)
        rows.append((name, _weights(variant), _cache(variant), needs, size(files), _verdict(contents, name)))
    lines = _table(rows, numbers=(4,))
    for engine in contents.engines.values():
        lines += [
            "",
            f"Engine {markdown_text(engine.name)}: {markdown_text(f'{engine.backend} {engine.backend_version}')}, "
            f"compute capability {markdown_text(', '.join(engine.compute_capabilities))}, batch "
            f"{engine.max_batch_size}, cache {engine.max_cache_length:,} tokens.",
        ]
    return lines


def _weights(variant: Variant) -> str:
    quantization = variant.quantization
    if quantization is None:
        return variant.precision
    return f"{variant.precision}, {quantization.bits_per_weight:.2f} bits, {quantization.recipe}"


def _cache(variant: Variant) -> str:
    return f"{variant.kv_cache.form}, {' or '.join(own.kv_cache.name for own in variant.each_cache)}"


def _verdict(contents: Contents, name: str) -> str:
    verdict = contents.verdicts.get(name)
    return UNKNOWN if verdict is None else PASSED if verdict.passed else FAILED


def _verified(contents: Contents) -> list[str]:
    if not contents.reports:
        return ["Nothing: this package was not compared with PyTorch."]
    head = ("variant", "on", "kernel parity", "quality", "error / PyTorch", "KL mean", "top-1", "perplexity")
    rows: list[tuple[str, ...]] = [head]
    checks = [("variant", "check", "found", "verdict")]
    for name, report in contents.reports.items():
        verdicts = report.get("verdicts") or {}
        said = [PASSED if verdicts.get(kind, report["passed"]) else FAILED for kind in ("kernel parity", "quality")]
        change = percent(number((report.get("perplexity") or {}).get("relative")))
        for form, cases in _by_form(report["cases"]).items():
            gate = {} if form else report.get("gate") or {}
            measured = [_with_limit(cases, gate, *limit) for limit in _LIMITS]
            if form:  # held to limits of its own
                failed = any(case.get("failures") for case in cases)
                rows.append((f"{name}, {form}", "", FAILED if failed else PASSED, "", *measured, ""))
            else:
                rows.append((name, str(report["backend"]), *said, *measured, change))
        for check in report.get("checks", ()):
            checks.append((name, str(check["name"]), str(check["found"]), FAILED if check["failures"] else PASSED))
        greedy = report.get("greedy") or {}
        if greedy.get("prompts"):
            found = f"{greedy['equal']} of {greedy['tokens']} tokens equal over {greedy['prompts']} prompts"
            checks.append((name, "greedy", found, FAILED if greedy.get("failures") else PASSED))
    reference = markdown_text(str(contents.reference))
    return [
        f"Against {reference} in PyTorch, on the same tokens, at all positions: prompts at once, in pieces and token "
        "by token, alone and in a ragged batch. Errors are against float64, in units of PyTorch's own; each number is "
        "the worst of all cases, its limit in brackets. Kernel parity: the graph computes what its weights say, and KL "
        "and top-1 are of that. Quality, in the second table and the last column: what these weights cost beside the "
        "checkpoint's. Lines with another name behind the variant's are of another form of its graph, such as the "
        "one for prompts, at limits of its own.",
        "",
        *_table(rows, numbers=(4, 5, 6, 7)),
        "",
        *_table(checks),
        "",
        "All numbers: `parity.json`.",
    ]


def _by_form(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return form of the graph -> its cases, the graph as it is first, under no name."""
    found: dict[str, list[Mapping[str, Any]]] = {"": []}
    for case in cases:
        mode = str(case["mode"])
        plain = next((known for known in MODES if mode.endswith(known)), mode)
        found.setdefault(mode.removesuffix(plain).strip(), []).append(case)
    return found


def _with_limit(cases: Sequence[Mapping[str, Any]], gate: Mapping[str, Any], metric: str, sign: str, form: str) -> str:
    worst = (min if sign == "≥" else max)((number(case.get(metric)) for case in cases), default=math.nan)
    limit = number(gate.get(metric))
    if not math.isfinite(limit) or (sign == "≥" and limit == 0):
        return figures(worst, form)
    return f"{figures(worst, form)} ({sign} {f'{limit:.1%}' if form.endswith('%') else f'{limit:g}'})"


def _not_verified(contents: Contents) -> Iterator[str]:
    """Yield what nobody looked at, and what failed."""
    for name in contents.variants:
        verdict = contents.verdicts.get(name)
        if verdict is None:
            yield f"{markdown_text(name)}: not compared with PyTorch."
        elif not verdict.passed:
            yield f"{markdown_text(name)}: it failed; see parity.json."
    for name, report in contents.reports.items():
        longest, held = report.get("capacity"), report.get("max_cache_length")
        if isinstance(longest, int) and isinstance(held, int) and longest < held:
            yield f"{markdown_text(name)}: texts of more than {longest:,} tokens; its cache holds {held:,}."
        if report.get("coverage"):
            yield f"{markdown_text(name)}: {markdown_text(str(report['coverage']))}."
        if "text" not in str(report.get("tokens_from")):
            yield f"{markdown_text(name)}: tokens of a text; these were {markdown_text(str(report['tokens_from']))}."
    if contents.reports:
        backends = sorted({str(report["backend"]) for report in contents.reports.values()})
        yield f"Any other backend or device than {markdown_text(', '.join(backends))}, and any other machine."
    yield "Other runtimes than olmo2-run, also those whose config files are here."
    yield "Tasks, languages, biases, safety: the comparison is with the checkpoint, and says nothing of what it can do."


def _provenance(contents: Contents, licence: Mapping[str, str]) -> Iterator[str]:
    manifest = contents.package.manifest
    revision = f", commit `{manifest.source.revision}`" if manifest.source.revision else ""
    yield f"Weights: {_base(contents)}{revision}; the sha256 of each file that was read is in `manifest.json`."
    if manifest.source.quantized:
        yield f"They were stored as {markdown_text(manifest.source.quantized)}."
    for adapter in manifest.source.adapters:
        yield f"Merged into them: {_adapter(adapter)}."
    for name, entry in manifest.adapters.items():
        yield f"Chosen for each sequence, `--adapter {markdown_text(name)}`: {_adapter(entry.source)}."
    libraries = ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())
    yield f"Made by olmo2-export {markdown_text(manifest.exporter_version)}, with {markdown_text(libraries)}."
    yield f"Export `{contents.package.checksum}`: two exports of the same checkpoint are the same to the byte."
    if "license" in licence:
        named = markdown_text(licence.get("license_name") or licence["license"])
        yield f"Licence: {named}, as the checkpoint's."
    else:
        yield "Licence: that of the checkpoint; it was not known when this was published."


def _adapter(source: AdapterSource) -> str:
    place = f"in a folder, {markdown_text(source.model)}"
    if source.kind == "hub":
        place = f"[{markdown_text(source.model)}](https://huggingface.co/{source.model})"
    return f"the LoRA adapter {place}" + (f", commit `{source.revision}`" if source.revision else "")


def _table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> list[str]:
    """Return a table whose first row is its head; columns of numbers are aligned on the right."""
    head, *body = [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in rows]
    return [head, f"|{'|'.join('---:' if i in numbers else '---' for i in range(len(rows[0])))}|", *body]

"""What a package is, for people: where it is from, what it holds, and which gates it passed; and what serves it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError as NotInstalledError
from importlib.metadata import version
from typing import Any

from runtimes.errors import VariantNotFoundError
from runtimes.manifest import PARITY_NAME, Variant
from runtimes.package import Package

_MODES = ("prefill", "decode", "chunked", "prefix reuse")
"""of the cases: those of the variant's graph itself; others are of other forms of it, and of hidden states"""
_LIMITS = {"error_ratio": max, "kl_mean": max, "nmse": max, "max_abs": max, "top1": min}
"""of a gate: metric of the cases -> which of them is the worst"""


def own_version() -> str:
    """Return the version of the distribution that serves."""
    try:
        return version("olmo2-export")
    except NotInstalledError:
        return "unknown"


class About:
    """A package that is served."""

    def __init__(self, package: Package) -> None:
        """Take which.

        Args:
            package: it.
        """
        self._package = package

    def parity(self) -> bytes | None:
        """Return the parity report, JSON; None where the package has none of this export."""
        return (self._package.folder / PARITY_NAME).read_bytes() if self._package.reports else None

    def document(self, variant: str) -> dict[str, Any]:
        """Return what there is to say, as JSON.

        Args:
            variant: that is served.
        """
        manifest, model = self._package.manifest, self._package.model
        source = manifest.source
        return {
            "source": {"model": source.model, "kind": source.kind, "revision": source.revision},
            "checksum": self._package.checksum,
            "exporter": manifest.exporter_version,
            "model_type": model.model_type,
            "layers": model.num_hidden_layers,
            "hidden_size": model.hidden_size,
            "vocabulary": model.vocab_size,
            "context": model.max_position_embeddings,
            "weights": self._weights(variant),
            "gates": _gates(self._package.reports.get(variant)),
            "parity_report": bool(self._package.reports),
        }

    def _weights(self, name: str) -> str:
        try:
            variant: Variant = self._package.variant(name)
        except VariantNotFoundError:
            return ""
        quantization = variant.quantization
        if quantization is None:
            return variant.precision
        return f"{variant.precision}, {quantization.bits_per_weight:.2f} bits per weight"


def _gates(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a verdict and what it rests on; None: the variant was not compared."""
    if report is None:
        return None
    try:
        checks = [*_limits(report), *_checks(report)]
    except (KeyError, TypeError, ValueError, AttributeError):  # a report of another version
        checks = []
    return {"passed": report["passed"] is True, "checks": checks}


def _limits(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the worst of each metric that has a limit, over the ways in which the graph was fed."""
    gate = report.get("gate") or {}
    cases = [case for case in report["cases"] if case["mode"] in _MODES]
    for name, worst in _LIMITS.items():
        values = [float(case[name]) for case in cases if case.get(name) is not None]
        limit = float(gate[name]) if gate.get(name) is not None else math.inf
        if not values or not math.isfinite(limit) or (worst is min and limit == 0):
            continue
        found = math.nan if any(map(math.isnan, values)) else worst(values)
        within = found <= limit if worst is max else found >= limit
        yield {
            "name": name,
            "found": found if math.isfinite(found) else None,
            "limit": limit,
            "at_least": worst is min,
            "cases": len(values),
            "passed": within or not any(case["failures"] for case in cases),  # near ties of tokens are none
        }


def _checks(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for check in report.get("checks") or ():
        yield {"name": str(check["name"]), "said": str(check["found"]), "passed": not check["failures"]}

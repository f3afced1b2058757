"""Arrange what was gathered as a page, for HTML and markdown alike."""

from __future__ import annotations

from olmo2_export.report.data import ReportData
from olmo2_export.report.package import memory, operators, package, throughput
from olmo2_export.report.parity import cases, gates, layers, logits, perplexity, verdicts
from olmo2_export.report.parts import Section


def sections(data: ReportData) -> tuple[Section, ...]:
    """Return the page, in its order."""
    return (
        verdicts(data),
        layers(data),
        logits(data),
        perplexity(data),
        throughput(data),
        memory(data),
        operators(data),
        package(data),
        gates(data),
        cases(data),
    )

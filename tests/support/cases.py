"""What every report must hold: each mode, batch and length once per view of the graph."""

from __future__ import annotations

from olmo2_export.measure.parity import CaseResult, ParityReport
from olmo2_export.verify.feeds import MODES


def assert_full_matrix(report: ParityReport, *views: str) -> None:
    """Check that the cases are {modes} x {1, 3 rows} x {1, odd, capacity - 1, capacity}, for each view.

    Args:
        report: of verify.
        views: what stands in front of a mode, such as "exact "; none: the graph alone.
    """
    lengths = {case.length for case in report.cases}
    assert {1, report.capacity - 1, report.capacity} <= lengths
    assert all(length % 2 for length in lengths - {report.capacity - 1, report.capacity})
    cases = {(case.mode, case.batch_size, case.length) for case in report.cases}
    expected = {(view + mode, rows, n) for view in views or ("",) for mode in MODES for rows in (1, 3) for n in lengths}
    assert cases == expected
    assert len(report.cases) == 32 * len(views or ("",))


def large(report: ParityReport) -> list[CaseResult]:
    """The cases with enough positions for a ratio of errors to be sharp."""
    return [case for case in report.cases if case.positions >= 30]

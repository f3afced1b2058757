"""What a package is, for people: its facts, and the gates that parity.json says it passed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from runtimes import open_package
from runtimes.manifest import PARITY_NAME
from runtimes.sealed import FORMAT_VERSION, seal
from runtimes.serve.about import About

CASES = [
    {"mode": "prefill", "kl_mean": 0.001, "top1": 0.99, "error_ratio": 1.1, "failures": []},
    {"mode": "decode", "kl_mean": 0.004, "top1": 0.97, "error_ratio": 1.4, "failures": ["top1 0.97, limit 0.98"]},
    {"mode": "portable alone", "kl_mean": 9.0, "top1": 0.1, "error_ratio": 9.9, "failures": []},
]
REPORT: dict[str, Any] = {
    "passed": True,
    "gate": {"kl_mean": 0.005, "top1": 0.98, "error_ratio": None, "nmse": "inf"},
    "cases": CASES,
    "checks": [{"name": "quality", "found": "perplexity 220.150", "failures": [], "verdict": "quality"}],
}


def told(package: Path, folder: Path, report: dict[str, Any]) -> About:
    """A copy of a package with a parity report."""
    shutil.copytree(package, folder)
    variant = next(iter(open_package(folder).manifest.variants))
    document = {
        "format_version": FORMAT_VERSION,
        "package_checksum": open_package(folder).checksum,
        "variants": {variant: report},
    }
    (folder / PARITY_NAME).write_bytes(seal(document))
    return About(open_package(folder))


def gates(about: About, package: Path) -> Any:
    return about.document(next(iter(open_package(package).manifest.variants)))["gates"]


def test_a_package_that_was_not_compared(demo_package: Path) -> None:
    about, package = About(open_package(demo_package)), open_package(demo_package)
    found = about.document("fp32")
    assert found["checksum"] == package.checksum
    assert (found["source"]["kind"], found["layers"], found["weights"]) == (
        "demo",
        package.model.num_hidden_layers,
        "fp32",
    )
    assert about.document("none of them")["weights"] == ""
    if not package.reports:
        assert (found["gates"], found["parity_report"], about.parity()) == (None, False, None)


def test_the_worst_of_each_metric_stands_beside_its_limit(demo_package: Path, tmp_path: Path) -> None:
    about = told(demo_package, tmp_path / "p", REPORT)
    assert about.parity() == (tmp_path / "p" / PARITY_NAME).read_bytes()
    assert gates(about, tmp_path / "p") == {
        "passed": True,
        "checks": [
            {"name": "kl_mean", "found": 0.004, "limit": 0.005, "at_least": False, "cases": 2, "passed": True},
            {"name": "top1", "found": 0.97, "limit": 0.98, "at_least": True, "cases": 2, "passed": False},
            {"name": "quality", "said": "perplexity 220.150", "passed": True},
        ],
    }


def test_a_near_tie_is_no_failure(demo_package: Path, tmp_path: Path) -> None:
    cases = [{**case, "failures": []} for case in CASES]
    about = told(demo_package, tmp_path / "p", {**REPORT, "cases": cases})
    assert all(check["passed"] for check in gates(about, tmp_path / "p")["checks"])


def test_what_is_not_finite_has_not_passed(demo_package: Path, tmp_path: Path) -> None:
    cases = [{"mode": "decode", "kl_mean": value, "failures": [value]} for value in ("nan", 0.001)]
    about = told(demo_package, tmp_path / "p", {**REPORT, "passed": False, "cases": cases})
    found = gates(about, tmp_path / "p")
    assert found["passed"] is False
    assert (found["checks"][0]["found"], found["checks"][0]["passed"]) == (None, False)


@pytest.mark.parametrize("report", [{"passed": True}, {**REPORT, "cases": 5}, {**REPORT, "checks": [1]}])
def test_a_report_of_another_form_has_a_verdict_alone(
    demo_package: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    about = told(demo_package, tmp_path / "p", report)
    assert gates(about, tmp_path / "p") == {"passed": True, "checks": []}

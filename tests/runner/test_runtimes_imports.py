"""The runners need nothing of the exporter: read from the source, and proved with the libraries out of reach."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtimes

FOLDER = Path(runtimes.__file__).parent
MODULES = sorted(".".join(p.relative_to(FOLDER).with_suffix("").parts) for p in FOLDER.rglob("*.py"))
FORBIDDEN = {"torch", "transformers", "onnx", "olmo2_export"}
# The files that may import a library, at their top; whoever needs one of them imports it in a `match` case.
OWNERS = {
    "onnxruntime": {
        "ort.adapters",
        "ort.devices",
        "ort.session",
        "ort.shared",
        "ort.device",
        "ort.static_session",
        "ort.concat",
        "ort.mapped_buffer",
        "ort.open",
        "ort.prepared",
    },
    "tokenizers": {"text.tokenizer"},
    "cuda": {"trt.cuda"},
    "huggingface_hub": {"hub"},
    "starlette": {"serve.app", "serve.edge", "serve.page_files"},
    "uvicorn": {"serve.protocol", "serve.server"},
    "prometheus_client": {"serve.metrics"},
    "opentelemetry": {"serve.collector", "serve.tracing"},
}

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocker())
"""


def imports(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every import of a file, also those inside functions: the dotted name and its node."""
    for node in ast.walk(ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield str(node.module), node


def run_blocked(code: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    source = BLOCKER.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=FOLDER.parent)


@pytest.mark.parametrize("module", MODULES)
def test_file_imports_nothing_of_the_exporter(module: str) -> None:
    assert not FORBIDDEN & {name.split(".")[0] for name, _ in imports(module)}


@pytest.mark.parametrize(("library", "owners"), OWNERS.items())
def test_library_has_owners_that_import_it_at_their_top(library: str, owners: set[str]) -> None:
    found = {m for m in MODULES for name, _ in imports(m) if name.split(".")[0] == library}
    assert found == owners
    for owner in owners:
        assert all(node.col_offset == 0 for name, node in imports(owner) if name.split(".")[0] == library)


def test_every_module_imports_and_a_package_runs_without_the_exporter(demo_package: Path) -> None:
    code = f"""
import importlib
for name in {[m for m in MODULES if m != "__main__"]!r}:
    importlib.import_module(("runtimes." + name).removesuffix(".__init__"))
from runtimes.cli import main
code = main(["generate", {str(demo_package)!r}, "--prompt", "In the beginning", "--max-new-tokens", "7"])
assert not {FORBIDDEN!r} & {{name.partition(".")[0] for name in sys.modules}}
sys.exit(code)
"""
    result = run_blocked(code, FORBIDDEN)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) > 7


def test_base_install_imports_without_any_backend() -> None:
    backends = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "starlette", "uvicorn", "prometheus_client"}
    result = run_blocked("import runtimes, runtimes.cli, runtimes.generation.generate", FORBIDDEN | backends)
    assert result.returncode == 0, result.stderr


def test_a_server_without_opentelemetry_says_what_traces_need(demo_package: Path) -> None:
    code = f"""
import runtimes.serve.server
from runtimes.cli import main
sys.exit(main(["serve", {str(demo_package)!r}, "--otlp-traces-endpoint", "http://127.0.0.1:9"]))
"""
    result = run_blocked(code, FORBIDDEN | {"opentelemetry"})
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "--otlp-traces-endpoint needs OpenTelemetry's SDK" in line
    assert "pip install 'olmo2-export[otel]'" in line


def test_a_server_that_sends_no_traces_imports_nothing_of_opentelemetry() -> None:
    result = run_blocked(
        "import runtimes.serve.server, runtimes.serve.verb; assert 'opentelemetry' not in sys.modules", set()
    )
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks() -> None:
    result = run_blocked("import torch", FORBIDDEN)
    assert "ImportError: blocked: torch" in result.stderr

"""Imports point one way only, heavy libraries stay with their owners, and nothing is swallowed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Each module may import those on lines above its own, never those on its own line or below.
EXPORTER = """
__init__
config
atomic hub stored_tensors tokenizer_file model error_bars lm_eval_adapter peak_memory stored_graph
checkpoint
quantize
fuse
trace
graph_files ort_graph parity
quality
fp16
device_graph
variants
texts
package
package_weights trt_graph
trt_variants
engine reference
verify
evaluate summary
bench first_call polygraphy_tool
debug
locate
report
verbs
cli
__main__
"""

FOLDERS = {
    path.parent.name for path in (ROOT / "olmo2_export").glob("*/__init__.py")
}  # their files may import each other

OWNERS = {
    "tensorrt": {"runtimes/nvidia.py"},
    "tensorrt_rtx": {"runtimes/nvidia.py"},
    "tensorrt_rtx_bindings": {"runtimes/nvidia.py"},
    "transformers": {
        "olmo2_export/reference.py",
        "olmo2_export/locate/torch_layers.py",
        "olmo2_export/demo/train.py",
        "olmo2_export/bench/workers/static_cache.py",
        "olmo2_export/bench/workers/hugging_face.py",
    },
    "onnxruntime": {
        "runtimes/device_runner.py",
        "runtimes/ort_devices.py",
        "runtimes/ort_session.py",
        "runtimes/ort_runner.py",
        "runtimes/ort_static.py",
        "runtimes/shared_runner.py",
        "olmo2_export/bench/workers/profile.py",
        "olmo2_export/bench/workers/hugging_face.py",
    },
    "lm_eval": {"olmo2_export/lm_eval_adapter.py"},
    "huggingface_hub": {"olmo2_export/hub.py"},
    "safetensors": set(),
}


def sources() -> list[Path]:
    return sorted([*(ROOT / "olmo2_export").rglob("*.py"), *(ROOT / "runtimes").rglob("*.py")])


def imports(path: Path) -> Iterator[str]:
    """Every imported module, by full name, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ranks(table: str) -> dict[str, int]:
    return {name: rank for rank, line in enumerate(table.strip().splitlines()) for name in line.split()}


def test_imports_point_one_way() -> None:
    """The exporter's half; tests/test_runtimes_imports.py has the runners'."""
    rank = ranks(EXPORTER)
    wrong = []
    for path in (ROOT / "olmo2_export").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "demo" in parts:
            continue
        own = parts[1]
        assert own in rank, f"{path}: not in the table of this test; put it where it belongs"
        for name in imports(path):
            target = name.split(".")
            if target[0] != "olmo2_export" or len(target) == 1:
                continue
            imported = target[1]
            if imported in rank and not (imported == own and own in FOLDERS) and rank[imported] >= rank[own]:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong


def test_heavy_libraries_have_owners() -> None:
    for path in sources():
        for name in imports(path):
            owners = OWNERS.get(name.split(".")[0])
            assert owners is None or path.relative_to(ROOT).as_posix() in owners, f"{path} imports {name}"


def test_one_file_imports_by_name() -> None:
    """An import that is a string escapes the test above; runtimes/nvidia.py loads TensorRT so, and nobody else."""
    for path in sources():
        if path.relative_to(ROOT).as_posix() != "runtimes/nvidia.py":
            text = path.read_text(encoding="utf-8")
            for word in ("tensorrt_rtx_bindings", "import_module", "__import__"):
                assert word not in text, f"{path} has {word}"


def test_one_file_loads_graphs() -> None:
    """Whoever loads one without `load_graph` cannot read the weights of a package in a Hub cache."""
    for path in sources():
        if path.name != "stored_graph.py":
            text = path.read_text(encoding="utf-8")
            assert "ir.load(" not in text, path
            assert "onnx.load(" not in text, path


def test_no_error_is_swallowed_wholesale() -> None:
    """`except` names its class; BaseException only where a foreign panic has to be told apart, and is re-raised."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            assert node.type is not None, f"{path}:{node.lineno}"
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            last_resort = path.name == "cli.py"  # one line for the user, whatever it is
            assert "Exception" not in names or last_resort, f"{path}:{node.lineno}"
            if "BaseException" in names:
                assert any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node)), f"{path}:{node.lineno}"


def test_the_product_needs_nothing_beside_the_repository() -> None:
    for path in [*sources(), *(ROOT / "tests").glob("*.py"), ROOT / "Makefile"]:
        if path.name != Path(__file__).name:
            assert "../shared" not in path.read_text(encoding="utf-8"), path

"""Imports point one way only, heavy libraries stay with their owners, and nothing is swallowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GUIDE = ROOT / "docs" / "architecture.md"
"""has the import order of both trees; each room may import those on lines above its own"""

OWNERS = {
    "tensorrt": {"runtimes/trt/nvidia.py"},
    "tensorrt_rtx": {"runtimes/trt/nvidia.py"},
    "tensorrt_rtx_bindings": {"runtimes/trt/nvidia.py"},
    "transformers": {
        "olmo2_export/truth/classes.py",
        "olmo2_export/truth/reference.py",
        "olmo2_export/truth/torch_layers.py",
        "olmo2_export/demo/train.py",
        "olmo2_export/bench/workers/static_cache.py",
        "olmo2_export/bench/workers/hugging_face.py",
    },
    "onnxruntime": {
        "runtimes/ort/adapters.py",
        "runtimes/ort/device.py",
        "runtimes/ort/devices.py",
        "runtimes/ort/session.py",
        "runtimes/ort/concat.py",
        "runtimes/ort/mapped_buffer.py",
        "runtimes/ort/open.py",
        "runtimes/ort/prepared.py",
        "runtimes/ort/static_session.py",
        "runtimes/ort/shared.py",
        "olmo2_export/bench/workers/profile.py",
        "olmo2_export/bench/workers/hugging_face.py",
    },
    "jinja2": {"runtimes/chat/jinja_child.py", "olmo2_export/report/page.py"},
    "lm_eval": {"olmo2_export/evaluate/lm_eval_adapter.py"},
    "huggingface_hub": {"runtimes/hub.py", "olmo2_export/weights/hub.py", "olmo2_export/publish/push.py"},
    "safetensors": set(),
    "starlette": {"runtimes/serve/app.py", "runtimes/serve/edge.py", "runtimes/serve/page_files.py"},
    "uvicorn": {"runtimes/serve/protocol.py", "runtimes/serve/server.py"},
    "prometheus_client": {"runtimes/serve/metrics.py"},
    "opentelemetry": {"runtimes/serve/collector.py", "runtimes/serve/tracing.py"},
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


def order(tree: str) -> dict[str, int]:
    """Room -> line of the guide."""
    (table,) = re.findall(rf"^```import-order {tree}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    return {name: rank for rank, line in enumerate(table.splitlines()) for name in line.split()}


@pytest.mark.parametrize("tree", ["olmo2_export", "runtimes"])
def test_imports_point_one_way(tree: str) -> None:
    rank = order(tree)
    wrong = []
    for path in (ROOT / tree).rglob("*.py"):
        own = path.relative_to(ROOT / tree).with_suffix("").parts[0]
        assert own in rank, f"{path}: not in the import order of {GUIDE.name}; put it where it belongs"
        for name in imports(path):
            first, *rest = name.split(".")
            if first == tree and rest and rest[0] in rank and rest[0] != own and rank[rest[0]] >= rank[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("tree", ["olmo2_export", "runtimes"])
def test_rooms_of_the_import_order_exist(tree: str) -> None:
    there = {path.stem for path in (ROOT / tree).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(order(tree)) == there


@pytest.mark.parametrize("tree", ["olmo2_export", "runtimes"])
def test_every_room_has_its_job_in_the_guide(tree: str) -> None:
    """Six files had none."""
    guide = GUIDE.read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| `{tree}/` \|.*?\n\n", guide, re.M | re.S)
    rooms = {word.rstrip("/").removesuffix(".py") for line in table.splitlines() for word in line.split("`")[1::2]}
    assert set(order(tree)) - {"__init__", "__main__"} - rooms == set()


def test_a_room_that_lists_its_files_lists_those_that_are_there() -> None:
    for path in (path for path in sources() if path.name == "__init__.py"):
        listed = re.findall(r"^(\w+\.py)", path.read_text(encoding="utf-8"), re.M)
        there = {file.name for file in path.parent.glob("*.py")} - {path.name}
        assert not listed or sorted(listed) == sorted(there), path


@pytest.mark.parametrize("tree", ["olmo2_export", "runtimes"])
def test_files_import_each_other_in_no_circle(tree: str) -> None:
    """Also within a room, also by imports inside functions."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / tree).rglob("*.py")
    }
    sorter = TopologicalSorter(
        {name: {n for n in imports(path) if n in files} - {name} for name, path in files.items()}
    )
    sorter.prepare()  # raises CycleError, which names the files


def test_heavy_libraries_have_owners() -> None:
    for path in sources():
        for name in imports(path):
            owners = OWNERS.get(name.split(".")[0])
            assert owners is None or path.relative_to(ROOT).as_posix() in owners, f"{path} imports {name}"


def test_one_file_imports_by_name() -> None:
    """An import that is a string escapes the test above; runtimes/trt/nvidia.py loads TensorRT so, and nobody else."""
    for path in sources():
        if path.relative_to(ROOT).as_posix() != "runtimes/trt/nvidia.py":
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
            last_resort = path.name == "command.py"  # one line for the user, whatever it is
            assert "Exception" not in names or last_resort, f"{path}:{node.lineno}"
            if "BaseException" in names:
                assert any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node)), f"{path}:{node.lineno}"


def test_the_product_needs_nothing_beside_the_repository() -> None:
    for path in [*sources(), *(ROOT / "tests").glob("*.py"), ROOT / "Makefile"]:
        if path.name != Path(__file__).name:
            assert "../shared" not in path.read_text(encoding="utf-8"), path

"""Objects that have exactly the methods, parameters and enumerations of full TensorRT's classes.

tensorrt_api.json was read from the wheel tensorrt-cu13-bindings: its module can be imported with empty libraries in the
place of libnvinfer, libnvinfer_plugin and libnvonnxparser, and says its signatures in docstrings. Full TensorRT itself
cannot be installed from the package index.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
VERSION: str = API["version"]


class Strict:
    """An instance of a class of the table: what the table does not have is an AttributeError or a TypeError.

    Methods do and return what `behaviour` says, or return True; calls are written down.
    """

    def __init__(self, kind: str, calls: list[tuple[Any, ...]] | None = None, **behaviour: Any) -> None:
        members = API["classes"][kind]
        assert behaviour.keys() <= members.keys(), f"{kind} has no {behaviour.keys() - members.keys()}"
        self.__dict__.update(_kind=kind, _members=members, _behaviour=behaviour, calls=calls if calls else [])
        if calls is not None:
            self.__dict__["calls"] = calls

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(f"{self._kind} of TensorRT {VERSION} has no {name}")
        known = self._members[name]
        if isinstance(known, str):
            return self._behaviour[name]
        return lambda *args, **named: self._call(name, known, args, named)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._members.get(name) != "property":
            raise AttributeError(f"{name} of {self._kind} of TensorRT {VERSION} cannot be set")
        self.calls.append((name, value))

    def _call(self, name: str, overloads: list[list[str]], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        fits = [p for p in overloads if len(args) + len(named) <= len(p) and named.keys() <= set(p[len(args) :])]
        if overloads and not fits:
            raise TypeError(f"{self._kind}.{name} takes {overloads}, given {len(args)} and {sorted(named)}")
        self.calls.append((name, *args, *named.values()))
        result = self._behaviour.get(name, True)
        return result(*args, **named) if callable(result) else result


def enums() -> dict[str, Any]:
    """Return the enumerations."""
    return {name: IntEnum(name, [(n, i) for i, n in enumerate(names)]) for name, names in API["enums"].items()}


def module(**classes: Any) -> SimpleNamespace:
    """Return a module `tensorrt` with the enumerations and these classes, whose names must be in the table."""
    assert classes.keys() <= API["classes"].keys()
    plain = {name: type(name, (), {}) for name in ("IStreamWriter", "IProgressMonitor")}
    return SimpleNamespace(**plain, **enums(), **classes)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *others: Any, gpu: str = "9.0") -> list[Any]:
    """Have full TensorRT installed on a GPU, and its process answer with a plan that says what made it.

    Args:
        monkeypatch: undoes it.
        others: modules that ask for library and GPU, beside those of the engine.
        gpu: its compute capability.

    Returns:
        What the process was asked for, a CompileRequest or a RefitRequest each time.
    """
    from olmo2_export.engine import build, options
    from olmo2_export.engine.compiler import CompileRequest, CompileResult

    requests: list[Any] = []

    def run(asked: Any, folder: Path, *, progress: bool) -> CompileResult:  # noqa: ARG001
        requests.append(asked)
        (folder / asked.plan).write_bytes(b"plan" if isinstance(asked, CompileRequest) else b"refitted")
        pasts = [r.name for r in asked.profiles["decode"][3:]] if isinstance(asked, CompileRequest) else []
        aliases = {name.replace("past_key_values.", "present."): name for name in pasts}
        return CompileResult(VERSION, getattr(asked, "layer_counts", {}), aliases, 1)

    for module in (options, build, *others):
        monkeypatch.setattr(module, "check_installed", lambda _: None)
        monkeypatch.setattr(module, "gpu_at_hand", lambda _: gpu)
    monkeypatch.setattr(build, "run_worker", run)
    return requests

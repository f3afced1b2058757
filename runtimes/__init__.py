"""Run the packages that olmo2-export writes: numpy, tokenizers and one backend, nothing of the exporter.

    with open_runner("packages/olmo2-1b") as runner:
        logits = runner.prefill([[100257, 644, 279, 7314]])[0]

Text in and text out: `runtimes.generate`. Command line: `olmo2-run`, or `python -m runtimes`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from runtimes.errors import (
    BackendError,
    ContextLengthError,
    InputError,
    IntegrityError,
    NumericError,
    Olmo2ExportError,
    PackageError,
    PackageNotFoundError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import check_files, find_variant, load_manifest
from runtimes.runner import Runner
from runtimes.threads import default_threads

__all__ = [
    "Backend",
    "BackendError",
    "ContextLengthError",
    "InputError",
    "IntegrityError",
    "NumericError",
    "Olmo2ExportError",
    "PackageError",
    "PackageNotFoundError",
    "Runner",
    "UsageError",
    "VariantNotFoundError",
    "open_runner",
]

Backend: TypeAlias = Literal["ort"]
"""what runs a graph; ort: onnxruntime on the CPU"""

_MOST_THREADS_PER_CPU = 4  # a hundred thousand stop the machine


def open_runner(
    package: str | os.PathLike[str],
    *,
    variant: str | None = None,
    backend: Backend = "ort",
    check_hashes: bool = True,
    threads: int | None = None,
) -> Runner:
    """Open one graph of a package; close it, or use it in a `with`.

    Args:
        package: the package folder.
        variant: which; None means the package's first by name: fp32 where there is one.
        backend: what runs it.
        check_hashes: read the graph and the weights once more to compare them with the manifest; without it only their
            presence and size are checked.
        threads: CPU threads of an operator; None means one per physical core that this process may use.

    Returns:
        The runner, with an empty cache.

    Raises:
        UsageError: threads out of range.
        BackendError: an unknown backend, or one whose library is not installed.
        PackageNotFoundError, VariantNotFoundError: no such package, no such variant in it.
        IntegrityError: a file is not the one that was exported.
        PackageError: the backend cannot load the graph, or it is not the graph the manifest describes.
    """
    most = _MOST_THREADS_PER_CPU * (os.cpu_count() or 1)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most):
        raise UsageError(f"threads {threads!r}: expected an integer from 1 to {most}, {_MOST_THREADS_PER_CPU} a CPU")
    folder = Path(package)
    match backend:
        case "ort":
            try:
                from runtimes.ort_runner import open_ort
            except ImportError as error:
                raise BackendError(
                    f"backend ort: onnxruntime cannot be imported ({error}); pip install 'olmo2-export[cpu]'"
                ) from error
            model = load_manifest(folder).model
            chosen, files = find_variant(folder, variant)
            check_files(folder, files, chosen.files, hashes=False)

            def check(names: Sequence[str]) -> None:
                check_files(folder, files, names, hashes=check_hashes)

            return open_ort(folder, chosen, model, default_threads() if threads is None else threads, check)
        case _:
            raise BackendError(f"backend {backend!r}: there is {', '.join(get_args(Backend))}")

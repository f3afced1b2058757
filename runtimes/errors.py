"""The errors of the runners and of the exporter, one tree.

    Olmo2ExportError                       exit code 2: bad usage or input
    ├── UsageError          (ValueError)         an option or a combination of options that means nothing
    ├── ConfigError         (ValueError)         config.json says what this version cannot express
    ├── CheckpointError     (ValueError)         the checkpoint's files or tensors are not what config.json says
    │   └── CheckpointNotFoundError (FileNotFoundError)
    ├── PackageError        (ValueError)         the package or its manifest is not usable
    │   ├── PackageNotFoundError (FileNotFoundError)
    │   ├── VariantNotFoundError (LookupError)
    │   └── IntegrityError                       a file is not the one the manifest vouches for
    ├── InputError          (ValueError)         token ids, shapes or sampling options out of range
    │   └── ContextLengthError                   more tokens than the context or the cache holds
    ├── BackendError        (RuntimeError)       a backend, library or execution provider that is not there
    └── FailedError                         exit code 1: it ran but failed a check or a resource
        ├── BusyError       (RuntimeError)       a server has as many requests as it takes
        │   └── NotReadyError                    it takes none now
        ├── EngineLostError (RuntimeError)       the process in which a server's model runs has ended
        ├── FusionError     (RuntimeError)       a graph pass did not find what it must find
        ├── EngineBuildError (RuntimeError)      TensorRT refused or failed
        ├── NumericError    (ArithmeticError)    NaN or Inf where a number must be
        │   └── BrokenSlotsError                 in some slots of a step; the others went on
        └── ResourceError   (OSError)            disk full, folder locked

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""the errno of a resource that ran out, not of bad input"""


class Olmo2ExportError(Exception):
    """Base of every error this distribution raises on purpose; `exit_code` is what the command lines return."""

    exit_code = 2


class UsageError(Olmo2ExportError, ValueError):
    """An option, or a combination of options, that means nothing."""


class ConfigError(Olmo2ExportError, ValueError):
    """config.json holds a value that this version cannot express."""


class CheckpointError(Olmo2ExportError, ValueError):
    """The checkpoint's files or tensors are not what its config.json promises."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given folder or Hub id."""


class PackageError(Olmo2ExportError, ValueError):
    """The package or one of its manifests is not usable."""


class PackageNotFoundError(PackageError, FileNotFoundError):
    """The folder is not a package."""


class VariantNotFoundError(PackageError, LookupError):
    """The package has no variant of that name."""


class IntegrityError(PackageError):
    """A file of the package is not the one its manifest vouches for."""


class InputError(Olmo2ExportError, ValueError):
    """Token ids, shapes or sampling options out of range."""


class ContextLengthError(InputError):
    """More tokens than the model's context or the cache holds."""


class BackendError(Olmo2ExportError, RuntimeError):
    """A backend, library or execution provider that is not there."""


class FailedError(Olmo2ExportError):
    """It ran but failed a check or a resource."""

    exit_code = 1


class BusyError(FailedError, RuntimeError):
    """A server has as many requests as it takes."""


class NotReadyError(BusyError):
    """A server takes no requests now: its model is being loaded, or it is about to end."""


class EngineLostError(FailedError, RuntimeError):
    """The process in which a server's model runs has ended."""


class FusionError(FailedError, RuntimeError):
    """A graph pass did not find what it must find."""


class EngineBuildError(FailedError, RuntimeError):
    """TensorRT refused or failed to compile the graph."""


class NumericError(FailedError, ArithmeticError):
    """NaN or Inf where a number must be."""


class BrokenSlotsError(NumericError):
    """Logits of some slots of a step are NaN or infinite; the others have their token."""

    def __init__(self, message: str, slots: tuple[int, ...], logits: dict[int, Any]) -> None:
        super().__init__(message)
        self.slots = slots
        """those that broke down, as they were before the step"""
        self.logits = logits
        """slot -> float32 [vocab_size], of the others"""


class ResourceError(FailedError, OSError):
    """The disk is full, or another process holds the folder."""


def broken_link(path: Path) -> str:
    """Return that a path is a link which leads nowhere, for use in messages; empty if it is none."""
    broken = path.is_symlink() and not path.exists()
    return f"a link to {path.readlink()}, which is not there; is its disk mounted?" if broken else ""


def first_names(names: Iterable[str], limit: int = 5) -> str:
    """Return `a, b, c, d, e and 12 more` for use in messages."""
    listed = list(names)
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"

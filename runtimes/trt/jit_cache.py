"""What TensorRT for RTX compiled for one engine on one GPU, kept in a file beside the plan, so that it loads faster.

It is native code, so that only a file is read which this user (or the system's administrator) wrote and nobody else can
change. TensorRT itself compares version, GPU and driver. A file that cannot be used costs time, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST_SIZE = 32


class JitCache:
    """One file: the sha256 of its content, then the content."""

    def __init__(self, plan: Path, plan_sha256: str, compute_capability: str) -> None:
        """Name the file, which need not exist.

        Args:
            plan: the engine's file.
            plan_sha256: of it; another plan has another cache.
            compute_capability: of the GPU.
        """
        self.path = plan.with_name(f"{plan.name}.{plan_sha256[:16]}.sm{compute_capability.replace('.', '')}.jit")
        self._held = b""

    def load(self) -> bytes | None:
        """Return the content; None if there is none that can be used, which is logged."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if hasattr(os, "geteuid") and (
                    status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                ):
                    logger.warning("%s: another user can change it, not used; delete it", self.path)
                    return None
                raw = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: not used: %s", self.path, error.strerror)
            return None
        digest, content = raw[:_DIGEST_SIZE], raw[_DIGEST_SIZE:]
        if hashlib.sha256(content).digest() != digest:
            logger.warning("%s: damaged, not used; it will be written again", self.path)
            return None
        self._held = content
        return content

    def save(self, content: bytes) -> None:
        """Write the content in one step, if it is not what was loaded; where that cannot be done it is logged."""
        if content == self._held:
            return
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".jit-", delete=False) as file:
                temporary = Path(file.name)
                file.write(hashlib.sha256(content).digest() + content)
            temporary.replace(self.path)
        except OSError as error:
            logger.info("compiled kernels are not kept in %s: %s", self.path.parent, error.strerror)
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        else:
            self._held = content

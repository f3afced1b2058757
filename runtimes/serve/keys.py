"""API keys: a file of them, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import UsageError
from runtimes.text.plain_text import plain_lines, read_text

_HASHED = "sha256:"


@dataclass(frozen=True)
class Keys:
    """Whoever knows one of them may call; there may be none, and then everybody may."""

    hashes: Sequence[bytes] = ()

    def __bool__(self) -> bool:
        return bool(self.hashes)

    def name_of(self, authorization: str) -> str | None:
        """Return a name of the key in a header `Authorization: Bearer KEY`: the first digits of its hash.

        It takes a time that does not tell which key it is. None: it is none of them.
        """
        scheme, _, key = authorization.partition(" ")
        found = hashlib.sha256(key.strip().encode()).digest()
        same = [hmac.compare_digest(found, known) for known in self.hashes]  # all of them, whichever it is
        return found.hex()[:8] if any(same) and scheme.lower() == "bearer" else None


def read_keys(path: Path) -> Keys:
    """Read a file with a key a line, as it is or as `sha256:HEX`; blank lines and those that begin with # are none.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
        UsageError: it has no key, or a hash that is none.
    """
    found = []
    for number, line in enumerate(plain_lines("".join(read_text(path))).splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.startswith(_HASHED):
            found.append(hashlib.sha256(key.encode()).digest())
            continue
        try:
            digest = bytes.fromhex(key.removeprefix(_HASHED))
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise UsageError(f"{path}, line {number}: expected sha256: and 64 hexadecimal digits")
        found.append(digest)
    if not found:
        raise UsageError(f"{path}: no key; write one a line")
    return Keys(tuple(found))

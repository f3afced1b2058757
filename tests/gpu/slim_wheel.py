"""Make a CUDA wheel small enough to carry: keep one GPU generation's machine code, and compress with LZMA.

    python tests/gpu/slim_wheel.py WHEEL OUT ARCH          e.g. onnxruntime_gpu-1.31.1-cp312-...whl slim/ 90

A CUDA library holds machine code for several generations, each in an entry of its own; the driver reads that of the
GPU at hand and never touches the others. Their bytes become zeros here, which compress to nothing. pip installs the
result like any wheel: it reads LZMA members and does not check RECORD. Any other GPU says "no kernel image".

Source: the layout of fat binaries as `cuobjdump --list-elf` shows it; seen with onnxruntime-gpu 1.31.1.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER, _ENTRY = "<IHHQ", "<HHIQ"
_ARCH_AT = 28  # bytes into an entry


def slim(data: bytearray, arch: int) -> dict[int, int]:
    """Overwrite the machine code of every other generation with zeros, in place.

    Args:
        data: of a library.
        arch: the generation to keep, as 90.

    Returns:
        Generation -> bytes of code that were found.

    Raises:
        ValueError: an entry is not laid out as expected.
    """
    found: dict[int, int] = {}
    at = 0
    while (at := data.find(MAGIC, at)) >= 0:
        if at + struct.calcsize(_HEADER) > len(data):
            break
        _, version, header, size = struct.unpack_from(_HEADER, data, at)
        if version != 1 or header != struct.calcsize(_HEADER) or at + header + size > len(data):
            at += len(MAGIC)
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            _, _, skip, length = struct.unpack_from(_ENTRY, data, entry)
            (own,) = struct.unpack_from("<I", data, entry + _ARCH_AT)
            if not 32 <= skip <= 4096 or entry + skip + length > end:
                raise ValueError(f"an entry at {entry} is not as expected; leave this wheel whole")
            found[own] = found.get(own, 0) + length
            if own != arch:
                data[entry + skip : entry + skip + length] = bytes(length)
            entry += skip + length
        at = end
    return found


def slim_wheel(wheel: Path, out: Path, arch: int) -> Path:
    """Write a slimmed copy of a wheel to a folder; return its path.

    Raises:
        ValueError: a library has no code for that generation, or as `slim`.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as slimmed:
        for info in source.infolist():
            data = bytearray(source.read(info))
            if ".so" in info.filename and (found := slim(data, arch)):
                if arch not in found:
                    raise ValueError(f"{info.filename} has no code for {arch}: {sorted(found)}")
                print(f"{info.filename}: kept {found[arch]:,} of {sum(found.values()):,} bytes of machine code")
            slimmed.writestr(zipfile.ZipInfo(info.filename, info.date_time), bytes(data), zipfile.ZIP_LZMA)
    print(f"{target.name}: {wheel.stat().st_size:,} -> {target.stat().st_size:,} bytes")
    return target


if __name__ == "__main__":
    slim_wheel(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

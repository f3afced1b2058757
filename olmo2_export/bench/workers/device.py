"""What the device can do at most, as PyTorch reaches it: bytes copied and read, and bfloat16 products.

    python -m olmo2_export.bench.workers.device DEVICE THREADS

The arrays are far larger than any cache. A copy moves each byte twice, a sum once: decoding is like the sum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from olmo2_export.bench.workers.common import finish

_REPEATS = 7
_MATRIX = {"cuda": 8192, "cpu": 512}
_ARRAY_BYTES = {"cuda": 4 << 30, "cpu": 512 << 20}


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the median time of a call, after three that are not counted."""

    def once() -> float:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - started

    return statistics.median([once() for _ in range(3 + _REPEATS)][3:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=list(_MATRIX))
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n, device = _MATRIX[args.device], args.device
    source = torch.ones(_ARRAY_BYTES[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    read = seconds(source.sum, device)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = seconds(lambda: a @ b, device)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "array_bytes": source.nbytes,
        "copied_bytes_per_second": 2 * source.nbytes / copy,  # read and written
        "read_bytes_per_second": source.nbytes / read,
        "bf16_flops_per_second": 2 * n**3 / product,
    }
    if device == "cuda":
        result["device_memory_mb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e6)
    finish(result)


if __name__ == "__main__":
    main()

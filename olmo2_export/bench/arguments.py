"""The arguments of a comparison, for both of its commands. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from olmo2_export.bench.processes import ROOT

PEERS = ("transformers", "optimum-onnx", "onnxruntime-genai", "openvino-genai", "llama.cpp")
CONTEXTS = (128, 512, 2048)
"""tokens of the prompts, where no others are asked for"""


def declare_setting(parser: argparse.ArgumentParser) -> None:
    """Declare what is measured and beside whom."""
    parser.add_argument(
        "--contexts", type=int, nargs="+", metavar="N", help="tokens; default: of 128 512 2048 those that fit"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], metavar="N", help="rows; default 1 4")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of a row; default 32")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of everything, in turns; default 5")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin no repeat but the first that would take measuring beyond this"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the physical cores this process may use")
    parser.add_argument(
        "--vs",
        nargs="+",
        choices=[*PEERS, "all"],
        default=[],
        metavar="PEER",
        help=f"measure beside it, if it is installed (make peers): {', '.join(PEERS)}, or all",
    )
    parser.add_argument("--peers", type=Path, default=ROOT, metavar="DIR", help="where make peers put its venvs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the peers' models here, and use those there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON of the last line there too")

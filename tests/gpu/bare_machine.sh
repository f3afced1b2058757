#!/usr/bin/env bash
# The rows of CHECKLIST.md on a machine without a network, whose own Python has torch, transformers, onnx and pytest. What it
# lacks, such as onnxruntime-gpu, lies in a folder as wheels cut in pieces (NAME.whl.part-00, -01, ...).
#
#   tests/gpu/bare_machine.sh [WHEELS] [PYTEST OPTIONS...]
set -euo pipefail
cd "$(dirname "$0")/../.."
pieces=${1:-.whl}
shift || true
site=${SITE:-$HOME/site}
if [ -d "$pieces" ] && [ ! -d "$site/onnxruntime" ]; then
  joined=$(mktemp -d)
  for part in $(find "$pieces" -name '*.part-*' -printf '%f\n' | sort); do
    cat "$(find "$pieces" -name "$part" | head -n 1)" >> "$joined/${part%.part-*}"
  done
  python3 -m pip install --quiet --no-index --no-deps --target "$site" "$joined"/*.whl
fi
# the metadata of this checkout, which names its version
python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" --upgrade .
export PYTHONPATH="$PWD:$site"
exec python3 -m pytest -q -o filterwarnings=default -p no:cacheprovider --tb=short --show-capture=no tests/gpu/gpu_*.py "$@"

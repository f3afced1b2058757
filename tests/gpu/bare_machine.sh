#!/usr/bin/env bash
# The rows of CHECKLIST.md and the benchmark on a machine without a network whose time is short: one command a step.
# What that machine's own Python lacks is carried to it as wheels, in pieces of 36 MB, in folders that git ignores.
#
#   tests/gpu/bare_machine.sh prepare     here: .whl/01 and .whl/02, with onnxruntime-gpu for that Python, slimmed to ARCH
#   tests/gpu/bare_machine.sh rehearse    here, on the CPU, at the demo's size: models, rows, benchmark; PYTHON: which to use
#
#   tests/gpu/bare_machine.sh first       there, with .whl/01: versions and ceilings; models are made in the background
#   tests/gpu/bare_machine.sh second      there, with .whl/02: installs, then the rows, quickest first
#   tests/gpu/bare_machine.sh third       there: the benchmark on those models, one round
#
# Results go to OUT as they come, so that a run that is cut off has shown something. Settings, by environment:
#   OUT=gpu-results  KEEP=~/gpu (what the steps leave to each other)  WHEELS=.whl  PYTHON=python3  ARCH=90  FOR_PYTHON=3.12
#   SHAPE=1B  DEVICE=cuda  VARIANTS="bf16 q4f16"  SECONDS_OF_ROWS=230  SECONDS_A_ROW=60  MINUTES_OF_BENCH=5
set -euo pipefail
cd "$(dirname "$0")/../.."
step=${1:-}
OUT=${OUT:-gpu-results} KEEP=${KEEP:-$HOME/gpu} WHEELS=${WHEELS:-.whl} PYTHON=${PYTHON:-python3}
ARCH=${ARCH:-90} FOR_PYTHON=${FOR_PYTHON:-3.12} SHAPE=${SHAPE:-1B} DEVICE=${DEVICE:-cuda} VARIANTS=${VARIANTS:-bf16 q4f16}
SECONDS_OF_ROWS=${SECONDS_OF_ROWS:-230} SECONDS_A_ROW=${SECONDS_A_ROW:-60} MINUTES_OF_BENCH=${MINUTES_OF_BENCH:-5}
site=$KEEP/site
export PYTHONPATH="$PWD:$site"

prepare() {
  local scratch platforms=()
  scratch=$(mktemp -d)
  trap "rm -rf '$scratch'" EXIT
  for n in 28 27 17 24 31 34 35; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$FOR_PYTHON" --implementation cp \
    "${platforms[@]}" --platform any --dest "$scratch" onnxruntime-gpu==1.31.1 onnx-ir==1.1.0
  "$PYTHON" tests/gpu/slim_wheel.py "$scratch"/onnxruntime_gpu-*.whl "$scratch/slim" "$ARCH"
  rm -rf "$WHEELS" && mkdir -p "$WHEELS/01" "$WHEELS/02"
  mv "$scratch"/onnx_ir-*.whl "$WHEELS/01/"
  split -b 36M -d "$scratch"/slim/*.whl "$scratch/$(basename "$scratch"/slim/*.whl).part-"
  mv "$scratch"/*.part-00 "$WHEELS/01/"
  mv "$scratch"/*.part-0[1-9] "$WHEELS/02/"
  du -sh "$WHEELS"/*
}

take() { # a folder of wheels and pieces: kept for the next step; whole wheels are installed
  mkdir -p "$KEEP/pieces" "$site" "$OUT"
  cp "$WHEELS/$1"/* "$KEEP/pieces/"
  find "$KEEP/pieces" -name '*.whl' -exec "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" {} +
}

install_checkout() { # no more than the metadata that says its version: the code is read from here
  local version folder
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
  folder=$site/olmo2_export-$version.dist-info
  mkdir -p "$folder"
  printf 'Metadata-Version: 2.1\nName: olmo2-export\nVersion: %s\n' "$version" >"$folder/METADATA"
}

first() {
  take 01
  install_checkout
  setsid nohup "$0" models >"$KEEP/models.log" 2>&1 </dev/null &
  {
    nvidia-smi || true
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|transformers|onnx|numpy|triton|cuda|nvidia)' || true
    "$PYTHON" -m olmo2_export.bench.workers.device "$DEVICE" 4
  } 2>&1 | tee "$OUT/first.txt"
}

models() { # the checkpoint of the benchmark's shape and its package
  rm -rf "$KEEP/checkpoint" "$KEEP/package" "$KEEP/models.done"
  mkdir -p "$KEEP/checkpoint"
  "$PYTHON" -c 'import sys, pathlib; from olmo2_export.bench.checkpoint import SIZES, write_checkpoint
write_checkpoint(pathlib.Path(sys.argv[1]), SIZES[sys.argv[2]])' "$KEEP/checkpoint" "$SHAPE"
  # shellcheck disable=SC2086
  "$PYTHON" -m olmo2_export export "$KEEP/checkpoint" --out "$KEEP/package" $(printf -- '--variant %s ' $VARIANTS)
  touch "$KEEP/models.done"
}

rows() { # quickest first, each line of results as it comes
  mkdir -p "$OUT"
  timeout "$SECONDS_OF_ROWS" "$PYTHON" -m pytest -q -o filterwarnings=default -p no:cacheprovider --tb=short --show-capture=no \
    --device "$DEVICE" --row-seconds "$SECONDS_A_ROW" --rows-to "$OUT/rows.jsonl" tests/gpu/gpu_onnxruntime.py \
    2>&1 | tee "$OUT/rows.txt" || echo "rows: ended with ${PIPESTATUS[0]}" | tee -a "$OUT/rows.txt"
}

second() {
  take 02
  local wheel
  wheel=$(basename "$(find "$KEEP/pieces" -name '*.part-00')" .part-00)
  cat "$KEEP/pieces/$wheel".part-* >"$KEEP/$wheel"
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$KEEP/$wheel"
  cp "$KEEP/models.log" "$OUT/models.txt" || true
  rows
}

third() {
  mkdir -p "$OUT"
  [ -e "$KEEP/models.done" ] || { tail -n 5 "$KEEP/models.log"; echo "third: the models are not made yet"; exit 1; } 2>&1
  local wanted=()
  for variant in $VARIANTS; do wanted+=(--with "ort:$variant"); done
  "$PYTHON" -m olmo2_export.bench gpu --size "$SHAPE" --package "$KEEP/package" --reference "$KEEP/checkpoint" \
    "${wanted[@]}" --device "$DEVICE" --rounds 1 --minutes "$MINUTES_OF_BENCH" ${STEPS:+--steps "$STEPS"} 2>&1 | tee "$OUT/bench.txt"
}

rehearse() {
  export DEVICE=cpu SHAPE=demo VARIANTS=fp16 STEPS=8 SECONDS_OF_ROWS=900 SECONDS_A_ROW=300
  DEVICE=cpu SHAPE=demo VARIANTS=fp16 STEPS=8 SECONDS_OF_ROWS=900 SECONDS_A_ROW=300
  KEEP=$(mktemp -d) && site=$KEEP/site && mkdir -p "$site"
  trap 'rm -rf "$KEEP"' EXIT
  PYTHONPATH="$PWD:$PYTHONPATH"
  models
  rows
  third
}

case $step in
  prepare | first | models | second | third | rehearse) "$step" ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit 2 ;;
esac

#!/usr/bin/env bash
# The rows of CHECKLIST.md and the benchmark on a machine without a network that is lent for minutes: one command a step.
#
#   tests/gpu/bare_machine.sh prepare [ARCH] [PYTHON]   here: onnxruntime-gpu for that Python (3.12), slimmed to that
#                                                       GPU generation (90), in two pieces: WHEELS/01 and WHEELS/02
#   tests/gpu/bare_machine.sh rehearse                  here, on the CPU, at the demo's size: the three steps below
#
#   tests/gpu/bare_machine.sh first                     there, with WHEELS/01: versions and ceilings; models are made
#                                                       in the background
#   tests/gpu/bare_machine.sh second                    there, with WHEELS/02: installs, then the rows, quickest first
#   tests/gpu/bare_machine.sh third                     there: the benchmark on those models, one round, 5.5 minutes
#
# `first cpu` and so on rehearse one step. Results go to OUT as they come, so that a step that is cut off has shown
# something; what the steps leave to each other goes to KEEP. Each step ends by itself: 1, 4 and 6 minutes.
#
#   OUT=gpu-results  KEEP=~/gpu  WHEELS=.whl  PYTHON=python3, which has torch, transformers, onnx, onnxruntime and pytest
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu-results} KEEP=${KEEP:-$HOME/gpu} WHEELS=${WHEELS:-.whl} PYTHON=${PYTHON:-python3}
step=${1:-} device=${2:-cuda}
site=$KEEP/site checkout=$KEEP/checkout
settings() {
  case $device in
    cuda) shape=1B variants=(bf16 q4f16) steps=128 all_rows=210 one_row=75 minutes=5.5 ;;
    cpu) shape=demo variants=(fp16 q4f16) steps=8 all_rows=900 one_row=300 minutes=15 ;;
    *) echo "$step: expected cuda or cpu, found $device" >&2 && exit 2 ;;
  esac
}

prepare() {
  local arch=${1:-90} version=${2:-3.12} scratch platforms=() wheel
  scratch=$(mktemp -d)
  trap "rm -rf '$scratch'" EXIT
  for n in 28 27 17 24 31 34 35; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$scratch" onnxruntime-gpu==1.31.1
  "$PYTHON" tests/gpu/slim_wheel.py "$scratch"/*.whl "$scratch/slim" "$arch"
  wheel=$(basename "$scratch"/slim/*.whl)
  rm -rf "$WHEELS" && mkdir -p "$WHEELS/01" "$WHEELS/02"
  split --bytes 36M --numeric-suffixes=1 "$scratch/slim/$wheel" "$scratch/$wheel.part-"
  mv "$scratch/$wheel.part-01" "$WHEELS/01/"
  mv "$scratch/$wheel".part-* "$WHEELS/02/"
  du -sh "$WHEELS"/*
}

take() { # one folder of pieces, for this Python: kept for the next step
  local tag
  tag=$("$PYTHON" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
  mkdir -p "$KEEP/pieces" "$site" "$OUT"
  cp "$WHEELS/$1"/*-"$tag"-* "$KEEP/pieces/" 2>/dev/null || echo "$step: no piece for $tag in $WHEELS/$1: its own onnxruntime is used"
}

first() {
  settings
  take 01
  local version
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
  mkdir -p "$checkout/olmo2_export-$version.dist-info" # no more of it: the code is read from here
  printf 'Metadata-Version: 2.1\nName: olmo2-export\nVersion: %s\n' "$version" >"$checkout/olmo2_export-$version.dist-info/METADATA"
  PYTHON=$PYTHON KEEP=$KEEP setsid nohup tests/gpu/bare_machine.sh models "$device" >"$KEEP/models.log" 2>&1 </dev/null &
  {
    nvidia-smi || true
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|transformers|onnx|numpy|triton|cuda|nvidia)' || true
    "$PYTHON" -m olmo2_export.bench.workers.device "$device" 4
  } 2>&1 | tee "$OUT/first.txt"
}

models() { # each is there when it is whole: the demo's package, then the checkpoint and a package a variant
  settings
  export PYTHONPATH="$PWD:$checkout" # not $site: onnxruntime-gpu comes there while this goes on
  rm -rf "$KEEP/demo" "$KEEP/checkpoint" "${variants[@]/#/$KEEP/}"
  date +%T
  "$PYTHON" -m olmo2_export export demo --out "$KEEP/demo" --variant bf16 --variant fp16 --variant q4f16
  date +%T
  "$PYTHON" -c 'import sys, pathlib; from olmo2_export.bench.checkpoint import SIZES, write_checkpoint
out = pathlib.Path(sys.argv[1]); out.mkdir(); write_checkpoint(out, SIZES[sys.argv[2]])' "$KEEP/checkpoint" "$shape"
  for variant in "${variants[@]}"; do
    date +%T
    "$PYTHON" -m olmo2_export export "$KEEP/checkpoint" --out "$KEEP/$variant" --variant "$variant"
  done
  date +%T
}

second() {
  settings
  take 02
  if compgen -G "$KEEP/pieces/*.part-*" >/dev/null; then
    local wheel
    wheel=$(basename "$(ls "$KEEP"/pieces/*.part-* | head -n 1)")
    wheel=$KEEP/${wheel%.part-*}
    cat "$KEEP"/pieces/*.part-* >"$wheel"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheel"
    # onnxruntime looks for CUDA's libraries beside itself, and they are beside torch
    ln -sfn "$("$PYTHON" -c 'import nvidia; print(list(nvidia.__path__)[0])')" "$site/nvidia" || true
  fi
  "$PYTHON" -c 'import sys; from runtimes.ort.devices import find_device; print(find_device(sys.argv[1]))' "$device" \
    2>&1 | tee "$OUT/device.txt" || true
  rows
  tr '\r' '\n' <"$KEEP/models.log" | grep -vE '^ *$|%\|' | tail -n 20 | tee "$OUT/models.txt"
}

rows() { # a row that fails or takes too long ends its process, as the GPU may be of no use to it any more; the rest go on
  local end=$((SECONDS + all_rows)) code=1
  rm -f "$OUT/rows.jsonl"
  while ((SECONDS < end)); do
    code=0
    timeout --kill-after 5 $((end - SECONDS)) "$PYTHON" -m pytest -q -x -o filterwarnings=default -p no:cacheprovider \
      --tb=short --show-capture=no --device "$device" --demo "$KEEP/demo" --rows-to "$OUT/rows.jsonl" \
      --row-seconds "$one_row" tests/gpu/gpu_onnxruntime.py 2>&1 | tee -a "$OUT/rows.txt" || code=${PIPESTATUS[0]}
    case $code in 0 | 2 | 3 | 4 | 5) break ;; esac # all done, or nothing that another process would do better
  done
  echo "rows: ended with $code after $((all_rows - end + SECONDS)) s"
}

third() {
  settings
  mkdir -p "$OUT"
  local wanted=()
  for variant in "${variants[@]}"; do
    if [ -d "$KEEP/$variant" ]; then
      wanted+=(--with "ort:$variant" --package "$KEEP/$variant")
    else
      echo "third: no package of $variant yet"
    fi
  done
  [ ${#wanted[@]} -gt 0 ] || { tail -n 5 "$KEEP/models.log" && exit 1; }
  "$PYTHON" -m olmo2_export.bench gpu --size "$shape" --reference "$KEEP/checkpoint" "${wanted[@]}" --device "$device" \
    --rounds 1 --minutes "$minutes" --steps "$steps" --out "$OUT/bench.json" 2>&1 | tee "$OUT/bench.txt"
}

rehearse() {
  device=cpu
  KEEP=$(mktemp -d) && site=$KEEP/site checkout=$KEEP/checkout
  trap "rm -rf '$KEEP'" EXIT
  export PYTHONPATH="$PWD:$checkout:$site"
  first
  wait # for the models
  second
  third
}

export PYTHONPATH="$PWD:$checkout:$site"
case $step in
  prepare) prepare "${@:2}" ;;
  first | models | second | third | rehearse) "$step" ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit 2 ;;
esac

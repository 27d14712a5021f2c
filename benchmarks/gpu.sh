#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes:  bash benchmarks/gpu.sh [STAGE ...]
# Stages: build test sanitize bench; all of them without arguments. Each writes benchmarks/results/gpu-STAGE.json
# and can be run again alone. A tool that the machine refuses is recorded as "not run" with the reason.
# PYTHON chooses the interpreter (one with torch for CUDA); nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu.sh: $PYTHON has no torch that sees a CUDA device" >&2; exit 2; }
results=benchmarks/results
mkdir -p "$results"
failed=0

record() { # stage, status, seconds, detail
  "$PYTHON" - "$results/gpu-$1.json" "$@" <<'PY'
import json, sys
path, stage, status, seconds, detail = sys.argv[1:]
json.dump({"stage": stage, "status": status, "seconds": int(seconds), "detail": detail[-4000:]}, open(path, "w"), indent=1)
PY
}

run() { # stage, limit in seconds, command...
  local stage=$1 limit=$2 start=$SECONDS log status
  shift 2
  echo "== $stage: $*"
  log=$(mktemp)
  if timeout "$limit" "$@" 2>&1 | tee "$log" | tail -n 40; then status=ok; else status=failed failed=1; fi
  record "$stage" "$status" $((SECONDS - start)) "$(tail -n 60 "$log")"
  rm -f "$log"
}

# Where the machine's build tools are too old for pyproject.toml, the CUDA library alone: it is all that counts here.
build() {
  local chip
  chip=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  LMTT_CUDA=1 LMTT_CUDA_CHIPS=$chip "$PYTHON" setup.py -q build_ext --inplace ||
    nvcc -std=c++17 -O3 -Icsrc -Xcompiler -fPIC -shared "-arch=sm_$chip" -o lmtt/_lmtt_cuda.so csrc/cuda/*.cu
}

# compute-sanitizer on small shapes; it refuses some machines, which is no fault of the kernels.
sanitize() {
  local tool
  command -v compute-sanitizer >/dev/null || { echo "not run: no compute-sanitizer"; return 0; }
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$results/sanitizer-$tool.log" \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py -k "attention_shares and bfloat16 or neurons and bfloat16"
    local code=$?
    grep -qi "not supported" "$results/sanitizer-$tool.log" && { echo "$tool not run: device not supported"; code=0; }
    rm -f "$results/sanitizer-$tool.log"
    [ $code -eq 0 ] || return $code
  done
}

# Python finds lmtt.kernels and lmtt.viz through the installed package; without one, through links in build/tree.
if ! "$PYTHON" -c 'import lmtt.kernels' 2>/dev/null; then
  mkdir -p build/tree
  ln -sfn "$PWD/lmtt" build/tree/lmtt
  export PYTHONPATH="$PWD/build/tree${PYTHONPATH:+:$PYTHONPATH}" LMTT_TREE=1
  "$PYTHON" - <<'PY'
import os, pathlib, shutil
tree = pathlib.Path("build/tree/lmtt")
tree.unlink()
shutil.copytree("lmtt", tree)
for name in ("kernels", "viz"):
    os.symlink(os.path.abspath(name), tree / name)
PY
fi

for stage in ${*:-build test sanitize bench}; do
  case $stage in
    build) run build 120 bash -c "$(declare -f build); build" ;;
    test) run test 150 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py ;;
    sanitize) run sanitize 90 bash -c "results=$results; $(declare -f sanitize); sanitize" ;;
    bench) run bench 240 "$PYTHON" benchmarks/gpu_bench.py --json "$results/gpu.json" ;;
    *) echo "no such stage: $stage (build test sanitize bench)" >&2; exit 2 ;;
  esac
  if [ "$stage" = build ] && [ -n "${LMTT_TREE:-}" ]; then cp -f lmtt/*.so build/tree/lmtt/ 2>/dev/null; fi
done
exit $failed

#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes:  bash benchmarks/gpu.sh [--dry-run] [STAGE ...]
# Stages: build test sanitize bench stream; all of them without arguments. Each writes build/gpu/gpu-STAGE.json
# (RESULTS chooses another folder) and can be run again alone. A tool that the machine refuses is recorded as
# "not run" with the reason. PYTHON chooses the interpreter (one with torch for CUDA); nothing is downloaded.
# --dry-run tries every stage on a machine without a GPU: tiny, interpreted, no measurement.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export RESULTS=${RESULTS:-build/gpu}
dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=--dry-run
  shift
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi
export DRY=$dry
# Without the options of pyproject.toml: it is strict about settings of plugins that this machine may lack.
export TESTS="-m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib -W ignore tests/gpu/test_kernels.py tests/gpu/test_unembedding.py tests/gpu/test_features.py"
mkdir -p "$RESULTS"
failed=0

if [ -z "$dry" ]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: $PYTHON has no torch that sees a CUDA device" >&2; exit 2; }
fi

record() { # stage, status, seconds, file with the output
  "$PYTHON" - "$@" <<'PY'
import json, os, pathlib, sys
stage, status, seconds, log = sys.argv[1:]
lines = pathlib.Path(log).read_text(errors="replace").splitlines()
refused = [line for line in lines if line.startswith("not run: ")]
status = "not run" if status == "ok" and refused else status
record = {"stage": stage, "status": status, "seconds": int(seconds), "detail": refused + lines[-60:]}
if os.environ["DRY"]:
    record["dry run"] = True
pathlib.Path(os.environ["RESULTS"], f"gpu-{stage}.json").write_text(json.dumps(record, indent=1) + "\n")
print(f"== {stage}: {status} after {seconds} s")
PY
}

run() { # stage, limit in seconds, command...
  local stage=$1 limit=$2 start=$SECONDS log status
  shift 2
  echo "== $stage"
  log=$(mktemp)
  if timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$log" | tail -n 60; then status=ok; else status=failed failed=1; fi
  record "$stage" "$status" $((SECONDS - start)) "$log" || failed=1
  rm -f "$log"
}

# Where the machine's build tools are too old for pyproject.toml, the CUDA library alone: it is all that counts here.
build() {
  local chip
  if [ -n "$DRY" ]; then
    command -v nvcc >/dev/null || { echo "not run: no nvcc"; return 0; }
    nvcc -std=c++17 -O3 -Icsrc -Xcompiler -fPIC -shared -arch=sm_90 -o "$RESULTS/dry.so" csrc/cuda/*.cu && rm "$RESULTS/dry.so"
    return
  fi
  command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    { echo "not run: no nvcc, so without the kernels in CUDA"; return 0; }
  export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
  chip=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  LMTT_CUDA=1 LMTT_CUDA_CHIPS=$chip timeout --kill-after=5 40 "$PYTHON" setup.py -q build_ext --inplace ||
    timeout --kill-after=5 25 nvcc -std=c++17 -O3 -Icsrc -Xcompiler -fPIC -shared "-arch=sm_$chip" -o lmtt/_lmtt_cuda.so csrc/cuda/*.cu
}

tests() { # pytest's arguments
  PYTHONSAFEPATH=1 "$PYTHON" $TESTS "$@"
}

# Most of the time goes into compiling each kernel for the first time, on one core: eight processes share the tests.
all_tests() {
  local some code=0 waiting=()
  [ -z "$DRY" ] || { tests -k "out_of_memory"; return; }
  for some in "test_kernels and width and float32" "test_kernels and width and bfloat16" \
    "test_kernels and width and float16 and not bfloat16" "attention_shares and l1" "attention_shares and l2" \
    "test_features and float32" "test_features and bfloat16" "not width and not attention_shares and not test_features"; do
    tests -k "$some" &
    waiting+=($!)
  done
  for some in "${waiting[@]}"; do wait "$some" || code=1; done
  return $code
}

# compute-sanitizer on small shapes; it refuses some machines, which is no fault of the kernels.
sanitize() {
  local tool code log some="attention_shares and bfloat16 or test_neurons and bfloat16"
  if [ -n "$DRY" ]; then
    tests --collect-only -k "$some" | tail -n 1
    return "${PIPESTATUS[0]}"
  fi
  command -v compute-sanitizer >/dev/null || { echo "not run: no compute-sanitizer"; return 0; }
  for tool in memcheck racecheck; do
    log=$(mktemp)
    compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$log" \
      "$PYTHON" $TESTS -k "$some"
    code=$?
    tail -n 20 "$log"
    if grep -qiE "not supported|unable to|debugger.* (is )?not" "$log" && ! grep -q "ERROR SUMMARY: [1-9]" "$log"; then
      echo "not run: $tool: $(grep -iE 'not supported|unable to|debugger' "$log" | head -n 1)"
      code=0
    fi
    rm -f "$log"
    [ $code -eq 0 ] || return $code
  done
}

# Python finds lmtt.kernels and lmtt.viz through the installed package; without one, through links in build/tree.
tree() {
  "$PYTHON" - <<'PY'
import os, pathlib, shutil
tree = pathlib.Path("build/tree/lmtt")
shutil.rmtree(tree, ignore_errors=True)
shutil.copytree("lmtt", tree)
for name in ("kernels", "viz"):
    os.symlink(os.path.abspath(name), tree / name)
PY
}
if ! PYTHONSAFEPATH=1 "$PYTHON" -c 'import lmtt.kernels' 2>/dev/null; then
  tree || exit 2
  export PYTHONPATH="$PWD/build/tree${PYTHONPATH:+:$PYTHONPATH}" LMTT_TREE=1
fi
export -f build tests all_tests sanitize
# Scripts in benchmarks/ find each other through their own folder, which safe paths would hide.
bench="$PYTHON benchmarks"

for stage in ${*:-build test sanitize bench stream}; do
  case $stage in
    build) run build 70 bash -c build ;;
    test) run test 120 bash -c all_tests ;;
    sanitize) run sanitize 60 bash -c sanitize ;;
    bench) run bench 145 env PYTHONSAFEPATH= $bench/gpu_bench.py $dry --limit 120 --json "$RESULTS/gpu.json" ;;
    stream) run stream 80 env PYTHONSAFEPATH= $bench/gpu_stream.py $dry --json "$RESULTS/stream.json" ;;
    *) echo "no such stage: $stage (build test sanitize bench stream)" >&2; exit 2 ;;
  esac
  if [ "$stage" = build ] && [ -n "${LMTT_TREE:-}" ]; then cp -f lmtt/*.so build/tree/lmtt/ 2>/dev/null; fi
done
exit $failed

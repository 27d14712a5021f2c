#!/usr/bin/env bash
# Run the tests that touch transformers on the oldest version that the package metadata allows.
# It lies in a folder of its own before the environment's; torch and everything else stay the environment's.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python="$root/.venv/bin/python"
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' "$root/pyproject.toml")
[ -n "$oldest" ] || { echo "no lower bound of transformers in pyproject.toml" >&2; exit 1; }
place="$root/build/transformers-$oldest"
if [ ! -e "$place/.installed" ]; then
  rm -rf "$place" && mkdir -p "$place"
  # What that version needs older than we do goes beside it; the rest is held to what everything is tested on.
  grep -vE '^(transformers|huggingface_hub|tokenizers|typer|click)==' "$root/constraints.txt" >"$place/constraints.txt"
  "$python" -m pip install -q --disable-pip-version-check --target "$place" -c "$place/constraints.txt" "transformers~=$oldest.0"
  touch "$place/.installed"
fi
cd "$root"
export PYTHONPATH="$place" PYTHONSAFEPATH=1
"$python" - "$oldest" <<'PY'
import sys, transformers
assert transformers.__version__.startswith(sys.argv[1] + "."), transformers.__version__
print("transformers", transformers.__version__)
PY
# Models that this version has not, or has wrong, are skipped with the reason that stands in lmtt/testing_models.py.
exec "$python" -m pytest -q -rs tests/structure tests/pipeline/test_trace.py \
  'tests/streaming/test_streamed.py::test_same_bits_within_three_limits[llama]' \
  'tests/streaming/test_streamed.py::test_same_bits_within_three_limits[qwen2_moe]' "$@"

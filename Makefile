# `make bench` and `make test` work on a fresh clone: they make what they need first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup bench test test-clients wheel sanitize statistics finetune lint clean

setup: $(INSTALLED)

$(INSTALLED): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Fused against eager on BERT-base with real gradients: on the GPU if there is one, else on the CPU.
bench: setup
	$(BIN)/python -m benchmarks

# Triton decides at import whether it interprets its kernels, so they have a run of their own. A process a core,
# of one thread each; tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadgroup
test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m backend

# The frameworks that PATS is used in, in a virtual environment of their own: docs/integrations.md. DeepSpeed compiles
# its operators when they are asked for, not as it is installed. The package is the one in this folder.
CLIENTS := .venv-clients
test-clients: setup $(CLIENTS)/.installed
	PATS_CLIENTS=1 OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/clients --numprocesses auto --maxprocesses 8

$(CLIENTS)/.installed: requirements-dev.txt $(wildcard tests/clients/*.txt)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --requirement requirements-dev.txt --requirement tests/clients/requirements.txt
	DS_BUILD_OPS=0 $(CLIENTS)/bin/python -m pip install --quiet --no-build-isolation \
	    --requirement tests/clients/requirements-deepspeed.txt
	touch $@

# One wheel for every Python and torch in dist/, tagged for its glibc and proved in an environment of its own.
wheel: setup
	$(BIN)/python tests/native/wheel.py

# The C++ extension under GCC's address, undefined-behaviour and thread sanitizers, and between guard pages.
sanitize: setup
	$(BIN)/python tests/native/sanitize.py

# The noise's randomness: dieharder and TestU01 where they are installed, moments, tails, correlations, avalanche.
statistics: setup
	TRITON_INTERPRET=1 $(BIN)/python -m benchmarks.statistics

# AdamW against PATS with the Hugging Face Trainer, offline: a small BERT learns a grammar's sentences.
finetune: setup
	$(BIN)/python examples/run_glue.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv $(CLIENTS) build dist pats_kernels.egg-info pats_kernels/*.so pats_kernels/_build.py

# `make bench` and `make test` work on a fresh clone: they first install and build what they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TORCHES := torch-2.10 torch-2.14

.PHONY: setup docs arm bench test test-ptx fuzz test-clients test-versions $(TORCHES) wheel sanitize statistics finetune lint clean

setup: $(INSTALLED)

$(INSTALLED): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Fused against eager on BERT-base with real gradients: on the GPU if there is one, else on the CPU.
bench: setup
	$(BIN)/python -m benchmarks

# Triton decides at import whether it interprets its kernels, so the interpreted kernels have a run of their own. One
# process per core, each with one thread; tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadgroup
test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m backend

# The GPU's machine code on the CPU: all tests of a backend run on the code from Triton and nvcc for each architecture.
test-ptx: setup
	PATS_PTX=80,90,100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ptx --numprocesses auto --maxprocesses 8 --dist loadgroup

# Random sequences of what users do, state dictionaries with errors, and 10,000 steps. Each run has new examples, N of
# each kind, and prints them. 400 take about ten minutes on a core.
N ?= 400
fuzz: setup
	PATS_FUZZ=$(N) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_machine.py tests/test_state_fuzz.py \
	    tests/test_growth.py --numprocesses 0 --capture no

# The frameworks that PATS is used in (docs/integrations.md), in a virtual environment of their own. DeepSpeed compiles
# its operators at first use, not during installation. The package is the one in this folder.
CLIENTS := .venv-clients
test-clients: setup $(CLIENTS)/.installed
	PATS_CLIENTS=1 OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/clients --numprocesses auto --maxprocesses 8

$(CLIENTS)/.installed: requirements-dev.txt $(wildcard tests/clients/*.txt)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --requirement requirements-dev.txt --requirement tests/clients/requirements.txt
	DS_BUILD_OPS=0 $(CLIENTS)/bin/python -m pip install --quiet --no-build-isolation \
	    --requirement tests/clients/requirements-deepspeed.txt
	touch $@

# Both passes of `make test` with the oldest and the newest supported torch and their Triton, one after the other, each
# in a virtual environment of its own; other packages are those of the development. They run on a copy of this folder,
# because the extension in here belongs to .venv. `make torch-2.10` or `make torch-2.14` runs only one of them.
test-versions:
	for torch in $(TORCHES); do $(MAKE) $$torch || exit 1; done

VERSION_TESTS = cd .venv-$@/tree && $(1) OMP_NUM_THREADS=1 ../bin/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadgroup
$(TORCHES): %: .venv-%/.installed
	rm -rf .venv-$@/tree && mkdir .venv-$@/tree
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --no-dereference -t .venv-$@/tree
	.venv-$@/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .venv-$@/tree
	$(call VERSION_TESTS)
	$(call VERSION_TESTS,TRITON_INTERPRET=1) -m backend

.venv-torch-%/.installed: requirements-dev.txt tests/versions/torch-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	sed -n '/^\(torch\|triton\|numpy\)==/d; /^peft==/q; p' requirements-dev.txt > $(@D)/others.txt
	$(@D)/bin/python -m pip install --quiet --requirement tests/versions/torch-$*.txt --requirement $(@D)/others.txt
	touch $@

# One wheel for every Python and torch, in dist/, tagged for its glibc and tested in an environment of its own.
wheel: setup
	$(BIN)/python tests/native/wheel.py

# The C++ extension under GCC's address, undefined-behaviour and thread sanitizers, and between guard pages.
sanitize: setup
	$(BIN)/python tests/native/sanitize.py

# The CPU kernel on 64-bit Arm, cross-compiled and run by qemu: the same bits as AVX2's.
arm: setup
	$(BIN)/python tests/native/arm.py

# The noise's randomness: dieharder and TestU01 if they are installed, moments, tails, correlations, avalanche.
statistics: setup
	TRITON_INTERPRET=1 $(BIN)/python -m benchmarks.statistics

# AdamW and PATS in the Hugging Face Trainer, offline: a small BERT learns the sentences of a grammar.
finetune: setup
	$(BIN)/python examples/run_glue.py

# The site, in site/, from docs/ and the three pages beside it. A broken link or an unreadable docstring is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv $(CLIENTS) $(TORCHES:%=.venv-%) build dist pats_kernels.egg-info pats_kernels/*.so pats_kernels/_build.py

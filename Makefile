# `make bench` and `make test` work on a fresh clone: they make what they need first.
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

# Triton decides at import whether it interprets its kernels, so they have a run of their own. A process a core,
# of one thread each; tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadgroup
test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m backend

# The GPU's machine code on the CPU: all tests of a backend, on what Triton and nvcc compile for each architecture.
test-ptx: setup
	PATS_PTX=80,90,100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ptx --numprocesses auto --maxprocesses 8 --dist loadgroup

# What users do in any order, state dictionaries with errors in them and 10,000 steps: other examples in each run,
# N of each kind, and what they were. 400 take a core about ten minutes.
N ?= 400
fuzz: setup
	PATS_FUZZ=$(N) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_machine.py tests/test_state_fuzz.py \
	    tests/test_growth.py --numprocesses 0 --capture no

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

# The oldest and the newest torch that are supported, with their Triton, each in a virtual environment of its own with
# the development's other versions: both passes of `make test`, on a copy of this folder, as the extension that lies in
# here is .venv's. One after the other: `make torch-2.10` or `make torch-2.14` is one of them.
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

# One wheel for every Python and torch in dist/, tagged for its glibc and proved in an environment of its own.
wheel: setup
	$(BIN)/python tests/native/wheel.py

# The C++ extension under GCC's address, undefined-behaviour and thread sanitizers, and between guard pages.
sanitize: setup
	$(BIN)/python tests/native/sanitize.py

# The CPU kernel on 64-bit Arm, cross-compiled and run by qemu: the same bits as AVX2's.
arm: setup
	$(BIN)/python tests/native/arm.py

# The noise's randomness: dieharder and TestU01 where they are installed, moments, tails, correlations, avalanche.
statistics: setup
	TRITON_INTERPRET=1 $(BIN)/python -m benchmarks.statistics

# AdamW against PATS with the Hugging Face Trainer, offline: a small BERT learns a grammar's sentences.
finetune: setup
	$(BIN)/python examples/run_glue.py

# The site, of docs/ and the three pages beside it, in site/: a broken link or a docstring that cannot be read fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv $(CLIENTS) $(TORCHES:%=.venv-%) build dist pats_kernels.egg-info pats_kernels/*.so pats_kernels/_build.py

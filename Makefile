# make show   from a bare machine to the shipped model: its accuracy, and a picture of what its thoughts hold
# make demo   from a bare machine to five methods trained, compared and drawn (about 9 minutes; says so first)
# make test   from a bare machine to the whole test suite
#
# They make .venv with the machine's python3 (3.10 or newer) and install what this platform needs; the second time
# that takes no time. Linux with an NVIDIA card: make demo CUDA=1; later commands keep that build of MLX. ORACLE=1 adds
# PyTorch, transformers and mlx-lm, for the tests that compare with them or are about other models than GPT-2.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The build of MLX in .venv stays until another one is asked for, with CUDA=1, or CUDA= for the way back.
CUDA ?= $(if $(wildcard $(VENV)/.runtime-cuda),1)
RUNTIME := $(VENV)/.runtime-$(if $(CUDA),cuda,default)
DEVELOPMENT := $(VENV)/.development
COMPARISON := $(VENV)/.comparison
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
UNINSTALL := $(BIN)/python -m pip uninstall -qq -y --disable-pip-version-check

.PHONY: help show demo demo-quick test lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

show: $(RUNTIME)
	$(BIN)/python run.py args/graph_coconut_eval.yaml
	$(BIN)/python -m analysis.frontier pretrained/graph-coconut pretrained/graph_test.json

demo: $(RUNTIME)
	$(BIN)/python -m scripts.demo

demo-quick: $(RUNTIME)
	$(BIN)/python -m scripts.demo --quick

test: $(DEVELOPMENT) $(if $(ORACLE),$(COMPARISON))
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# Ctrl-C waits for the venv module (seconds), which would answer it with a traceback.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; $$($(PYTHON) --version 2>&1) was found. Name another: make PYTHON=..."; exit 1; }
	@(trap '' INT; exec $(PYTHON) -m venv $(VENV)) || { echo "error: no venv module (on Debian and Ubuntu: apt install python3-venv)"; rm -rf $(VENV); exit 1; }

# The builds of MLX hold a library of the same name, so the old one goes before the new one comes.
$(RUNTIME): requirements.txt | $(BIN)/python
	@echo "installing into $(VENV)"
	@rm -f $(VENV)/.runtime-*
	@sed 's/mlx\[cpu\]/mlx[$(if $(CUDA),cuda13,cpu)]/' requirements.txt > $(VENV)/requirements.txt
	@$(UNINSTALL) mlx mlx-cpu mlx-cuda-12 mlx-cuda-13
	$(PIP) -r $(VENV)/requirements.txt
	@touch $@

# mlx-whisper carries GPT-2's vocabulary: with it the tests need no download from a model host.
$(DEVELOPMENT): $(RUNTIME) requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps mlx-whisper==0.4.3
	@touch $@

$(COMPARISON): $(DEVELOPMENT) requirements-oracle.txt requirements-llm.txt
	$(PIP) -r requirements-oracle.txt -r requirements-llm.txt
	@touch $@

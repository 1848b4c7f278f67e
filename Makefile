# `make engines`, then `python -m runtime.serve`. Everything is made in .venv and build/, both ignored by git.
MODEL ?= shapes
DEVICES ?= auto
# LoRA files to fuse, FILE.safetensors or FILE.safetensors:0.8, and the sides of images in pixels, as in 512-1024
LORA ?=
SIZES ?=
CACHE ?=
# for a MODEL that is one file (x.safetensors): the folder of a diffusers model with the same layout
CONFIG ?=
# the folder of a model and the LoRA files give its bundle its name, as `python -m export` does
empty :=
FUSED = $(foreach file,$(LORA),+$(subst .safetensors,,$(notdir $(file))))
NAME = $(patsubst %.ckpt,%,$(patsubst %.safetensors,%,$(notdir $(abspath $(MODEL)))))$(subst $(empty) $(empty),,$(FUSED))$(if $(CACHE),+cache)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet
RUN = .venv/bin/python
# GPUs need CUDA's Python packages and TensorRT: `trt` for data-centre cards, TENSORRT=rtx for RTX cards
TENSORRT ?= trt
SETUP = $(if $(findstring cuda,$(DEVICES)),.venv/.$(if $(findstring onnxruntime,$(DEVICES)),gpu,$(TENSORRT)),.venv/.$(if $(findstring openvino,$(DEVICES)),openvino,export))

# what `gpu-check` is told: --only PART…, --lanes 1 2, --within SECONDS, --again
PARTS ?=
# the version of Python that `gpu-bundle` is for
PYTHON_THERE ?= 3.12

# two processes, each with whole files: what one makes serves all its tests
TOGETHER = -n 2 --dist loadfile --durations 40

.DEFAULT_GOAL := help
.PHONY: help engines embed serve test test-all test-container test-cluster soak lint bench bench-full gpu-check gpu-bundle train clean-engines clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.export: pyproject.toml
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv"
	@$(PIP) --editable '.[cpu,export,kserve]'
	@touch $@

.venv/.dev: .venv/.export
	@$(PIP) --editable '.[cpu,openvino,export,kserve,train,bench,metrics,dev,cuda,rtx]'
	@touch $@

.venv/.openvino: .venv/.export
	@$(PIP) --editable '.[cpu,openvino,export,kserve]'
	@touch $@

.venv/.trt .venv/.rtx: .venv/.export
	@$(PIP) --editable '.[cpu,export,kserve,cuda,$(patsubst .venv/.%,%,$@)]'
	@touch $@

.venv/.gpu: .venv/.export
	@$(RUN) -m pip uninstall --quiet --yes onnxruntime # both builds install the same files
	@$(PIP) --editable '.[export,kserve,cuda,gpu]'
	@touch $@

engines: $(SETUP) ## export MODEL (with LORA and SIZES) and compile it for DEVICES; a second run does nothing
	@$(RUN) -m export "$(MODEL)" --devices "$(DEVICES)" $(if $(LORA),--lora $(LORA)) $(if $(SIZES),--sizes $(SIZES)) $(if $(CONFIG),--config "$(CONFIG)") $(if $(CACHE),--cache)
	@$(RUN) -m engines build "$(NAME)" --devices "$(DEVICES)"
	@$(RUN) -m runtime.calibrate "$(NAME)" --devices "$(DEVICES)"

.venv/.embed: .venv/.export
	@$(PIP) --editable '.[cpu,export,kserve,embed]'
	@touch $@

embed: .venv/.embed ## the C library and its examples into build/embed/install; `runtime/embed/README.md` has the rest
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; options="$$($(RUN) -m runtime.embed)" || exit 1; \
	cmake -S runtime/embed -B build/embed/release -G Ninja $$options -DDRIFFUSION_TOOLS=ON --log-level=WARNING && \
	cmake --build build/embed/release && \
	cmake --install build/embed/release --prefix build/embed/install

serve: engines ## engines, then the server on http://127.0.0.1:8000
	@$(RUN) -m runtime.serve --model "$(NAME)" --devices "$(DEVICES)"

lint: .venv/.dev ## ruff and mypy --strict
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

test: lint engines ## lint and every quick test
	@$(RUN) -m pytest -m "not slow and not soak and not container and not cluster" $(TOGETHER)

test-all: lint engines ## lint and every test this machine can run, but for the soak tests
	@$(RUN) -m pytest -m "not soak and not container and not cluster" $(TOGETHER)

test-container: .venv/.dev ## build the container for processor cores with buildah (as root), run it, draw an image: six minutes
	@$(RUN) -m pytest -m container -s tests/test_container.py

.venv/.cluster: .venv/.dev
	@$(PIP) --editable '.[cluster]'
	@touch $@

test-cluster: .venv/.cluster engines ## replicas on a Ray cluster of two nodes on this machine, killed, drained, scaled and upgraded: ten minutes
	@$(RUN) -m pytest -m cluster tests/runtime/serve/ray

soak: .venv/.dev engines ## the server under hundreds of clients and thousands of images: half an hour
	@$(RUN) -m pytest -m soak -s

bench: .venv/.dev engines ## speed, predictions, requests, server and kernel in under 15 minutes; rebuilds the page and the READMEs' tables
	@$(RUN) -m bench run --devices "$(DEVICES)" --json bench/results/run.json
	@$(RUN) -m bench simulate --devices "$(DEVICES)" --json bench/results/simulate.json
	@$(RUN) -m bench scenario single-stream server offline --devices "$(DEVICES)" --json bench/results/scenario.json
	@$(RUN) -m bench serve --devices "$(DEVICES)" --json bench/results/serve.json
	@$(RUN) -m bench kernel --json bench/results/kernel.json
	@$(RUN) -m bench report

bench-full: bench ## quality of all samplers and kinds of drafts, too, which takes much longer
	@$(RUN) -m bench quality --full --devices "$(DEVICES)" --json bench/results/quality.json --contact-sheet bench/results/images.png
	@$(RUN) -m bench drafts --images 40 --seed 200 --devices "$(DEVICES)" --json bench/results/drafts.json
	@$(RUN) -m bench report

gpu-check: ## test and measure everything that this machine's GPUs can do, without network; says what cannot be done
	@$(if $(wildcard .venv/bin/python),$(RUN),python3) -m bench.gpu --json bench/results/gpu.json $(PARTS)

gpu-bundle: .venv/.export ## what a machine with GPUs and no network needs for gpu-check, into build/gpu-bundle
	@$(RUN) -m export shapes --devices cpu
	@$(RUN) -m export shapes --devices cuda:0
	@$(RUN) -m bench.gpu.bundle --python $(PYTHON_THERE) $(PARTS)

train: .venv/.dev ## train the embedded model again: an hour and a half on two idle cores
	@$(RUN) -m export.shapes.train

clean-engines: ## delete exported and compiled models
	@rm -rf build/*/manifest.json build/*/plans build/*/*.onnx

clean: ## delete everything that was made
	@rm -rf .venv build

# make demo, make test: both set up .venv at the first run and reuse it afterwards.
# Variables: PYTHON (the interpreter the environment is made with), VENV, JOBS of make test, GPU, PROMPT, SHAPES, ROUNDS and PEERS of make bench-peers
# and bench-serving, REQUESTS of make bench-serving (a file of JSON lines).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
GPU ?= h100
PROMPT ?= What is the capital of France? Answer in one sentence.
BIN := $(VENV)/bin
PRESETS := int8 int8-accurate int8-plain
DEMO := artifacts/smollm2-135m-cpu
MODEL := SmolLM2-135M-Instruct.Q4_1.gguf
BLOOM := tests/fixtures/tiny-bloom-trained
SHAPES ?= smollm2-135m llama-1b bloom-1b1
ROUNDS ?= 5
PEERS ?=
REQUESTS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-ray lint accuracy bench bench-presets bench-scaling bench-peers bench-serving gpu-check clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO)/manifest.json ## Compile a small chat model and let it answer PROMPT.
	$(BIN)/belle-run $(DEMO) "$(PROMPT)"

build/smollm2/$(MODEL): | $(VENV)/.installed
	$(BIN)/python benchmarks/fetch_smollm2.py build/smollm2

$(DEMO)/manifest.json: build/smollm2/$(MODEL) | $(VENV)/.installed
	$(BIN)/belle-compile build $< --target cpu --force -o $(DEMO)

test: $(VENV)/.installed ## Run the tests, by JOBS processes.
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not alone and not ray"
	$(BIN)/python -m pytest -q -m alone

test-ray: $(VENV)-ray/.installed ## Run the tests with a Ray cluster on this host, in an environment of its own.
	RAY_USAGE_STATS_ENABLED=0 $(VENV)-ray/bin/python -m pytest -q -m ray tests/runtime/scale_out

lint: $(VENV)/.installed-dev ## Check style, imports and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

accuracy: $(PRESETS:%=build/engines/smollm2-%/manifest.json) $(PRESETS:%=build/engines/bloom-%/manifest.json) ## Measure what each INT8 preset costs in accuracy.
	$(BIN)/python -m benchmarks.accuracy $(PRESETS:%=build/engines/smollm2-%)
	$(BIN)/python -m benchmarks.accuracy --checkpoint $(BLOOM) --text $(BLOOM)/heldout-en.txt --text $(BLOOM)/heldout-zh.txt \
	  --out benchmarks/results/accuracy-bloom.json $(PRESETS:%=build/engines/bloom-%)

build/engines/smollm2-%/manifest.json: build/smollm2/$(MODEL) | $(VENV)/.installed
	$(BIN)/belle-compile build $< --quant $* --force -o $(@D)

build/engines/bloom-%/manifest.json: $(BLOOM)/model.safetensors | $(VENV)/.installed
	$(BIN)/belle-compile build $(BLOOM) --quant $* --force -o $(@D)

bench: $(VENV)/.installed-bench ## Measure speed of SHAPES against the machine's limits (a quiet machine, 15 minutes, 8 GB of disk).
	$(BIN)/python -m benchmarks.speed $(SHAPES)
	$(BIN)/python -m benchmarks.report

bench-presets: $(VENV)/.installed-bench ## Measure what activations of 16 bits cost in time beside int8 (10 minutes).
	$(BIN)/python -m benchmarks.presets $(SHAPES)
	$(BIN)/python -m benchmarks.report

bench-scaling: $(VENV)/.installed-bench ## Measure batches, contexts and threads after make bench, and write the scaling note.
	$(BIN)/python -m benchmarks.scaling --measure llama-1b
	$(BIN)/python -m benchmarks.report

bench-peers: $(VENV)/.installed-bench ## Measure SHAPES side by side with other engines (a quiet machine, 4 hours, 30 GB of disk).
	$(BIN)/python -m benchmarks.peers $(SHAPES) --rounds $(ROUNDS) $(if $(PEERS),--only $(PEERS))

bench-serving: $(VENV)/.installed-bench ## Measure servers under load with the questions of REQUESTS, ours and others (a quiet machine, hours).
	@[ -n "$(REQUESTS)" ] || { echo "bench-serving needs questions: make bench-serving REQUESTS=FILE.jsonl" >&2; exit 1; }
	$(BIN)/python -m benchmarks.serving $(SHAPES) --requests $(REQUESTS) --rounds $(ROUNDS) $(if $(PEERS),--only $(PEERS))

gpu-check: build/gpu-check-$(GPU)/bundle.json ## Run engines for GPU on the GPU of this host; without one, look at what would be run.
	@if $(BIN)/python -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then \
	  { $(BIN)/python -c 'import cuda.bindings' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda]'; } && \
	  $(BIN)/python -m benchmarks.gpu_check build/gpu-check-$(GPU) --out benchmarks/results/gpu-check.json; \
	else \
	  echo "no NVIDIA driver here: this is what a GPU host would run" && \
	  $(BIN)/python -m benchmarks.gpu_check build/gpu-check-$(GPU) --dry-run; \
	fi

build/gpu-check-$(GPU)/bundle.json: | $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_check.bundle --target $(GPU) $(@D)

clean: ## Remove what was built; keeps the environment and artifacts.
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "belle-compile needs Python 3.10 or newer: run make with PYTHON=/path/to/python3 (now: $(PYTHON))." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: run 'apt install python3-venv' (Debian, Ubuntu) and try again." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[build,gpu,onnxruntime,tensorrt,test,ranks,redis,serve,clients]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[build,gpu,onnxruntime,tensorrt,test,ranks,redis,serve,clients,dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[build,gpu,onnxruntime,tensorrt,test,ranks,redis,serve,clients,bench]'
	@touch $@

# The packages of Ray Serve are many, and no other target needs them.
$(VENV)-ray/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[build,test,redis,serve,clients,ray]'
	@touch $@

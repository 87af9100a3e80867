# make setup       .venv with everything, at the versions of constraints.txt
# make quickstart  train a small Hourglass on real text and see what it reached (about 6 minutes)
# make test        lint, types and the tests
# make test-cluster  those that need Slurm, a browser or kills
# make test-all    also those that take minutes each
# make mutants     plant faults one at a time: does a test notice? (tests/mutants)
# make fuzz        10,000 changed files for every reader of files (hours; FUZZ_EXAMPLES=600: minutes)
# make evidence      what takes minutes to show, again, into docs/evidence
# make docs        docs/config.md, the JSON Schema and docs/metrics.md, from the code

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A text file or folder for the quickstart; default: the sources of Python's standard library.
CORPUS ?=
NAME = quickstart$(if $(CORPUS),-$(basename $(notdir $(CORPUS))))
RUN ?= runs/$(NAME)
# DeepSpeed warns twice where it finds no GPU, unless it is told to use the CPU. A machine that has a
# GPU (a driver's device file, or NVIDIA's PCI vendor id without a driver) keeps the warning.
GPU := $(wildcard /dev/nvidia* /dev/kfd /dev/dxg)$(shell grep -lx 0x10de /sys/bus/pci/devices/*/vendor 2>/dev/null)
# One process on a machine with one GPU, which two cannot share.
PROCESSES ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)

.PHONY: setup quickstart test test-cluster test-all mutants evidence fuzz lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/python data_prep/prepare_bytes.py --output corpora/$(NAME) \
	  $(if $(CORPUS),--input "$(CORPUS)",--input "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --include '*.py' --exclude 'site-packages/*' --exclude '*test*' --exclude 'encodings/*' --exclude 'pydoc_data/*')
	$(if $(GPU),,DS_ACCELERATOR=cpu )$(BIN)/deepspeed --log_level error --num_gpus $(PROCESSES) hg_scale/train.py --config configs/quickstart.json --set data.path=corpora/$(NAME) --run $(RUN)
	$(BIN)/hg-scale summary $(RUN) --compare --sample 400
	$(BIN)/hg-scale report $(RUN)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers, a file of tests each: many tests leave a core idle.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "cluster and not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m ""

FUZZ_EXAMPLES ?= 10000

fuzz: setup
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --timeout 36000 tests/test_fuzz.py

mutants: setup
	$(BIN)/python -m tests.mutants

evidence: setup
	$(BIN)/python -m tests.evidence

docs: setup
	$(BIN)/python -m hg_scale.config.docs
	$(BIN)/python -m hg_scale.training.metric_keys

clean:
	rm -rf $(VENV) build *.egg-info

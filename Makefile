# Everything lives in .venv; `make` alone lists what there is.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
EXTRAS ?= cpu,dev
CONSTRAINTS ?= constraints/cpu.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LEROBOT := .venv-lerobot
LEROBOT_NEWEST := .venv-lerobot-newest
# lerobot's newest wants 3.12 or more, which nothing else here needs.
PYTHON312 ?= $(shell for p in python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
DEMO := runs/demo
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,python3)

.DEFAULT_GOAL := help
.PHONY: help install system-libraries demo test test-lerobot test-lerobot-newest slurm test-slurm lint format bench bench-check gpu-proof soak clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

install: $(READY) ## make .venv with everything the CPU job needs, and fetch the hand models

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with venv found; install one (Debian: apt install python3 python3-venv) or run: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	$(BIN)/ego2robot models pull
	@touch $@

# The tests compare with MediaPipe, which links the system's OpenGL; without it they skip, saying so.
system-libraries: $(READY)
	@$(BIN)/python -c 'import mediapipe.tasks.python.vision, cv2' 2>/dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends libegl1 libgles2 libgl1 libglib2.0-0; }

demo: $(READY) ## footage with known truth → LeRobot dataset and report, on the CPU
	$(BIN)/ego2robot sample $(DEMO)/footage --minutes 4 --videos 2
	$(BIN)/ego2robot run demo
	$(BIN)/ego2robot verify $(DEMO)/run --truth $(DEMO)/footage

test: $(READY) ## all tests but those that need a LeRobot environment or a Slurm
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/test_slurm.py $(PYTEST_ARGS)

$(LEROBOT)/.ready:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found" >&2; exit 2; }
	$(PYTHON) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --quiet lerobot==0.4.4
	@touch $@

test-lerobot: $(READY) $(LEROBOT)/.ready ## open what we export with the real lerobot 0.4.4 (own environment, 8 GB)
	LEROBOT_PYTHON=$(CURDIR)/$(LEROBOT)/bin/python $(BIN)/python -m pytest tests/test_lerobot_client.py $(PYTEST_ARGS)

$(LEROBOT_NEWEST)/.ready:
	$(PYTHON312) -m venv $(LEROBOT_NEWEST)
	$(LEROBOT_NEWEST)/bin/python -m pip install --quiet 'lerobot[dataset]>=0.6'
	@touch $@

test-lerobot-newest: $(READY) ## the same with its newest release, where there is a Python 3.12 or newer (8 GB)
	@test -e $(LEROBOT_NEWEST)/.ready -o -z "$(PYTHON312)" || $(MAKE) --no-print-directory $(LEROBOT_NEWEST)/.ready
	@if test -e $(LEROBOT_NEWEST)/.ready; then \
		LEROBOT_PYTHON=$(CURDIR)/$(LEROBOT_NEWEST)/bin/python $(BIN)/python -m pytest tests/test_lerobot_client.py $(PYTEST_ARGS); \
	else echo "skipped: lerobot's newest needs Python 3.12 or newer and PATH has none; install one, or run: make $@ PYTHON312=/path/to/python3.12"; fi

slurm:
	@command -v slurmctld >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge slurm-client; }

test-slurm: $(READY) ## the Slurm chain on a Slurm of four nodes that runs here meanwhile (Debian: make slurm installs it)
	$(BIN)/python -m pytest tests/test_slurm.py tests/test_slurm_scripts.py $(PYTEST_ARGS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Without a network the peers (Daft, Ray Data) stay out, and the result says so.
bench: $(READY) ## how we compare on this CPU, in 10 minutes; the figures go to benchmarks/results/
	-$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS),bench]'
	$(BIN)/python benchmarks/bench.py

bench-check: $(READY) ## fail when a ratio of the newest result is 10 % below the committed one before
	$(BIN)/ego2robot bench check

# No .venv, no network: whatever Python has torch for the GPU here. What it lacks is named and left out.
gpu-proof: ## what one GPU does, in 10 minutes; the figures go to benchmarks/results/
	$(GPU_PYTHON) benchmarks/gpu_proof.py

KILLS ?= 200

soak: $(READY) ## kill workers of one run KILLS times (200); the rows must be those of an undisturbed run
	KILLS=$(KILLS) $(BIN)/python benchmarks/soak.py

clean: ## remove .venv and what runs and tests left
	rm -rf $(VENV) $(LEROBOT) $(LEROBOT_NEWEST) runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Everything a fresh machine needs is Python 3.11 or 3.12 and make.
#
#   make demo            install and run the whole of PIT on a small synthetic set (SEED=1)
#   make test            install and run the tests
#   make install         leave a ready environment in .venv
#   make lint            formatting, types and import rules
#   make test-slow       the tests that take minutes
#   make test-parity     the comparisons with torch and transformers (installs them)
#   make kill-test       kill training at random moments (KILLS=20 for each kind of stage) and compare its end
#   make test-browser    the tests of pages, in a headless Chromium (installs it)
#   make lock            resolve requirements/lock-*.txt anew
#   make clean           remove caches and build output (runs and .venv stay)
#
# Settings: PYTHON=python3.12 (which interpreter), VENV=.venv (where the environment goes), SEED=1.

SEED ?= 1
KILLS ?= 20
VENV ?= .venv
supported = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c '$(supported)' >/dev/null 2>&1 && echo $$p && break; done)
bin := $(VENV)/bin
stamp := $(VENV)/.installed
planner := $(VENV)/planner/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-parity test-browser kill-test lint format lock clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(stamp)

$(stamp): pyproject.toml requirements/lock-3.11.txt requirements/lock-3.12.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(supported)' || \
	  { echo "pit_jax needs Python 3.11 or 3.12; name one with 'make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.12'." >&2; exit 1; }
	@[ -x $(bin)/python ] && $(bin)/python -c '$(supported)' || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "Could not make $(VENV); on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }
	@sh requirements/install.sh $(bin)/python
	@touch $@
	@echo "Installed in $(VENV). Try: $(bin)/pit-jax --help"

demo: $(stamp)
	$(bin)/pit-jax pipeline --gin_file=recipes/demo.gin \
	  --gin.MODEL_DIR="'runs/demo-$(SEED)'" --gin.RANDOM_SEED=$(SEED)

test: $(stamp) $(planner)
	PYTHONPATH=$(abspath $(VENV)/planner) $(bin)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not parity and not browser"

test-slow: $(stamp) $(planner)
	PYTHONPATH=$(abspath $(VENV)/planner) $(bin)/python -m pytest -q -n 2 --dist loadfile -m "slow and not parity and not browser"

# Programs for TPUs are compiled, not run; where the compiler is not to be had, the tests that need it are skipped.
$(planner): $(stamp)
	@sh requirements/install.sh $(bin)/python planner || echo "No TPU compiler for this machine; going on without." >&2
	@mkdir -p $(@D) && touch $@

test-parity: $(stamp)
	sh requirements/install.sh $(bin)/python parity
	$(bin)/python -m pytest -q -m parity

kill-test: $(stamp)
	JAX_PLATFORMS=cpu $(bin)/python -m tests.stages.kill_test runs/kill-test-$$(date +%s) --kills $(KILLS)

# A browser that is installed, or named by PIT_JAX_CHROMIUM, is taken first.
test-browser: $(stamp)
	$(bin)/python -m uv pip install --python $(bin)/python "playwright>=1.50,<2" || \
	  $(bin)/python -m pip install "playwright>=1.50,<2"
	$(bin)/python -m playwright install chromium || echo "No download of Chromium; looking for an installed one." >&2
	$(bin)/python -m pytest -q -m browser

lint: $(stamp)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	PYTHONPATH=. $(bin)/lint-imports
	$(bin)/pyright --pythonpath $(bin)/python
	$(bin)/shellcheck -x -P . launch/*.sh launch/slurm.sbatch

format: $(stamp)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

lock: $(stamp)
	for version in 3.11 3.12; do \
	  UV_CUSTOM_COMPILE_COMMAND="make lock" $(bin)/uv pip compile pyproject.toml --quiet --universal --upgrade \
	    --python-version $$version --extra dev --extra serve --extra tensorboard \
	    --no-annotate --no-emit-index-url --no-emit-find-links --output-file requirements/lock-$$version.txt || exit 1; \
	done

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

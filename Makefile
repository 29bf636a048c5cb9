# Each target does its own set-up: you only need Python 3.11 or newer.
#   make test                     with python3
#   make test PYTHON=python3.13   with another interpreter, in a separate environment
#   make demo ARGS="--steps 200"  options for the program

PYTHON ?= python3
ARGS ?=
JOBS ?= 2

# One environment per version of Python; that of python3 is called .venv.
version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
default := $(shell python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv$(if $(filter $(version),$(default)),,-$(version))
bin := $(VENV)/bin
uv := $(bin)/uv pip install --quiet --python $(bin)/python -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint unit test-all test-exhaustive test-x64 fuzz docs notebooks notebooks-check bench training test-training compiled accelerators test-accelerators constraints clean

help:  ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# --- environments ---------------------------------------------------------------------

# A stamp's name includes the Python version and a checksum of the requirements, so that
# a change of either installs again.
key := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-$(version)
stamp = $(VENV)/.$(1)-$(key)

$(VENV)/.uv-$(version):
	@test -n "$(version)" || { echo "No interpreter '$(PYTHON)': pass PYTHON=, for example PYTHON=python3.12." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "optclip needs Python 3.11 or newer; '$(PYTHON)' is $(version). Pass PYTHON=." >&2; exit 2; }
	@echo "Setting up $(VENV) with Python $(version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(bin)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(call stamp,demo): $(VENV)/.uv-$(version)
	@echo "Installing what the demo needs"
	@$(uv) -e '.[demo]'
	@touch $@

$(call stamp,test): $(VENV)/.uv-$(version)
	@echo "Installing what the tests need"
	@$(uv) -e '.[demo,report]' --group test --group lint
	@touch $@

$(call stamp,bench): $(VENV)/.uv-$(version)
	@echo "Installing what the training benchmark needs"
	@$(uv) -e . --group bench
	@touch $@

$(call stamp,docs): $(VENV)/.uv-$(version)
	@echo "Installing what the docs need"
	@$(uv) -e . --group docs
	@touch $@

$(call stamp,notebooks): $(VENV)/.uv-$(version)
	@echo "Installing what the notebooks need"
	@$(uv) -e . --group notebooks
	@touch $@

# --- targets --------------------------------------------------------------------------

demo: $(call stamp,demo)  ## Three short experiments on real text, against Optax; table and figure
	@$(bin)/python -m optclip.demo $(ARGS)

test: lint unit  ## Lint, type checks, tests, and the examples in docstrings and docs

lint: $(call stamp,test)  ## Ruff, pyright and codespell only
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/pyright --pythonpath $(bin)/python
	@$(bin)/codespell -D - -D tools/words.txt README.md CHANGELOG.md CONTRIBUTING.md benchmarks docs examples notebooks optclip tests tools

unit: $(call stamp,test)  ## Tests and examples only, without lint
	@$(bin)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-all: $(call stamp,test)  ## All tests, including the variants that `make test` skips
	@$(bin)/python -m pytest -n $(JOBS) --dist loadgroup -m "not exhaustive" $(ARGS)

test-exhaustive: $(call stamp,test)  ## All combinations of shardings, modes and options; takes hours
	@$(bin)/python -m pytest -n $(JOBS) --dist loadgroup -m exhaustive $(ARGS)

# All contracts, and the tests of each method's values and states.
x64_tests := $(wildcard tests/contracts/test_*.py) $(patsubst %,tests/test_%.py, \
  actions adaptive_rules checkpoints laws mechanisms methods norms clipped_grad rules \
  scopes skipping telemetry)

test-x64: $(call stamp,test)  ## The contracts again, with float64 enabled
	@OPTCLIP_TEST_X64=1 $(bin)/python -m pytest -n $(JOBS) --dist loadgroup $(x64_tests) $(ARGS)

fuzz: $(call stamp,test)  ## Fuzz pytrees, rules and values: 20,000 examples
	@OPTCLIP_FUZZ_EXAMPLES=20000 $(bin)/python -m pytest -n $(JOBS) tests/test_fuzz.py $(ARGS)

docs: $(call stamp,docs)  ## Build the site; any warning is an error
	@$(bin)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "Built docs/_build/html/index.html"

notebooks: $(call stamp,notebooks)  ## Run the notebooks and store their outputs
	@$(bin)/python tools/build_notebooks.py

notebooks-check: $(call stamp,notebooks)  ## Run the notebooks; fail if they differ from their sources
	@$(bin)/python tools/build_notebooks.py --check

bench: $(call stamp,test)  ## Measure what clipping costs in a training step
	@$(bin)/python benchmarks/step_cost.py $(ARGS)

training: $(call stamp,bench)  ## Compare clipping methods by training small models; ARGS=--quick for a few minutes
	@$(bin)/python -m benchmarks.training $(ARGS)

test-training: $(call stamp,bench)  ## Test the training benchmark
	@$(bin)/python -m pytest -n $(JOBS) tests/test_training_benchmark.py $(ARGS)

# A separate environment: JAX looks for a GPU wherever its plugin is installed. The
# plugin must have the same version as JAX.
accelerators := $(VENV)-accelerators
$(accelerators)/.stamp-$(key): $(VENV)/.uv-$(version)
	@echo "Installing what compiling for accelerators needs"
	@$(bin)/uv venv --quiet --clear --python $(bin)/python $(accelerators)
	@$(bin)/uv pip install --quiet --python $(accelerators)/bin/python -c constraints.txt -e . --group test --group tpu
	@jax=$$($(accelerators)/bin/python -c 'import jax; print(jax.__version__)'); \
	  $(bin)/uv pip install --quiet --python $(accelerators)/bin/python -c constraints.txt \
	  --group gpu jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax
	@touch $@

compiled: $(accelerators)/.stamp-$(key)  ## Count what clipping costs on GPU and TPU, by compiling for them
	@cd benchmarks && ../$(accelerators)/bin/python compiled.py $(ARGS)

accelerators: $(accelerators)/.stamp-$(key)

test-accelerators: $(accelerators)/.stamp-$(key)  ## Test what clipping costs on GPU and TPU, by compiling for them
	@JAX_PLATFORMS=cpu $(accelerators)/bin/python -m pytest tests/accelerators $(ARGS)

constraints: $(VENV)/.uv-$(version)  ## Upgrade the pinned versions in constraints.txt
	@echo '# The versions that `make` installs, for every Python; generated by `make constraints`.' > constraints.new
	@$(bin)/uv pip compile --quiet --universal --python-version 3.11 --no-header \
	  --no-annotate --all-extras --group test --group lint --group notebooks \
	  --group docs pyproject.toml >> constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove environments, build output and caches
	rm -rf .venv .venv-* build dist docs/_build docs/notebooks runs
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

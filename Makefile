# `make serve` in a fresh clone is all it takes; every other target installs what it needs, too.

CONFIG ?= configs/quickstart.yaml
DEMO ?= configs/smollm2-hosts.yaml
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# What pip does after each package, on one CPU, here on all of them. Some packages have files for other Pythons.
COMPILE = $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell $(name) -c \
	'import sys, venv, ensurepip; (3, 11) <= sys.version_info < (3, 14) and print("$(name)")' 2>/dev/null)))

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev model serve stop plan test test-slow check check-kubernetes cluster-demo lock

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## .venv with exact versions (requirements.lock) and this package

setup-dev: $(VENV)/.installed-dev

model:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) examples/smollm2/fetch.py

MOE := models/smollm2-moe/config.json

$(MOE): | setup model  # that model as a mixture of experts
	@$(BIN)/python examples/smollm2-moe/upcycle.py --no-check

serve: setup model  ## serve CONFIG (configs/quickstart.yaml) on this machine until Ctrl-C or `make stop`
	@exec $(BIN)/python -m deployments.local serve $(CONFIG)

stop: setup  ## end what `make serve` started
	@$(BIN)/python -m deployments.local stop

plan: setup  ## what CONFIG needs in memory, and what does not fit; no cluster (ARGS="--gpu-memory 80GB")
	@$(BIN)/python -m deployments.plan $(CONFIG) $(ARGS)

SLOW_TESTS := tests/e2e/test_invariance.py tests/e2e/test_identity.py tests/e2e/test_ranks_on_hosts.py \
	tests/e2e/test_experts_on_hosts.py tests/examples/test_smollm2_moe.py tests/cluster/experts/test_failures.py \
	tests/e2e/test_expert_autoscaling.py \
	tests/e2e/test_experts.py::test_their_number_changes_under_load \
	tests/e2e/test_experts.py::test_without_any_server_requests_fail_in_time_and_the_ranks_live_on

test: setup-dev model $(MOE)  ## all tests but the slow ones
	$(BIN)/python -m pytest -q --durations=15 $(addprefix --deselect=,$(SLOW_TESTS)) $(TESTS)

test-slow: setup-dev model $(MOE)  ## the slow tests
	$(BIN)/python -m pytest -q --durations=15 $(SLOW_TESTS)

check: setup-dev  ## lint, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cluster-demo: setup model $(if $(findstring moe,$(DEMO)),$(MOE))  ## four hosts in network namespaces (root, iproute2), DEMO on them, a chat; then all is taken down
	@$(BIN)/python examples/ray-cluster/demo.py $(DEMO)

KUBERAY := v1.7.0
CRD := .run/ray.io_rayservices.yaml

check-kubernetes: setup-dev  ## configs/kubernetes/ against KubeRay's own CRD, which is downloaded
	@mkdir -p .run && test -s $(CRD) || curl --fail --location --silent --show-error --output $(CRD) \
		https://raw.githubusercontent.com/ray-project/kuberay/$(KUBERAY)/ray-operator/config/crd/bases/$(notdir $(CRD))
	RAYSERVICE_CRD=$(CRD) $(BIN)/python -m pytest -q tests/configs/test_cluster_manifests.py

lock:  ## write requirements*.lock anew from pyproject.toml's ranges
	@PYTHON=$(PYTHON) bash .ci/lock

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python from 3.11 to 3.13 with the venv module found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# fairscale comes as source: what builds it must be there first.
$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "==> Installing $$(grep -c == requirements.lock) packages (about 1 GB the first time)"
	@$(PIP) install --progress-bar on $$(grep -E '^(setuptools|wheel)==' requirements.lock)
	@$(PIP) install --no-compile --no-deps --no-build-isolation --progress-bar on -r requirements.lock
	@$(COMPILE)
	@echo "==> Installing this package"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "==> Installing $$(grep -c == requirements-dev.lock) packages for tests and checks"
	@$(PIP) install --no-compile --no-deps --no-build-isolation --progress-bar on -r requirements-dev.lock
	@$(COMPILE)
	@touch $@

include benchmarks/bench.mk

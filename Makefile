# One environment in .venv, made once; every other target makes sure that it exists.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?=

.PHONY: setup test check format demo lab bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard hexmesh/native/*.c hexmesh/native/*.h)
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing hexmesh and its dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup
	@$(BIN)/hexmesh demo $(if $(PROMPT),"$(PROMPT)")

lab: setup
	@$(BIN)/python -m tools.netlab $(if $(PROMPT),"$(PROMPT)")

bench: setup
	$(BIN)/python tools/bench/mesh.py --quick

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Every target works from a fresh checkout: the environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.graphopt-installed
BUILT := build/typecheck

.PHONY: help install demo test lint typecheck pytest notebooks bench docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install: $(STAMP) ## make .venv with graphopt (editable) and all that the checks need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt setuptools
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e ".[zoo,dev]"
	touch $@

demo: $(STAMP) ## train a small GPT-2 twice, plain and optimized, side by side
	$(BIN)/python examples/train_gpt2.py

test: lint typecheck pytest ## all checks

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP) ## mypy on the package as it is built
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade --target $(BUILT) .
	cd $(BUILT) && $(CURDIR)/$(BIN)/mypy -p graphopt \
		--config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

pytest: $(STAMP) ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 25

notebooks: $(STAMP) ## strip the notebooks of outputs, as they are in git
	$(BIN)/python notebooks/strip.py
	$(BIN)/ruff format notebooks

bench: $(STAMP) ## list the benchmarks; each is a script to run by hand
	@for script in benchmarks/*.py; do \
		[ -e "$$script" ] && echo "$(BIN)/python $$script" || echo "no benchmarks yet"; \
	done

docs: $(STAMP) ## the documentation as pages in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove what the checks built; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

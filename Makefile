# `make run` and `make test` need Python 3.11+, pip, make and git, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := resources/models/smollm2-135m/digest.json
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test lint bench clean lock

run: $(INSTALLED) ## the default experiment: tables, figures and report under results/
	$(BIN)/snakemake --cores 1
	$(BIN)/snakemake --cores 1 --report results/report.zip > results/logs/report.log 2>&1 || { cat results/logs/report.log; exit 1; }
	@cat results/tables/summary.md results/tables/ladder.md results/tables/recovery.md
	@echo
	@echo "tables   results/tables/      (summary, ladder, facts, network, price, recovery, exactness, codecs, break_even, hypotheses: csv, parquet, md, tex)"
	@echo "figures  results/figures/     (svg, png)"
	@echo "trials   results/results.csv  (one row each)"
	@echo "report   results/report.zip   (unzip, open report.html)"

test: $(INSTALLED) ## every test
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## ruff, snakefmt, snakemake --lint, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy

bench: $(INSTALLED) ## ratios with intervals, and bench.json
	$(BIN)/snakemake --cores 1 --quiet all -- $(MODEL)
	$(BIN)/python benchmarks/bench.py --output bench.json

clean: ## results and caches; models and .venv stay
	find results -mindepth 1 ! -name README.md -delete
	rm -rf .snakemake .pytest_cache .ruff_cache .mypy_cache .hypothesis bench.json

lock: ## requirements.lock and envs/semgap.yaml anew, from what pyproject.toml allows
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 "setuptools>=77" -e ".[workflow,dev]"
	.venv-lock/bin/pip freeze --all --exclude-editable --exclude pip | .venv-lock/bin/python envs/lock.py
	rm -rf .venv-lock

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"semgap needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

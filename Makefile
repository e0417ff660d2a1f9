PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lint test test-all docs settings clean
demo: .venv/.installed
	$(BIN)/seqfair train --config=configs/demo.py:method=erm --workdir=runs/demo/erm
	$(BIN)/seqfair train --config=configs/demo.py:method=gdro --workdir=runs/demo/gdro
	$(BIN)/seqfair train --config=configs/demo.py:method=cvar --workdir=runs/demo/cvar
	$(BIN)/seqfair report runs/demo/erm runs/demo/gdro runs/demo/cvar \
	  --family=pop33 --baseline=runs/demo/erm --out=runs/demo/report.html
	$(BIN)/seqfair recommend --workdir=runs/demo/gdro --k=5 --out=runs/demo/recs.csv
	@echo "the lists of the first three users:"
	@head -n 16 runs/demo/recs.csv
	@echo "report: $(CURDIR)/runs/demo/report.html"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# worksteal gives a worker neighbouring tests, which share the runs that fixtures train.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: lint
	$(PYTEST) -m 'not slow'

test-all: lint
	$(PYTEST)

# The documentation site; open build/site/index.html.
docs: .venv/.installed
	$(BIN)/mkdocs build --strict

# The page of all settings, from the package.
settings: .venv/.installed
	PYTHONPATH=tests $(BIN)/python -c 'import pages; print(pages.settings_page(), end="")' > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { echo "python3 -m venv does not work here: apt install python3-venv"; exit 1; }
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

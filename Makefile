# make demo    set everything up in .venv and attack the packaged models
# make test    set everything up in .venv and run the tests; make test-long also the long ones, going on where it was stopped
# make cuda    on a machine with a GPU: tests, times and, where DATA= names CIFAR-10, a training run; needs no set-up
# make docs    build the documentation as a site, build/site/index.html
# make dist    build the sdist and the wheel in dist/ and check them; publishes nothing
#              CONSTRAINTS=constraints-lowest.txt with any of these: with the oldest versions that are supported
# make lint    static checks;  make bench   compare the speed with other packages;  make clean   remove .venv and runs

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SPHINX := build/docs-tools

.PHONY: demo test test-long cuda docs dist lint bench clean

demo: $(INSTALLED)
	@$(BIN)/firstorder demo

test: $(INSTALLED)
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED)
	@$(BIN)/python tests/parts.py

cuda: # OUT=runs/cuda, DATA=cifar10:DIR, MINUTES=4 of training, CUDA_WHEELS=DIR with what is not installed
	@$(PYTHON) tests/cuda/all.py --out '$(OUT)' --data '$(DATA)' --minutes '$(MINUTES)' --wheels '$(CUDA_WHEELS)'

docs: $(INSTALLED) $(SPHINX)/.installed
	@PYTHONPATH=$(SPHINX) $(BIN)/python docs/site/build.py
	@echo "wrote build/site/index.html"

dist: $(INSTALLED)
	@rm -rf dist
	@$(BIN)/hatchling build --directory dist
	@$(BIN)/twine check --strict dist/*

lint: $(INSTALLED)
	@$(BIN)/mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

bench: $(INSTALLED)
	@$(BIN)/firstorder bench

clean:
	rm -rf $(VENV) runs dist build/docs build/site $(SPHINX) $(SPHINX).log

$(SPHINX)/.installed: docs/site/requirements.txt | $(INSTALLED) # RobustBench wants an older requests than Sphinx: a folder of its own
	@rm -rf $(SPHINX) && mkdir -p $(SPHINX)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(SPHINX) --requirement docs/site/requirements.txt >$(SPHINX).log 2>&1 || { \
	  cat $(SPHINX).log; echo "missing: packages that pip could not install. Is a package index reachable?"; exit 1; }
	@touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "missing: $(PYTHON). Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "missing: Python 3.10 or newer; $(PYTHON) is older. Name another: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "missing: Python's venv module. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV): PyTorch, ART, torchattacks, foolbox, RobustBench (once; a few minutes and some GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip uninstall -qq --yes firstorder # what this package was called before
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[all,dev]' || { \
	  echo "missing: packages that pip could not install (its reason is above). Is a package index reachable?"; exit 1; }
	@touch $@

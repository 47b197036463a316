# "make course" runs every lesson, "make book" makes pages of them, "make test" checks everything.
# Each makes its own Python environment in .venv first. Other Python:  make course PYTHON=python3.12
# With the optional parts:  make test EXTRAS=test,flower,privacy
# Other data or settings:  make course ARGS="--data ham10000 --profile full"
PYTHON ?= python3
BIN := .venv/bin
# Optional parts, with commas between: test, flower (several machines), privacy (DP-SGD), explorer (Voila), book (pages),
# pfl (a peer in benchmark A2). Without a word: those that are installed already.
EXTRAS ?= $(or $(patsubst .venv/.ready-%,%,$(firstword $(wildcard .venv/.ready-*))),test)
READY := .venv/.ready-$(EXTRAS)
# Without code, and without the picture that stands in for the explorer where no kernel is.
VOILA = --TagRemovePreprocessor.remove_cell_tags=static
# Seconds that one cell of a lesson may take under test, on a slow machine.
CELL_TIMEOUT ?= 900
TESTS ?= tests notebooks

A3 = $(BIN)/python -m fedssg_helpers run --only A3 --out out/results --resume -p seeds 5 -p private true \
	-p faults 20 -p poison_rounds 10 -p poison_hospitals 10 -p results $(CURDIR)/data/results/trust.csv
A2 = $(BIN)/python -m fedssg_helpers run --only A2 --out out/results -p rounds 10 -p repeats 5 -p growth 4,16,64,256,1000 -p folder 20000 \
	-p results $(CURDIR)/data/results/speed.csv
FLOWER = 10x100x10,1000x100x5,1000x4x5

.PHONY: help course book test quick lint notebooks results ranking lab explorer doctor clean
.NOTPARALLEL:

help:  ## list these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1|/' | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

course: $(READY)  ## run all lessons on the built-in data, into out/; pages too where "make book" ran before
	$(BIN)/python -m fedssg_helpers run $(ARGS)
	@if $(BIN)/python -c '$(PAGES)' 2>/dev/null $(if $(findstring --out,$(ARGS)),&& false); then $(BIN)/python .book/build.py; fi

# Its packages come with EXTRAS=book, or at the first call.
PAGES = import latex2mathml, myst_nb, sphinx_book_theme, sphinx_design, ziamath
book: $(READY)  ## make pages of what "make course" ran last: out/book/index.html; ARGS=FOLDER for another run
	@$(BIN)/python -c '$(PAGES)' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[book]'
	@$(BIN)/python .book/build.py $(ARGS)

# A fresh FEDSSG_OUT: no cached run of an earlier day may stand in for a computation under test.
PYTEST = out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && FEDSSG_OUT="$$out" $(BIN)/python -m pytest -p no:cacheprovider
# Two workers take a file each, in order: lessons stay whole, and slow ones are not left to the end. For one file they
# would only cost their start.
SIDE_BY_SIDE = -n 2 --dist loadfile --no-loadscope-reorder
FILES = $(filter tests% notebooks%,$(TESTS))
ONE_FILE = $(and $(findstring .,$(FILES)),$(filter 1,$(words $(FILES))))
LESSONS = --nbval-lax --nbval-current-env --nbval-cell-timeout=$(CELL_TIMEOUT)
test: $(READY)  ## unit tests, then every lesson cell by cell; TESTS=tests/test_keys.py for one file
	@$(PYTEST) $(if $(ONE_FILE),,$(SIDE_BY_SIDE)) $(if $(findstring notebooks,$(TESTS)),$(LESSONS)) $(TESTS)

quick: lint  ## lint, then the unit tests that take seconds: two minutes, before every commit
	@$(PYTEST) $(SIDE_BY_SIDE) -q -m "not slow and not browser" tests

lint: $(READY)  ## style and unused or tangled code (ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

notebooks: $(READY)  ## run the committed notebooks again, in place; ARGS=03 for one
	$(BIN)/python .ci/refresh.py $(ARGS)

# The figures that README and lessons quote; long, and it goes on where it was interrupted. Needs the real data sets.
results: $(READY)  ## run the benchmarks (A1 to A3) again: data/results/*.csv; long, resumes
	$(BIN)/python .ci/results.py
	$(A3) --data ham10000 -p rounds 15
	$(A2) $(if $(findstring flower,$(EXTRAS)),-p flower $(FLOWER)) $(if $(findstring pfl,$(EXTRAS)),-p pfl 128)
	$(BIN)/python -m fedssg_helpers run --only explorer --out out/results-explorer --resume -p again true
	$(BIN)/python data/long_fedavg.py
	$(MAKE) ranking

ranking: $(READY)  ## rank the examples, each against its control: data/results/ranking.csv; resumes
	@rm -f out/ranking/ranking.csv
	@for file in notebooks/examples/*.py; do $(BIN)/python -m fedssg_helpers rank $$file --out out/ranking || exit; done
	@cp out/ranking/ranking.csv data/results/

lab: $(READY)  ## open the lessons in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=notebooks

explorer: $(READY)  ## the whole story on one screen, for a projector, without code (needs Voila)
	@test -x $(BIN)/voila || { \
		echo "error: Voila is not installed; install it with the rest: make explorer EXTRAS=test,explorer" >&2; exit 1; }
	$(BIN)/voila notebooks/explorer.ipynb $(VOILA)

doctor: $(READY)  ## is this machine ready for class?
	$(BIN)/python -m fedssg_helpers doctor

clean:  ## remove the environment and everything computed
	rm -rf .venv out build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Made once, and again only when the dependencies change. One pip call: torch and torchvision must match.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: '$(PYTHON)' is not Python 3.11 or newer. Install one, or name it: make course PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
		echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv (PyTorch, JupyterLab and the rest: some minutes and about 6 GB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' || { \
		echo "error: pip could not install; its own words are above. Without a network, or with less than 8 GB free, this cannot work." >&2; exit 1; }
	@touch $@
	@echo "Installed."

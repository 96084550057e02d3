# Every target that runs something makes its environment first, when there is none, when requirements.lock changed, or
# when the environment last served another clone. Yours to set, for example:
#     make test PYTHON=python3.12 VENV=/somewhere/else JOBS=0 ARGS="tests/sampling -k greedy"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
BIN = $(VENV)/bin

.PHONY: help env demo test lint mutants soak embedded clean

help:
	@echo "make env       the environment in $(VENV): the package (editable) and all that the rest needs"
	@echo "make demo      the main job on the embedded digits; writes runs/demo/report.html and runs/demo/metrics.json"
	@echo "make test      the test suite, JOBS=2 files at a time; ARGS=... goes to pytest"
	@echo "make lint      ruff and pyright"
	@echo "make mutants   plants small faults, each alone; every one must make its tests fail; ARGS='-j 8 sampling'"
	@echo "make soak      the long reliability run: kills and resumes, several processes, damaged files"
	@echo "make embedded  makes the embedded pairs of digits and shapes again from their recipes"
	@echo "make clean     removes caches and build output; keeps $(VENV) and runs/"

env:
	@bash .ci/environment "$(PYTHON)" "$(VENV)"

demo: env
	$(BIN)/varpi demo $(ARGS)

test: env
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath "$(BIN)/python"

mutants: env
	$(BIN)/python tests/mutants.py $(ARGS)

soak: env
	$(BIN)/python tests/soak.py $(ARGS)

# In this order: the generator is trained on the tokens of the tokenizer before it. Interrupted, it continues.
embedded: env
	$(BIN)/python -m varpi.embedded.text
	for part in perceptual judge tokenizer generator; do \
		$(BIN)/varpi train digits-$$part --output runs/embedded/$$part --resume && \
		cp runs/embedded/$$part/model.safetensors src/varpi/embedded/digits-$$part.safetensors || exit 1; \
	done
	for part in detector perceptual tokenizer generator; do \
		$(BIN)/varpi train shapes-$$part --output runs/embedded/shapes-$$part --resume && \
		$(BIN)/python -m varpi.embedded.pack runs/embedded/shapes-$$part \
			src/varpi/embedded/shapes-$$part.safetensors || exit 1; \
	done

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

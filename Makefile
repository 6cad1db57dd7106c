# Two commands on a machine with Python >= 3.11 and git:
#   make quickstart    install, train the small default, export, compare base with tuned
#   make persona       a second example: a system message, what to decline, the base with examples
#   make test          install the test extra, run the suite
# make docs             the documentation site, in site/
# make lint             ruff and mypy, as CI runs them on Python 3.11 (types of numpy differ by version)
# PYTHON=python3.12 chooses the interpreter, EXTRAS=tpu (or cuda) the accelerator.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
OUT ?= out/quickstart

comma := ,
EXTRAS_ALL = $(if $(EXTRAS),[$(EXTRAS)],)
TEST_EXTRAS_ALL = [test$(if $(EXTRAS),$(comma)$(EXTRAS),)]

.PHONY: quickstart persona test test-nightly lint docs clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python -m jaxtune.train --config configs/quickstart/quickstart.yaml --output_dir $(OUT)
	$(VENV)/bin/python -m jaxtune.evaluate --config $(OUT)/config.yaml --model_name_or_path $(OUT)/hf \
	  --base configs/quickstart/model --generate 200

persona: $(VENV)/installed
	$(VENV)/bin/python configs/persona/make_articles.py out/persona
	$(VENV)/bin/python -m jaxtune.train --config configs/persona/base.yaml
	$(VENV)/bin/python -m jaxtune.train --config configs/persona/persona.yaml
	$(VENV)/bin/python -m jaxtune.evaluate --config out/persona/tuned/config.yaml \
	  --model_name_or_path out/persona/tuned/hf --base out/persona/base/hf --few_shot 4 \
	  --generate 300 --label '^(Summary|Sorry)' --by kind

test: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# What `make test` leaves out for its length: many repetitions and stand-ins of what it does once.
test-nightly: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n auto --dist loadgroup -m nightly $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

$(VENV)/installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -e '.$(EXTRAS_ALL)'
	touch $@

$(VENV)/installed-test: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -e '.$(TEST_EXTRAS_ALL)'
	$(VENV)/bin/python -m pip install -q --no-deps trl==1.16.0  # its chat templates, nothing else of it
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) out site .jax_cache

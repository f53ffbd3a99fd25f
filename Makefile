# Two commands: `make demo` runs the main job, `make test` runs the tests. Both make .venv from requirements.lock first.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

NNUNET := .venv/nnunet

.PHONY: demo test image-test nnunet-test tls-test fuzz chaos coverage lint types check clean

# Bytecode of what the commands import: of all packages it takes two minutes more. It is wanted whatever the shell says.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps --editable .
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -W ignore docker/compile_imports.py
	touch $(READY)

demo: $(READY)
	$(BIN)/tomoscale demo $(ARGS)

# Services mostly wait, so that three processes keep two cores busy. With ARGS it is pytest with these, in one process.
test: $(READY)
	$(BIN)/pytest $(or $(ARGS),-n 3 --dist loadfile --no-loadscope-reorder)

# Builds the image and runs its services: root, buildah, mmdebstrap, PostgreSQL; 7 GB in TMPDIR. Elsewhere it says why not.
image-test: $(READY)
	TOMOSCALE_IMAGE_TEST=1 $(BIN)/pytest --capture=no -rs tests/image $(ARGS)

# A released nnU-Net, in an environment of its own, fine-tunes what is exported for it, and back; a few minutes.
$(NNUNET)/.ready: tests/nnunet/requirements.lock $(READY)
	$(PYTHON) -m venv $(NNUNET)
	$(NNUNET)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $<)"
	$(NNUNET)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

nnunet-test: $(NNUNET)/.ready
	TOMOSCALE_NNUNET=$(abspath $(NNUNET)) $(BIN)/pytest --capture=no -rs tests/nnunet $(ARGS)

# Damaged files for every reader, others each round, for FUZZ_MINUTES in all.
FUZZ_MINUTES ?= 10
fuzz: $(READY)
	TOMOSCALE_FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/pytest --timeout 0 \
		tests/unit/storage/ingest/test_fuzz.py tests/unit/ssl_core/portable/test_one_nifti_header.py $(ARGS)

# Disasters on machines of namespaces (root), about half an hour; docs/benchmarks-nodes.md shows the table.
chaos: $(READY)
	TOMOSCALE_CHAOS_OUT=docs/benchmarks/nodes.json $(BIN)/pytest -s tests/chaos $(ARGS)
	$(BIN)/python docs/update.py

# A run over TLS on machines of namespaces (root, stunnel) with somebody who listens on their network, two minutes.
tls-test: $(READY)
	TOMOSCALE_TLS_TEST=1 $(BIN)/pytest --capture=no -rs tests/tls $(ARGS)

coverage: $(READY)
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/python docs/coverage_page.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv build *.egg-info

# Everything below installs into .venv, with the versions pinned in requirements.lock.
PYTHON ?= python3
PIP = PIP_CONSTRAINT=requirements.lock .venv/bin/pip install --quiet --disable-pip-version-check
PYTEST = .venv/bin/pytest --pyargs tombola tests -n auto --dist loadgroup
SOURCES = pyproject.toml requirements.lock CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test test-repeat mutate bench clean

demo: .venv/installed
	.venv/bin/tombola run digits

test: .venv/installed-tests
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/ruff check src tests benchmarks
	.venv/bin/mypy
	$(PYTEST)

# RUNS times all that `make test` runs, BUSY of them while both cores have something else to do; a line for each.
RUNS ?= 10
BUSY ?= 5
test-repeat: .venv/installed-tests
	.venv/bin/python tests/repeat.py $(RUNS) $(BUSY) $(PYTEST)

# Changes of the code that no test notices, in rooms or modules of your choice: make mutate MODULES="pruning store"
MODULES ?= importance pruning training store analysis
mutate: .venv/installed-tests
	.venv/bin/python tests/mutate.py $(MODULES)

bench: .venv/installed
	.venv/bin/python benchmarks/run.py

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/installed-tests: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) '.[test]'
	touch .venv/installed $@

.venv/installed-ray: .venv/installed-tests
	$(PIP) 'tombola[ray]'
	touch $@

clean:
	rm -rf .venv build dist

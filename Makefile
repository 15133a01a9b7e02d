# Everything below installs into .venv, with the versions pinned in requirements.lock.
PYTHON ?= python3
PIP = PIP_CONSTRAINT=requirements.lock .venv/bin/pip install --quiet --disable-pip-version-check
SOURCES = pyproject.toml requirements.lock CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test mutate bench clean

demo: .venv/installed
	.venv/bin/tombola run digits

test: .venv/installed-tests
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/ruff check src tests benchmarks
	.venv/bin/mypy
	.venv/bin/pytest --pyargs tombola tests

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

clean:
	rm -rf .venv build dist

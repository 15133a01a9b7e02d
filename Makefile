# Everything below installs into .venv, with the versions pinned in requirements.lock.
PYTHON ?= python3
PIP = PIP_CONSTRAINT=requirements.lock .venv/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test bench clean

demo: .venv/installed
	.venv/bin/tombola run digits

test: .venv/installed-tests
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/ruff check src tests benchmarks
	.venv/bin/mypy
	.venv/bin/pytest

bench: .venv/installed
	.venv/bin/python benchmarks/run.py

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-tests: .venv/installed
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist

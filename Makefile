# Everything below installs into .venv, with the versions pinned in requirements.lock.
PYTHON ?= python3
PIP = PIP_CONSTRAINT=requirements.lock .venv/bin/pip install --quiet --disable-pip-version-check
SOURCES = pyproject.toml requirements.lock CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test test-torch golden bench clean

demo: .venv/installed
	.venv/bin/tombola run digits

test: .venv/installed-tests
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/ruff check src tests benchmarks
	.venv/bin/mypy
	.venv/bin/pytest --pyargs tombola tests

# The optimizers against torch's own, and golden bits, with the oldest and the newest torch that pyproject.toml allows.
# Each is installed into a virtual environment that is removed afterwards: up to 6 GB, of which torch for CUDA is most.
OLDEST_TORCH = $(shell sed -n 's/^ *"torch>=\(.*\)",/\1/p' pyproject.toml)
test-torch:
	for torch in 'torch==$(OLDEST_TORCH).*' 'torch>=$(OLDEST_TORCH)'; do \
	    rm -rf .venv-torch && $(PYTHON) -m venv .venv-torch \
	    && .venv-torch/bin/pip install --quiet --disable-pip-version-check "$$torch" . pytest hypothesis \
	    && .venv-torch/bin/pip list 2> /dev/null | grep '^torch ' \
	    && .venv-torch/bin/pytest -rs tests/test_optimizer.py tests/test_training.py -k 'test_optimizer or golden' \
	    || exit 1; \
	done
	rm -rf .venv-torch

# The golden bits of this machine, with the reason: make golden WHY='torch 2.14 sums in another order'
golden: .venv/installed-tests
	.venv/bin/python tests/golden.py --why '$(WHY)'

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
	rm -rf .venv .venv-torch build dist

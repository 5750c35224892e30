# Needs make and a python3 of at least 3.11 that has the venv module; everything else is installed
# into folders of this checkout. `make` alone lists the targets.

PYTHON ?= python3
PYTEST_ARGS ?=
# Tests that run at the same time: most of them wait for disks, servers and deadlines.
TEST_JOBS ?= 2
BENCH_ARGS ?=
# The oldest supported runtime and the newest of each major version that applications pin.
PROTOBUF_VERSIONS ?= 4.25 5 6 7

# The exact versions hold for what pip installs to build with, too; `-c` would not reach that.
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help tools .venv .venv-protoc demo test prove bench check lint format-check types layers \
	proto protobuf-fresh protobuf-matrix clean

help: ## list the targets
	@sed -n 's/^\([a-z.][a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  %-16s %s\n' "$$name" "$$text"; done

.venv: .venv/.stamp ## install kvrep and the tools to work on it into .venv

define require_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "kvrep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
endef

define new_venv
	$(call require_python)
	@[ -x $(1)/bin/pip ] || $(PYTHON) -m venv --clear $(1) || { \
		echo "$(PYTHON) cannot make a venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; }
endef

.venv/.stamp: pyproject.toml constraints.txt requirements-dev.txt
	$(call new_venv,.venv)
	@echo "installing into .venv"
	@PIP_CONSTRAINT=constraints.txt .venv/bin/python $(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

demo: .venv ## show kvrep at work
	.venv/bin/kvrep demo

test: .venv tools ## run the tests (PYTEST_ARGS=... is passed on)
	.venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

tools: ## install what the fault tests use, as root on Debian
	@.ci/install-tools

prove: .venv tools ## run the long fault and model runs behind the guarantees
	.venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal -m prove $(PYTEST_ARGS)

bench: .venv ## measure (BENCH_ARGS=... is passed on)
	.venv/bin/python -m benchmarks $(BENCH_ARGS)

check: lint format-check types layers protobuf-fresh ## lint, format, types, layers, generated code (make -k goes on)

lint: .venv
	.venv/bin/ruff check

format-check: .venv
	.venv/bin/ruff format --check

types: .venv
	.venv/bin/mypy

layers: .venv
	.venv/bin/lint-imports --no-logo

proto: .venv-protoc ## generate kvrep/_pb from protos
	.venv-protoc/bin/python protos/generate.py

protobuf-fresh: .venv-protoc ## check that kvrep/_pb is what protos would generate
	.venv-protoc/bin/python protos/generate.py --check

.venv-protoc: .venv-protoc/.stamp

.venv-protoc/.stamp: constraints-protoc.txt
	$(call new_venv,.venv-protoc)
	@echo "installing protoc into .venv-protoc"
	@PIP_CONSTRAINT=constraints-protoc.txt .venv-protoc/bin/python $(PIP_INSTALL) --only-binary :all: \
		grpcio-tools setuptools || { \
		rm -rf .venv-protoc; \
		echo "grpcio-tools 1.62.3 has wheels up to Python 3.12: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
		exit 1; }
	@touch $@

# One wheel is built, compared with the checkout, and tested as installed: -P and importlib keep the
# checkout itself off sys.path.
protobuf-matrix: ## test the wheel on every supported protobuf, each in a throw-away venv
	$(call require_python)
	@set -eu; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	grep -v '^protobuf==' constraints.txt > "$$scratch/constraints.txt"; \
	export PIP_CONSTRAINT="$$scratch/constraints.txt"; \
	$(PYTHON) -m venv "$$scratch/build"; \
	"$$scratch/build/bin/python" -m pip --disable-pip-version-check wheel --quiet --no-deps \
		--wheel-dir "$$scratch" .; \
	$(PYTHON) -m zipfile -l "$$scratch"/kvrep-*.whl | sed -n 's/^\(kvrep\/[^ ]*\) .*/\1/p' | \
		LC_ALL=C sort > "$$scratch/packed"; \
	find kvrep -type f ! -name '*.py[cod]' ! -name '.*' | LC_ALL=C sort > "$$scratch/expected"; \
	diff "$$scratch/expected" "$$scratch/packed" || { \
		echo "the wheel (>) does not hold what the checkout (<) does" >&2; exit 1; }; \
	for version in $(PROTOBUF_VERSIONS); do \
		venv="$$scratch/protobuf-$$version"; \
		$(PYTHON) -m venv "$$venv"; \
		"$$venv/bin/python" $(PIP_INSTALL) "protobuf==$$version.*" pytest-timeout hypothesis \
			"$$scratch"/kvrep-*.whl; \
		echo "== $$("$$venv/bin/pip" freeze | grep '^protobuf==')"; \
		"$$venv/bin/python" -P -m pytest -q -p no:cacheprovider --import-mode=importlib --noconftest \
			tests/unit/test_protobuf_runtime.py; \
	done

clean: ## remove the venvs, caches and builds
	rm -rf .venv .venv-protoc .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache \
		build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything here works on a fresh clone: Python 3.11 or newer, make, git, and a package registry.
# Two environments, since DeltaGlider 6.2.0 pins cryptography<45 and dg-cached is faster on 50:
#   .venv               the project, editable, and its tools; the daemon of demo and tests runs here
#   .venv-deltaglider   what a user of DeltaGlider has: deltaglider==6.2.0 and the same clone
# and a third for `make fuzz` alone:
#   .venv-fuzz          the project and atheris, which has wheels for Python 3.11 to 3.13 on x86-64

PYTHON ?= python3
SIZE   ?= 100

PIP := -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo bench test fuzz soak faults lint proto environments constraints audit python python-of-atheris xdelta3 clean

# Another Python, or a clone that was moved, makes the environments anew.
IDENTITY := $(shell $(PYTHON) -c 'import sys, zlib; print("%d.%d-%08x" % (sys.version_info[0], sys.version_info[1], zlib.crc32((sys.executable + "$(CURDIR)").encode()) & 0xffffffff))' 2>/dev/null)

PROJECT     := .venv/ready-$(IDENTITY)
DELTAGLIDER := .venv-deltaglider/ready-$(IDENTITY)
FUZZ        := .venv-fuzz/ready-$(IDENTITY)

help:
	@echo "make demo [SIZE=100]   DeltaGlider with and without dg-cached, on five archives of SIZE MB"
	@echo "make bench [QUICK=1]   measure what docs/performance.md and implementations.md say"
	@echo "make test [ARGS=...]   all tests; ARGS go to pytest"
	@echo "make fuzz [MINUTES=10] [TARGET=...]   fuzz every target, or one, for so long each"
	@echo "make soak [MINUTES=15] clients, faults, and every byte compared; needs root"
	@echo "make faults            each system call of a store fails once; needs root, strace"
	@echo "make lint              ruff and mypy"
	@echo "make proto             generate the stubs from proto/"
	@echo "make constraints       resolve the pinned versions and their hashes in constraints/ anew"
	@echo "make audit             look the pinned versions up in the database of known vulnerabilities"
	@echo "make clean             remove every environment"
	@echo
	@echo "PYTHON=python3.13 make ...   with another Python than python3 (3.11 or newer)"

demo: environments xdelta3
	@.venv/bin/python -m benchmarks.demo --size $(SIZE)

bench: environments xdelta3
	@.venv/bin/python -m benchmarks.bench $(if $(QUICK),--quick)

test: environments xdelta3
	@.venv/bin/python -m pytest -n auto $(ARGS)

fuzz: $(FUZZ)
	@.venv-fuzz/bin/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(if $(TARGET),--target $(TARGET))

soak: environments
	@.venv/bin/python -m tests.soak --minutes $(or $(MINUTES),15) $(ARGS)

faults: environments
	@.venv/bin/python -m tests.soak.walk $(ARGS)

lint: $(PROJECT)
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/mypy -p benchmarks

proto: $(PROJECT)
	.venv/bin/python -m grpc_tools.protoc -I proto \
		--plugin=protoc-gen-mypy=.venv/bin/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=.venv/bin/protoc-gen-mypy_grpc \
		--python_out=proto --mypy_out=proto --grpc_python_out=proto --mypy_grpc_out=proto \
		proto/dgcache_proto/v1/dgcache.proto
	.venv/bin/python -m tests.support.descriptor_module > proto/dgcache_proto/v1/dgcache_descriptor.py

environments: $(PROJECT) $(DELTAGLIDER)

# $(1) the environment, $(2) its lock: every package with its version and hashes, the build backend included,
# so that nothing else is fetched, and nothing of which not one hash was seen before
define install
	@echo "$(1): installing, once; this takes a minute or two"
	@mkdir -p $(1)-temporary
	@test -e $@ || TMPDIR=$(CURDIR)/$(1)-temporary $(PYTHON) -m venv --clear $(1)
	@TMPDIR=$(CURDIR)/$(1)-temporary $(1)/bin/python $(PIP) install --quiet --require-hashes --no-deps -r $(2)
	@TMPDIR=$(CURDIR)/$(1)-temporary $(1)/bin/python $(PIP) install --quiet --no-deps --no-build-isolation -e .
	@rm -rf $(1)-temporary
	@touch $@
endef

$(PROJECT): pyproject.toml constraints/project.txt | python
	$(call install,.venv,constraints/project.txt)

$(DELTAGLIDER): pyproject.toml constraints/deltaglider.txt | python
	$(call install,.venv-deltaglider,constraints/deltaglider.txt)

$(FUZZ): pyproject.toml constraints/fuzz.txt | python-of-atheris
	$(call install,.venv-fuzz,constraints/fuzz.txt)

# uv resolves for all Pythons at once, with the hash of every file; pip checks them when it installs
constraints: | python
	@set -e; environment=$$(mktemp -d); trap 'rm -rf "$$environment"' EXIT; \
	$(PYTHON) -m venv $$environment; $$environment/bin/python $(PIP) install --quiet uv; \
	for name in project:dev deltaglider:deltaglider fuzz:fuzz; do \
		$$environment/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
			--no-annotate --custom-compile-command 'make constraints' \
			--group $${name#*:} --group build pyproject.toml -o constraints/$${name%:*}.txt; \
	done

# not part of make test: it asks a service on the network, and what was right yesterday may be known as wrong today
audit: | python
	@set -e; environment=$$(mktemp -d); trap 'rm -rf "$$environment"' EXIT; \
	$(PYTHON) -m venv $$environment; $$environment/bin/python $(PIP) install --quiet pip-audit; \
	for name in project deltaglider fuzz; do \
		$$environment/bin/pip-audit --strict --disable-pip --require-hashes -r constraints/$$name.txt; \
	done

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "dg-cached needs Python 3.11 or newer. $(PYTHON) says: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Name one that is: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }

python-of-atheris: | python
	@$(PYTHON) -c 'import sys, platform; sys.exit(sys.version_info >= (3, 14) or platform.machine() != "x86_64")' || { \
		echo "make fuzz needs atheris, which has wheels for Python 3.11 to 3.13 on x86-64." >&2; \
		echo "Name such a one: PYTHON=python3.13 make fuzz" >&2; exit 1; }

xdelta3: | python
	@$(PYTHON) -m benchmarks.xdelta3

clean:
	rm -rf .venv .venv-*

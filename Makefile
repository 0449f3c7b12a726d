# Everything here works on a fresh clone: Python 3.11 or newer, make, git, and a package registry.
# Two environments, since DeltaGlider 6.2.0 pins cryptography<45 and dg-cached is faster on 50:
#   .venv               the project, editable, and its tools; the daemon of demo and tests runs here
#   .venv-deltaglider   what a user of DeltaGlider has: deltaglider==6.2.0 and the same clone
# and a third for `make fuzz` alone:
#   .venv-fuzz          the project and atheris, which has wheels for Python 3.11 to 3.13 on x86-64

PYTHON ?= python3
SIZE   ?= 100
MINUTES ?= 10

# what builds the editable install; in the environment itself, so that nothing else is fetched for it
BUILD := pip hatchling editables
PIP   := -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo bench test fuzz lint proto environments constraints python python-of-atheris xdelta3 clean

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
	@echo "make lint              ruff and mypy"
	@echo "make proto             generate the stubs from proto/"
	@echo "make constraints       resolve the pinned versions in constraints/ anew"
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
	@.venv-fuzz/bin/python -m tests.fuzz --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET))

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

environments: $(PROJECT) $(DELTAGLIDER)

# $(1) the environment, $(2) its constraints, $(3) what goes into it
define install
	@echo "$(1): installing, once; this takes a minute or two"
	@mkdir -p $(1)-temporary
	@test -e $@ || TMPDIR=$(CURDIR)/$(1)-temporary $(PYTHON) -m venv --clear $(1)
	@TMPDIR=$(CURDIR)/$(1)-temporary $(1)/bin/python $(PIP) install --quiet --upgrade -c $(2) $(BUILD)
	@TMPDIR=$(CURDIR)/$(1)-temporary $(1)/bin/python $(PIP) install --quiet --no-build-isolation -c $(2) $(3)
	@rm -rf $(1)-temporary
	@touch $@
endef

$(PROJECT): pyproject.toml constraints/project.txt | python
	$(call install,.venv,constraints/project.txt,--group dev -e .)

$(DELTAGLIDER): pyproject.toml constraints/deltaglider.txt | python
	$(call install,.venv-deltaglider,constraints/deltaglider.txt,--group deltaglider -e .)

$(FUZZ): pyproject.toml constraints/fuzz.txt | python-of-atheris
	$(call install,.venv-fuzz,constraints/fuzz.txt,--group fuzz -e .)

constraints: | python
	@for name in project:dev deltaglider:deltaglider fuzz:fuzz; do \
		set -e; environment=$$(mktemp -d); $(PYTHON) -m venv $$environment; \
		$$environment/bin/python $(PIP) install --quiet --upgrade $(BUILD); \
		$$environment/bin/python $(PIP) install --quiet --no-build-isolation --group $${name#*:} -e .; \
		{ echo "# made by: make constraints"; \
		  $$environment/bin/python $(PIP) freeze --all --exclude-editable \
			| grep -v -e '^-' -e '^#' -e '^$$' -e '^setuptools=='; \
		} > constraints/$${name%:*}.txt; \
		rm -rf $$environment; \
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

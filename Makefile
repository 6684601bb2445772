# vmkeep: `make demo` shows it at work, `make test` tests it, `make check` is what CI runs.
# All of it happens in .venv, which is made from the locked requirements when needed.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# command or file:Debian package
TEST_TOOLS := qemu-img:qemu-utils nbdkit:nbdkit mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mke2fs:e2fsprogs \
	strace:strace systemd-analyze:systemd qemu-system-x86_64:qemu-system-x86 \
	busybox:busybox-static depmod:kmod dmsetup:dmsetup faketime:faketime \
	swtpm:swtpm swtpm_setup:swtpm-tools /usr/share/OVMF/OVMF_CODE_4M.fd:ovmf \
	libvirtd:libvirt-daemon virt-qemu-run:libvirt-daemon-driver-qemu qemu-ga:qemu-guest-agent \
	/usr/include/libvirt/libvirt.h:libvirt-dev pkg-config:pkg-config gcc:gcc

.PHONY: help demo demo-libvirt test test-deps check bench bench-quick soak lock clean

help:
	@echo "make demo          a real VM disk: backed up, changed, backed up, restored, imported, compared"
	@echo "make demo-libvirt  a VM: backed up while it writes, destroyed, restored, booted again"
	@echo "make test          the tests; ARGS are for pytest: ARGS='tests/unit -k name'"
	@echo "make check         lint, format, types, layers and tests, as CI does"
	@echo "make test-deps     installs the Debian packages that the tests use (as root)"
	@echo "make bench         how fast it is, beside others and the machine's limits"
	@echo "make bench-quick   the same in minutes, with small disks"
	@echo "make soak          hours of crashes, faults, damage, hostile input; MINUTES=480 limits the time"
	@echo "make lock          renews requirements/*.txt from pyproject.toml"
	@echo "make clean         removes the environment, caches and the demo's data"

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.%: requirements/%.txt pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --require-hashes -r $<
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# libvirt-python is built here, from source: without libvirt's headers its tests are skipped.
.venv/.libvirt: requirements/libvirt.txt
	@if [ -f /usr/include/libvirt/libvirt.h ]; then \
		$(BIN)/python -m pip install --quiet --require-hashes --no-build-isolation -r $< && touch $@; \
	else echo "no libvirt-python: needs libvirt-dev, gcc and pkg-config (make test-deps)"; fi

demo: .venv/.runtime
	$(BIN)/python -m bench.demo $(ARGS)

demo-libvirt: .venv/.test .venv/.libvirt
	$(BIN)/python -m bench.demo_libvirt

TESTS := $(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tests)

test: .venv/.test .venv/.libvirt
	$(TESTS)

check: .venv/.check .venv/.libvirt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TESTS)

bench: .venv/.runtime
	$(BIN)/python -m bench $(ARGS)

bench-quick: .venv/.runtime
	$(BIN)/python -m bench --quick $(ARGS)

# Hours: what `make check` runs a small part of. MINUTES=480 limits the time. Some parts need root.
soak: .venv/.test
	$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

test-deps:
	@packages=""; for pair in $(TEST_TOOLS); do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair%%:*}" >/dev/null || \
		[ -f "$${pair%%:*}" ] || packages="$$packages $${pair##*:}"; done; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || packages="$$packages python3-venv"; \
	if [ -z "$$packages" ]; then echo "test-deps: nothing is missing"; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages; \
	else echo "test-deps: as root, please: apt-get install$$packages" >&2; exit 1; fi

PIP_COMPILE := .cache/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options
LOCK_FROM := pyproject.toml requirements/build.in

lock:
	$(PYTHON) -m venv .cache/lock && .cache/lock/bin/pip install --quiet pip-tools
	$(PIP_COMPILE) -o requirements/runtime.txt $(LOCK_FROM)
	$(PIP_COMPILE) --extra test -c requirements/runtime.txt -o requirements/test.txt $(LOCK_FROM)
	$(PIP_COMPILE) --extra libvirt -c requirements/runtime.txt -o requirements/libvirt.txt $(LOCK_FROM)
	$(PIP_COMPILE) --extra test --extra check -c requirements/test.txt -o requirements/check.txt $(LOCK_FROM)

clean:
	rm -rf .venv .cache build *.egg-info demo-data .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Everything starts from a bare machine with Python 3.11, pip and make: each target first completes .venv (scripts/install).
# Another Python:          make demo PYTHON=/path/to/python3.11
# Other install options:   make install INSTALL_FLAGS="--device cpu"
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test ui install test-fast test-slow coverage lint clean
export PYTHON

help:
	@echo "make demo       kill a worker in the middle of an answer and watch the answer go on (sets everything up first)"
	@echo "make ui         the demo, left running with its page"
	@echo "make test       lint, fast tests, then the tests on real vLLM processes"
	@echo "make test-fast  lint and fast tests only          make test-slow  the long tests"
	@echo "make coverage   branch coverage of the recovery and shadow code by simulated schedules and unit tests"
	@echo "make install    only set up .venv                 make clean      remove .venv and every cache here"

demo: install
	@.venv/bin/ghostserve demo

ui: install
	@.venv/bin/ghostserve demo --stay

test: test-fast
	@scripts/test -n 2 --dist loadfile --ignore tests/real -m "long and not real and not slow"
	@scripts/test -m "real and not slow"

test-fast: lint
	@scripts/programs
	@scripts/test -n 2 --dist loadfile --ignore tests/real -m "not real and not long and not slow"

test-slow: install
	@scripts/programs
	@scripts/test -m slow
	@for serving in v1-sync v2-sync v2-async; do \
		scripts/test --serving $$serving tests/real/test_losses.py tests/real/test_ladder.py || exit 1; \
	done

coverage: install
	@scripts/coverage

lint: install
	@scripts/lint

install:
	@scripts/install $(INSTALL_FLAGS)

clean:
	rm -f src/ghostserve/native/*.so src/ghostserve/native/.*.so
	rm -rf .venv build dist src/ghostserve.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

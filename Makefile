# Every target works on a fresh machine: the environment is made from requirements.lock when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format bench study lock clean

demo: .venv/stamp ## compare eight optimizers; the report is out/compare.html
	$(BIN)/schuss compare --out out

# One thread of torch's for each worker: more would only wait for one another.
test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

check: .venv/stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

study: .venv/stamp ## hours; stopped and started again, it goes on
	$(BIN)/python benchmarks/study.py

bench: .venv/stamp
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/fit.py

# Keeps every pinned version that pyproject.toml still allows; `make lock UPGRADE=1` takes the newest of everything.
# Left out is what torch pins itself for its CUDA build, so that the lock also fits a build of torch without CUDA. But
# for Triton, which the tests need everywhere: it must be the version that this torch's CUDA build pins.
TRITON := triton==3.7.1
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet '$(TRITON)' $(if $(UPGRADE),,--constraint requirements.lock) --editable '.[lab,print,dev]'
	{ echo '# Written by `make lock` for `pip install -r`; the packages of .[lab,print,dev] and all that they need.'; \
	  .venv-lock/bin/pip freeze --all --exclude pip --exclude-editable \
	  | sed -E -e '/^(nvidia|cuda)\b/d' -e 's/^(torch==[^+]*)\+.*/\1/' -e "s/^triton==.*/&; platform_system == 'Linux'/"; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock out .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/stamp: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

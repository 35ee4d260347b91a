# make demo · make check · make test · make bench: each makes .venv and installs what it needs. PYTHON=python3.12 picks another Python.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := out/sample_pmmp

.PHONY: demo check check-front check-rooms test test-front test-rooms bench lint clean
.DELETE_ON_ERROR:

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) found, Python 3.11 or newer expected; make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/run
	$(PY) prepare_sample.py
	$(PY) train.py config/sample_pmmp.py --overwrite
	$(PY) eval.py --from_ckpt=$(DEMO) --split=test --description_length
	$(PY) plots.py $(DEMO) --plot_dir=out/plots
	head -c 32768 data/sample/test.bin > out/demo.txt
	$(PY) compress.py pack $(DEMO)/ckpt.pt out/demo.txt out/demo.two-part --weight_bits=6 --overwrite
	$(PY) compress.py unpack out/demo.two-part out/demo.decoded --overwrite && cmp out/demo.txt out/demo.decoded
	$(PY) compress.py online out/demo.txt out/demo.online --no-verify --overwrite
	$(PY) compress.py unpack out/demo.online out/demo.decoded --overwrite && cmp out/demo.txt out/demo.decoded
	$(PY) eval.py --from_ckpt=$(DEMO) --max_tokens=32768 --archive=out/demo.two-part --online_archives=out/demo.online --baselines
	$(PY) runs.py

# Before every commit: the style, and all tests that start no processes, on two cores.
check: lint
	$(MAKE) --no-print-directory --output-sync=target -j2 check-front check-rooms

check-front:
	$(PY) -m pytest $(wildcard tests/test_*.py) -m "not slow"

check-rooms:
	$(PY) -m pytest tests/codec tests/corpus tests/lab tests/training -m "not slow"

# All tests: also those that start torchrun, kill processes and pretend to be SLURM; on two cores.
test: .venv/dev
	$(MAKE) --no-print-directory --output-sync=target -j2 test-front test-rooms

test-front:
	$(PY) -m pytest $(wildcard tests/test_*.py)

test-rooms:
	$(PY) -m pytest tests/codec tests/corpus tests/lab tests/training

lint: .venv/dev
	.venv/bin/ruff check .

bench: .venv/run
	$(PY) -m lab.bench procedures
	$(PY) -m lab.bench plain --threads=1 --pairs=40
	for area in mixer mixture data evaluation distil; do $(PY) -m lab.bench $$area --threads=1 || exit 1; done
	$(PY) -m lab.bench codec $(DEMO) data/sample/test.bin --weight_bits=6

clean:
	rm -rf .venv out data/sample runs.csv

# make generate    the quick start: phantoms in, screened synthetic cohort out
# make test        lint, types and the test suite
# make prove       the slow proofs; figures go to docs/proofs.md
# Arguments pass on:  make generate ARGS="--count 50"   make test ARGS="-k ingest"
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
TORCH ?= torch==2.13.0

.PHONY: generate test prove lint clean
.DELETE_ON_ERROR:

# torch first and pinned: from a range pip would take the newest build with gigabytes of CUDA
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[codecs,dcm2niix,pacs,text,faces,cluster,test]
	touch $@

generate: .venv/installed
	$(BIN)/python sample_data/phantoms.py sample_data/generated/quickstart --patients 260 --grid 32 --check
	$(BIN)/synthmed generate configs/quickstart.yaml $(ARGS)

# one thread a worker: two that share the cores with others would wait for each other
test: .venv/installed lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not gpu" $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prove: .venv/installed
	$(BIN)/python tests/proofs/prove.py $(ARGS)

clean:
	rm -rf .venv runs sample_data/generated

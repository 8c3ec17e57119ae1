# Everything runs from .venv, which `make .venv` builds from constraints.txt. PYTHON=... picks another Python.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL := models/smollm2-135m
PACKAGES := schemas dataprep trainer kernels jobs
PYTEST ?=
# in about a minute on two cores; together with ruff and mypy `make check`
FAST := tests/test_repository.py tests/test_docs.py tests/test_known_bugs.py tests/schemas tests/jobs/test_migration.py \
	tests/dataprep/text tests/trainer/order/test_row_order.py tests/trainer/order/test_row_packer.py \
	tests/trainer/order/test_mixed_order.py tests/trainer/order/test_shuffle.py tests/trainer/metrics tests/trainer/run/test_cadence.py \
	tests/trainer/optim/test_learning_rate.py tests/trainer/layers/test_attention_mask.py tests/trainer/pipeline/test_token_sampler.py

.PHONY: help demo check test exhaustive lint format bench axolotl-fixtures docs families headrace.zip model clean

help: ## list the targets
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: .venv model ## real text to a fine-tuned real model over 2 pipeline stages, start to end
	$(BIN)/python -m headrace.jobs.tools.demo

check: lint ## ruff, mypy and the fast tests, in under two minutes
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow and not exhaustive and not gpu" $(FAST) $(PYTEST)

test: .venv model ## all tests; PYTEST="-k name -x" passes options on
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal $(PYTEST)

exhaustive: .venv model ## the long forms of the proofs: many kills, every layout, whole corpora
	$(BIN)/python -m pytest -m exhaustive $(PYTEST)

lint: .venv build/ns/headrace ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/ns $(BIN)/mypy $(foreach p,$(PACKAGES),$(if $(wildcard $(p)/*.py),-p headrace.$(p)))

format: .venv ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv model ## benchmarks, as ratios against a reference in the same run
	for name in dataprep_rate shard_encodings spark_overhead loader_rate seek_time loader_peers layouts interleaved kernel_rates kernel_parity answer_rates; do $(BIN)/python tests/benchmarks/$$name.py || exit 1; done

axolotl-fixtures: ## ask Axolotl again what it makes of the test cases, in an environment of its own
	$(PYTHON) tests/axolotl/make_fixtures.py

docs: .venv ## write docs/configuration.md and docs/migration.md from config models and tables
	$(BIN)/python -m headrace.jobs.tools.config_reference
	$(BIN)/python -m headrace.jobs.migration.migration_page

families: .venv ## write the parity table of docs/families.md
	PYTHONPATH=. $(BIN)/python tests/support/families_table.py

headrace.zip: .venv ## the sources, for spark-submit --py-files
	$(BIN)/python -m headrace.jobs.tools.spark_zip $@

model: $(MODEL)/config.json ## fetch the small real model

clean: ## remove everything that was built or fetched
	rm -rf .venv build dist headrace.zip models shards runs demo .mypy_cache .pytest_cache .ruff_cache *.egg-info

$(MODEL)/config.json: | .venv
	$(BIN)/python -m headrace.jobs.tools.fetch_demo_model --output $(MODEL)

.venv: .venv/stamp ## the environment

# Two steps, because DeepSpeed comes as source whose build imports torch. Its C++ ops are built when first used.
.venv/stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; run make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) pip setuptools wheel torch numpy
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --editable '.[all]'
	@touch $@

# mypy finds packages by folder, and the folders are not named headrace
build/ns/headrace:
	mkdir -p build/ns
	ln -sfn ../.. $@

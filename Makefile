# make run                 day 25's whole pipeline: raw images to a served, compressed model
# make run UNIT=day01_neural_network_from_scratch ARGS="--preset smoke"
# make test                the fast and the smoke tests (what CI runs);  make test TESTS="tests/test_data.py -k idx"
# make lint                ruff;   make docs   results into the README, units into notebooks;   make lock   new pins
# make kserve              the environment of the server that python -m serving.benchmark compares with
# make rl-benchmark        Stable-Baselines3's, which python -m models.rl.benchmark compares with (6 GB)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
UNIT   ?= day25_vision_pipeline
ARGS   ?=
TESTS  ?=

.PHONY: run test lint docs kserve rl-benchmark lock clean

run: $(VENV)/installed
	@$(VENV)/bin/python -m course.$(patsubst course.%,%,$(UNIT)) $(ARGS)

test: $(VENV)/installed
	@$(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/installed
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

docs: $(VENV)/installed
	@$(VENV)/bin/python -m course.core.report readme
	@$(VENV)/bin/python -m compression.report readme
	@$(VENV)/bin/python -m models.report readme
	@$(VENV)/bin/python -m colab.build

# The stamp is written last: an installation that was cut off is done again.
$(VENV)/installed: requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: Python 3.11 is needed and $(PYTHON) is not it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing the pinned packages into $(VENV) (3.8 GB, about two minutes, once)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --progress-bar off -r requirements.lock
	@touch $@

kserve: .venv-kserve/installed
rl-benchmark: .venv-sb3/installed

.venv-kserve/installed: serving/benchmark_kserve.txt
.venv-sb3/installed: models/rl/benchmark-requirements.txt
.venv-kserve/installed .venv-sb3/installed:
	@"$(PYTHON)" -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -r $<
	@touch $@

lock:
	@"$(PYTHON)" -m venv --clear build/lock
	@build/lock/bin/python -m pip install --quiet -r requirements-dev.txt
	@build/lock/bin/python -m pip install --quiet --no-deps tf-agents==0.19.0
	@{ head -1 requirements.lock; build/lock/bin/python -m pip freeze --exclude pip --exclude setuptools; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock && rm -r build/lock

clean:
	rm -rf $(VENV) .venv-kserve .venv-sb3 build

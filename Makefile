# Commands use .venv, made once. PYTHON=python3 uses that interpreter as it is and installs nothing.
ifneq ($(origin PYTHON),command line)
PYTHON = .venv/bin/python
VENV = .venv/made
endif

help:            ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)    ## train a small GPT for two minutes and show what it learned; DATA=file for your text
	$(PYTHON) -m fastgpt.commands.demo $(if $(DATA),--data $(DATA))

# as many processes as cores, where pytest-xdist is there
PARALLEL = $(shell $(PYTHON) -c 'import xdist; print("-n auto --dist worksteal")' 2> /dev/null)
test: $(VENV)    ## all tests but the slowest; CPU: Triton's interpreter, GPU: the compiled kernels
	$(PYTHON) -m pytest $(PARALLEL)

# the layers, the metadata and the links; what the model must be; a kernel each way
FAST = tests/test_packaging.py tests/docs/test_workflow.py tests/commands/test_devices.py \
	tests/model/test_golden.py tests/model/test_weights.py tests/decoding/test_sampling.py \
	tests/model/test_bad_input.py tests/kernels/test_gelu.py tests/kernels/test_layer_norm.py
test-fast: $(VENV) ## in under a minute, for while you work
	$(PYTHON) -m pytest $(PARALLEL) $(FAST)

test-slow: $(VENV) ## what `make test` leaves to CI: every page's commands, kernels of every GPU
	$(PYTHON) -m pytest $(PARALLEL) -m slow

test-deep: $(VENV) ## both, with 20 times the drawn cases, 200 training steps, a GPU session rehearsed
	FASTGPT_DEEP=1 $(PYTHON) -m pytest $(PARALLEL) -m ''

test-gpu: $(VENV) ## on a CUDA device, 8 minutes at most: kernels compiled, and what a CPU can't show
	$(PYTHON) -m tests.gpu

# again, with the same OUT, it goes on; RESUME=folder where the earlier call's files lie elsewhere
BUDGET ?= 540
OUT ?= out/gpu
gpu: $(VENV)     ## all that a GPU is needed for, most valuable first, BUDGET seconds a call
	$(PYTHON) -m bench.gpu --budget $(BUDGET) --out $(OUT) $(if $(RESUME),--resume $(RESUME)) $(ARGS)

test-versions:   ## the tests under every supported PyTorch and Triton, each in a venv of its own
	python3 -m tests.versions $(ARGS)

# a mutant that survives does not end it: that belongs in the report, which then fails
equivalence: $(VENV) ## docs/equivalence.md: errors against float64, and kernels broken on purpose
	-$(PYTHON) -m tests.mutants --out out/mutants.json
	$(PYTHON) -m tests.equivalence --mutants out/mutants.json

lint: $(VENV)    ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(VENV)   ## training and decoding on this machine, against what else users would run
	$(PYTHON) -m bench.train
	$(PYTHON) -m bench.decode --dtype float32 bfloat16

OPS = $(PYTHON) -m pytest bench/pytest_ops.py --benchmark-only -rs
bench-ops: $(VENV)     ## time every op against its peers and save that; ARGS="-k layer_norm"
	$(OPS) --benchmark-autosave $(ARGS)

bench-compare: $(VENV) ## fail if an op of fastgpt's is more than 3 % slower than when last saved
	$(OPS) -k fastgpt --benchmark-compare --benchmark-compare-fail=median:3% $(ARGS)

bench-report: $(VENV)  ## docs/performance.md, its pictures and the README's table, from the records
	$(PYTHON) -m bench.reports.document $(ARGS)

profile: $(VENV) ## where a training step's time goes, against the roofline; ARGS="--variant eager"
	$(PYTHON) -m bench.profiler $(ARGS)

.venv/made: setup.py constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e '.[dev,data,hf]'
	touch $@

.PHONY: help demo test test-fast test-slow test-deep test-gpu gpu test-versions equivalence lint bench bench-ops bench-compare bench-report profile

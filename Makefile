# Commands use .venv, made once. PYTHON=python3 uses that interpreter as it is and installs nothing.
ifneq ($(origin PYTHON),command line)
PYTHON = .venv/bin/python
VENV = .venv/made
endif

help:            ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)    ## train a small GPT for two minutes and show what it learned; DATA=file for your text
	$(PYTHON) -m fastgpt.demo $(if $(DATA),--data $(DATA))

test: $(VENV)    ## all tests; CPU: Triton's interpreter, GPU: the compiled kernels
	$(PYTHON) -m pytest

test-deep: $(VENV) ## the tests with 20 times the drawn cases and 200 training steps
	FASTGPT_DEEP=1 $(PYTHON) -m pytest

lint: $(VENV)    ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(VENV)   ## time training on this machine
	$(PYTHON) -m bench.train

.venv/made: setup.py constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e '.[dev,data,hf]'
	touch $@

.PHONY: help demo test test-deep lint bench

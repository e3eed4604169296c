# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKDIR ?= runs/quickstart
INSTALLED = $(VENV)/.installed
PARITY_INSTALLED = $(VENV)/.parity-installed
BROWSER_INSTALLED = $(VENV)/.browser-installed

ASSISTANT ?= runs/assistant
SEED ?= 0

.PHONY: quickstart assistant test test-parity test-slow test-browser check lock bench clean

quickstart: $(INSTALLED)  ## train, evaluate and sample a small language model, offline
	$(BIN)/llmlab train --config=experiments/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/llmlab sample --workdir=$(WORKDIR) --prompt=def --max_tokens=64

assistant: $(ASSISTANT)/.sft  ## pretrain, fine-tune, reward model, preferences: offline, a table at the end
	@# The last two need nothing of each other: together they leave fewer cores waiting.
	+$(MAKE) --no-print-directory --output-sync=line -j2 $(ASSISTANT)/.dpo $(ASSISTANT)/.reward
	$(BIN)/llmlab report --workdir=$(ASSISTANT)

# A stage that is done is not run again; one that was stopped goes on from its last checkpoint.
$(ASSISTANT)/.pretrain: | $(INSTALLED)
	$(call stage,pretrain,experiments/assistant/pretrain.py)

$(ASSISTANT)/.sft: $(ASSISTANT)/.pretrain
	$(call stage,sft,experiments/assistant/sft.py:$(ASSISTANT)/pretrain)

$(ASSISTANT)/.reward $(ASSISTANT)/.dpo: $(ASSISTANT)/.%: $(ASSISTANT)/.sft
	$(call stage,$*,experiments/assistant/$*.py:$(ASSISTANT)/sft)

define stage
$(BIN)/llmlab train --config=$(2) --workdir=$(ASSISTANT)/$(1) --config.run.seed=$(SEED)
$(BIN)/llmlab eval --workdir=$(ASSISTANT)/$(1)
touch $(ASSISTANT)/.$(1)
endef

test: $(INSTALLED) check  ## format, lint, types, and every test that takes seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-parity: $(PARITY_INSTALLED)  ## the same numbers as PyTorch, transformers, PEFT, TRL and lm_eval
	$(BIN)/python -m pytest -n 2 -m parity

test-slow: $(INSTALLED)  ## what takes minutes, kills processes or fills a disk
	$(BIN)/python -m pytest -m slow

test-browser: $(BROWSER_INSTALLED)  ## the chat page in Chromium; the trained assistant in it, where there is one
	LLMLAB_ASSISTANT=$(wildcard $(ASSISTANT)/dpo) $(BIN)/python -m pytest -m slow tests/test_serve_page.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(PARITY_INSTALLED)  ## our step and our decoding beside PyTorch's, fine-tuning beside TRL's, the engine, in one run
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/structured.py

lock:  ## writes requirements.lock anew from setup.cfg: versions and hashes, no addresses
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra test --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url --fork-strategy fewest --output-file requirements.lock setup.cfg

$(INSTALLED): requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmlab needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(PARITY_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check 'transformers>=5,<6'
	$(BIN)/pip install --quiet --disable-pip-version-check 'peft>=0.17,<1'
	$(BIN)/pip install --quiet --disable-pip-version-check 'trl>=1.16,<1.17'
	$(BIN)/pip install --quiet --disable-pip-version-check 'lm_eval[api]>=0.4.13,<0.4.14'
	touch $@

# A Chromium that is there already will do.
$(BROWSER_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check 'playwright>=1.50,<2'
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(BIN)/playwright install chromium
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info

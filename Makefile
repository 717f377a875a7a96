# Everything runs in .venv, made once with python3 and pip, and made anew when what it is made from changes.
#
# A machine without a GPU saves gigabytes with the CPU build of torch:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
RUN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/ready
	@echo "Searching for the smallest form of the starter that keeps 98 % of it, with proof, into demo/: about 5 minutes."
	$(RUN)/shrew shrink starter --keep 0.98 --heal 24 --coded --minutes 5 --out demo

test: .venv/ready
	$(RUN)/python -m pytest -n 2 --dist loadgroup

lint: .venv/ready
	$(RUN)/ruff check .
	$(RUN)/mypy

# CONTRIBUTING.md lists these and the others, which need more: prose, Chromium, other engines.
bench: .venv/ready .venv/llamacpp/ready
	$(RUN)/pip install --quiet -c constraints.txt -r benchmarks/requirements.txt
	$(RUN)/python benchmarks/train.py --records results/records.jsonl
	$(RUN)/python benchmarks/search.py --records results/records.jsonl
	$(RUN)/python benchmarks/gguf_check.py --python .venv/llamacpp/bin/python --records results/records.jsonl

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet --upgrade pip
	$(RUN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(RUN)/pip install --quiet -c constraints.txt -e '.[torch,data,compressed,onnx,gguf,serve,grammar,scan,dev]'
	@touch $@

# Builds llama.cpp: some 12 minutes of one core.
.venv/llamacpp/ready: .venv/ready benchmarks/requirements-llamacpp.txt
	$(PYTHON) -m venv .venv/llamacpp
	.venv/llamacpp/bin/pip install --quiet -r benchmarks/requirements-llamacpp.txt
	@touch $@

clean:
	rm -rf .venv build dist

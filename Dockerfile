# syntax=docker/dockerfile:1
# The GPU stack: CUDA, Python 3.11, the program with vLLM, and the versions that were tried together.
#
#   docker build -t selfdistill .
#   docker build -t selfdistill:unsloth --build-arg TRL_VERSION=1.14.2 --build-arg EXTRAS=vllm,quantization,unsloth .
#   docker run --rm --gpus all --ipc=host -v "$PWD":/workspace -v "$HOME/.cache/huggingface":/root/.cache/huggingface selfdistill
#
# unsloth patches TRL up to 1.15, so that its image has another TRL. With --build-arg GGUF=1 llama.cpp is compiled for
# export=gguf (10 minutes): export.llama_cpp=/opt/selfdistill/.venv-gguf.
ARG CUDA_VERSION=13.0.3
# The devel image has nvcc and a C compiler: Triton, FlashInfer and llama.cpp compile when they are first used.
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu22.04
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# bubblewrap is the sandbox of reward=python_tests; it also needs --security-opt seccomp=unconfined when the image is run.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential bubblewrap ca-certificates cmake git \
 && rm -rf /var/lib/apt/lists/*

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy UV_HTTP_TIMEOUT=300 \
    VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN uv venv --seed --python 3.11 /opt/venv

# torch's build on PyPI is the one for CUDA 13.
ARG TRL_VERSION=1.16.0
ARG EXTRAS=vllm,quantization
COPY . /opt/selfdistill
WORKDIR /opt/selfdistill
RUN uv pip install --no-cache \
    torch==2.13.0 \
    transformers==5.17.0 \
    "trl==${TRL_VERSION}" \
    peft==0.21.2 \
    datasets==4.8.5 \
    accelerate==1.15.0 \
    hydra-core==1.3.8 \
    omegaconf==2.3.1 \
    bitsandbytes==0.50.2 \
    ".[${EXTRAS}]"

ARG GGUF=0
RUN if [ "$GGUF" = 1 ]; then make gguf; fi

WORKDIR /workspace
CMD ["selfdistill", "doctor", "hardware=gpu_24gb"]

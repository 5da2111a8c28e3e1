# An image in which the README's commands work:
#
#     docker build -t nanovllm .                            # CUDA torch, for GPUs as well
#     docker build -t nanovllm --build-arg TORCH=cpu .      # CPU build of torch: a third of the size; needs PyTorch's own index
#     docker run --rm -it -v "$PWD/runs:/nanovllm/runs" nanovllm                    # make ablate
#     docker run --rm -it --gpus all --ipc host nanovllm make ablate PROFILE=h200   # with the NVIDIA container toolkit
#     docker run --rm nanovllm make test
#
# torch brings its own CUDA libraries; the host gives the driver alone.
ARG BASE=debian:trixie-slim
FROM ${BASE}

# g++ and python3-dev: torch.compile on a CPU, and Triton's launchers on a GPU, are compiled when they are first used.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ git make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /nanovllm
# What the set-up depends on comes first, so that a change of the code does not install everything again.
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY requirements requirements
COPY src/nanovllm/__init__.py src/nanovllm/
ARG TORCH=default
RUN PIP_NO_CACHE_DIR=1 make setup TORCH=${TORCH}

# .git as well: a record names the commit that it was made with.
COPY . .
RUN make setup
CMD ["make", "ablate"]

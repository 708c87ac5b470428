# A machine in which `make repro` runs:
#
#   docker build -t hermes-dpo .                                       for CPUs
#   docker build -t hermes-dpo:cuda --build-arg DEVICE=cuda .          for NVIDIA GPUs; the host needs driver 580 or newer
#   docker run -it hermes-dpo make repro
#   docker run -it --gpus all hermes-dpo:cuda make repro PROFILE=a40
#
# What a run makes stays in its container: docker cp CONTAINER:/home/hermes/hermes-dpo/reports .
ARG DEVICE=cpu

FROM python:3.11-slim-bookworm AS base-cpu

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS base-cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv && rm -rf /var/lib/apt/lists/* \
    # No driver is here while the image is built, and llama.cpp's CUDA build does not load without its library.
    && ln -s libcuda.so /usr/local/cuda/lib64/stubs/libcuda.so.1

# hadolint ignore=DL3006
FROM base-${DEVICE} AS tools
ARG DEVICE
# --build-arg PIP_EXTRA_INDEX_URL=... may name PyTorch's own index of CPU builds, which are several GB smaller.
ARG PIP_EXTRA_INDEX_URL
# An image moves between machines, so llama.cpp is compiled for no one CPU and no one GPU.
ENV DEVICE=${DEVICE} CMAKE_ARGS=-DGGML_NATIVE=off
RUN apt-get update && apt-get install -y --no-install-recommends build-essential ca-certificates git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash hermes \
    && install -d -o hermes -g hermes /home/hermes/hermes-dpo
USER hermes
WORKDIR /home/hermes/hermes-dpo

FROM tools
# Set-up reads these files alone, so that an edit of the code does not repeat it.
COPY --chown=hermes setup.sh requirements*.lock ./
RUN LD_LIBRARY_PATH="/usr/local/cuda/lib64/stubs:$LD_LIBRARY_PATH" ./setup.sh && rm -rf ~/.cache/pip ~/.cache/hermes-dpo
COPY --chown=hermes . .
CMD ["make"]

# The trainer, and an SGLang server in a separate environment; docs/container.md describes its use.
#
#   docker build -t megatron_rlvr .                                                    for GPUs
#   docker build -t megatron_rlvr:cpu --build-arg VARIANT=cpu --build-arg BASE_IMAGE=debian:bookworm-slim .
#   docker run --rm megatron_rlvr:cpu make test
#
# Layers that change seldom are first: a change of the code repeats the last copy only. Package indexes, proxies and
# certificates are passed as mounted files (secrets `pip`, `ca`, `apt`) and as the proxy variables that every builder
# knows; no layer contains them.

ARG VARIANT=gpu
# Ubuntu 24.04, Python 3.12, CUDA 13.3, NCCL 2.30.7, torch 2.13.0a0, Transformer Engine 2.17, apex, flash-attn.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3
# Not 1000, which is taken on Ubuntu.
ARG USER_ID=10001
# For the steps that install packages, not for the image. pip ignores the file if it is not mounted.
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_NO_CACHE_DIR=1

FROM ${BASE_IMAGE} AS base
USER root
ARG USER_ID
RUN useradd --create-home --uid ${USER_ID} --shell /bin/bash rlvr && \
    install --directory --owner rlvr --group rlvr /opt/megatron_rlvr
WORKDIR /opt/megatron_rlvr
ENV VENV=/opt/venv


# CPU variant: the same scripts as without a container.
FROM base AS cpu
ARG PIP_CONFIG_FILE
ARG PIP_NO_CACHE_DIR
RUN --mount=type=secret,id=apt,target=/etc/apt/apt.conf.d/99secret \
    apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        ca-certificates make python3 python3-venv >/dev/null && \
    rm -rf /var/lib/apt/lists/*
COPY tools/install_sglang_cpu.sh tools/sglang.txt tools/
COPY tools/sglang_cpu tools/sglang_cpu
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    tools/install_sglang_cpu.sh /opt/sglang
ENV SGLANG_CPU_VENV=/opt/sglang
COPY requirements.txt setup.py pyproject.toml ./
COPY tools/install.sh tools/
# The package is installed as a link to this folder, into which its code is copied last. This file has its version.
COPY megatron_rlvr/__init__.py megatron_rlvr/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    touch README.md && \
    tools/install.sh ${VENV} && \
    rm -rf /opt/megatron_rlvr/*


# GPU variant: torch, and the packages compiled for it, are those of the base image.
FROM base AS gpu
ARG PIP_CONFIG_FILE
ARG PIP_NO_CACHE_DIR
COPY tools/sglang.txt tools/
COPY tools/sglang_gpu/requirements.txt tools/sglang_gpu/
# The server gets its own torch. NCCL does not connect processes of different versions, so weights could not be sent.
# The environment has no pip, because the image's Python may lack ensurepip; the image's own pip installs into it.
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    set -eu; unset PIP_CONSTRAINT; \
    nccl=$(sed -n 's/^nvidia-nccl-cu.*==//p' tools/sglang_gpu/requirements.txt); \
    image=${NCCL_VERSION:-$nccl}; \
    if [ "${image%%[-+]*}" != "$nccl" ]; then \
        echo "BASE_IMAGE has NCCL $NCCL_VERSION and SGLang needs $nccl; choose a BASE_IMAGE with $nccl" >&2; exit 1; \
    fi; \
    python3 -m venv --without-pip /opt/sglang; \
    python3 -m pip --python /opt/sglang/bin/python install --quiet --requirement tools/sglang_gpu/requirements.txt
COPY requirements.txt setup.py pyproject.toml ./
COPY tools/install.sh tools/
# The environment extends the image's Python by the packages that it lacks. Packages compiled for the image's torch are
# neither replaced nor hidden. The file .installed makes tools/install.sh do nothing.
COPY megatron_rlvr/__init__.py megatron_rlvr/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    set -eu; kept='(torch|torchvision|triton|pytorch-triton|transformer[-_]engine.*|apex|flash[-_]attn|numpy)=='; \
    touch README.md; \
    python3 -m venv --system-site-packages --without-pip ${VENV}; \
    python3 -m pip list --format=freeze | grep -E "^$kept" >${VENV}/image.txt || \
        { echo "BASE_IMAGE has no torch; choose one of NVIDIA's PyTorch images, or VARIANT=cpu" >&2; exit 1; }; \
    grep -vE "^$kept" requirements.txt >${VENV}/requirements.txt; \
    export PIP_CONSTRAINT=${VENV}/image.txt; \
    ${VENV}/bin/python -m pip install --quiet --requirement ${VENV}/requirements.txt; \
    ${VENV}/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .; \
    ${VENV}/bin/python -m pip list --format=freeze | grep -E "^$kept" | diff ${VENV}/image.txt -; \
    printf '#!/bin/sh\nexec %s -m torch.distributed.run "$@"\n' ${VENV}/bin/python >${VENV}/bin/torchrun; \
    chmod +x ${VENV}/bin/torchrun; \
    cat requirements.txt setup.py tools/install.sh | cksum >${VENV}/.installed; \
    rm -rf /opt/megatron_rlvr/*
# NVIDIA's image enables TF32, with which float32 matrix products lose 13 bits that log-probabilities and entropies need.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0


FROM ${VARIANT} AS complete
# For tools/serve.py --python: runs the server with its own libraries, not with those of the image's torch.
RUN printf '%s\n' '#!/bin/sh' \
    'LD_LIBRARY_PATH=$(printf %s "${LD_LIBRARY_PATH:-}" | tr : "\n" | grep -v -- -packages/ | paste -sd:)' \
    'export LD_LIBRARY_PATH' 'exec /opt/sglang/bin/python "$@"' >/usr/local/bin/sglang-python && \
    chmod +x /usr/local/bin/sglang-python
ENV PATH=${VENV}/bin:${PATH}
COPY --chown=rlvr:rlvr . .
ARG USER_ID
USER ${USER_ID}
# Fails if anything is not installed yet: this user cannot write to either environment.
RUN make install
ARG SOURCE=unknown
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.title="megatron_rlvr" \
      org.opencontainers.image.description="Reinforcement learning with verifiable rewards on megatron-core" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"
CMD ["python", "-m", "megatron_rlvr.train", "--help"]

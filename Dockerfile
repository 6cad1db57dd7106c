# syntax=docker/dockerfile:1
# jaxtune for a TPU host (EXTRA=tpu,gcs) or a host with NVIDIA GPUs (EXTRA=cuda, or cuda,gcs or cuda,s3
# where paths are in a store).
#
#   docker build --platform linux/amd64 -t jaxtune:tpu .
#   docker build --platform linux/amd64 --build-arg EXTRA=cuda -t jaxtune:cuda .
#   docker run --rm --privileged --network host -v "$PWD:/work" jaxtune:tpu train --config C ...   # TPU VM
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" jaxtune:cuda train --config C ...     # GPUs
#
# It runs as user 1000. Where $PWD belongs to another: --user "$(id -u):$(id -g)" -e HOME=/work, for what
# is fetched and compiled is kept under HOME/.cache, and a user without a name has the root folder for a home.
#
# The same base serves both: the wheels bring libtpu, or CUDA, cuDNN and NCCL; a GPU host needs its
# driver and the NVIDIA container toolkit only.
FROM python:3.12-slim-bookworm

ARG EXTRA=tpu,gcs
# Read by the NVIDIA container toolkit, by nobody else.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy

RUN pip install --no-cache-dir uv==0.13.9

COPY pyproject.toml README.md LICENSE /opt/jaxtune/
COPY jaxtune /opt/jaxtune/jaxtune
# Tokens come with `docker run -e HF_TOKEN`, or a Kubernetes Secret; never while building, where they
# would stay in a layer.
RUN uv pip install --system --no-cache "/opt/jaxtune[${EXTRA}]"
COPY configs /opt/jaxtune/configs

# A person's rights are enough. On a TPU VM the devices belong to root: add `--user 0` there if
# opening /dev/accel* or /dev/vfio is refused.
RUN useradd --create-home --uid 1000 jaxtune && mkdir /work && chown jaxtune /work
USER 1000
WORKDIR /work
ENTRYPOINT ["jaxtune"]
CMD ["--help"]

# Trains on a GPU host:
#   docker build -t sparse-tx .
#   docker run --gpus all --shm-size 8g -v "$PWD/data:/app/data" -v "$PWD/outputs:/app/outputs" sparse-tx \
#       train experiment=cifar10_strided
# What the image can do on this host, GPU included:
#   docker run --gpus all sparse-tx doctor
# The wheels of torch carry CUDA and Triton; the host gives the driver alone. A C compiler is needed by Triton.
FROM python:3.12-slim

# The base image's release fixes the versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# Gigabytes that change with the lock alone: before the code, so that a change of it builds in seconds.
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY sparse_tx sparse_tx
COPY train.py evaluate.py sample.py ./
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && pip check

RUN useradd --create-home --uid 1000 trainer && mkdir -p data outputs && chown trainer data outputs
USER 1000
ENTRYPOINT ["sparse-tx"]
CMD ["train"]

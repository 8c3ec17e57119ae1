# Headrace with the versions of constraints.txt, for NVIDIA GPUs (PyTorch brings CUDA; the host its driver).
#   docker build -t headrace .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" headrace train train.toml
FROM python:3.11-slim

# Triton and DeepSpeed compile with g++ when they first run; git for revisions of models
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/headrace
COPY constraints.txt ./
# first, because DeepSpeed comes as source whose build imports torch
RUN pip install --no-cache-dir -c constraints.txt pip setuptools wheel torch numpy

COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY dataprep dataprep
COPY kernels kernels
COPY trainer trainer
COPY jobs jobs
RUN DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation -c constraints.txt \
    '.[train,optimizers,remote,reporting,documents,images,fast,serve,quantize,convert]'

WORKDIR /data
ENTRYPOINT ["headrace"]
CMD ["--help"]

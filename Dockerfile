# fastjax with JAX's CUDA libraries; the host brings the driver and the NVIDIA
# container toolkit. docs/windows_and_containers.md says how to run it.
FROM python:3.12-slim

ARG CUDA=cuda13
ENV HOME=/cache \
    HF_HOME=/cache/huggingface \
    FASTJAX_CACHE=/cache/fastjax \
    PYTHONUNBUFFERED=1

WORKDIR /opt/fastjax
COPY pyproject.toml constraints.txt README.md ./
COPY kernels kernels
COPY fastjax fastjax
COPY conversions conversions
RUN pip install --no-cache-dir --constraint constraints.txt ".[$CUDA]"

# Any user may write the cache, so that results can belong to the one who starts it.
RUN install -d -m 1777 /cache
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["fastjax"]
CMD ["doctor"]

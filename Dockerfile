# The server in a container. Engines are compiled for the device that is there, once, and live in a volume.
# NVIDIA GPUs (driver 580 or newer on the host; EXTRAS="cuda rtx" for GeForce and RTX cards):
#   docker build -t driffusion .
#   docker run --rm --gpus all -v engines:/engines driffusion python -m engines build --devices auto --build /engines
#   docker run --gpus all -v engines:/engines -p 127.0.0.1:8000:8000 --stop-timeout 70 driffusion
# Processor cores:
#   docker build -t driffusion:cpu --build-arg BASE=ubuntu:24.04 --build-arg EXTRAS=cpu --build-arg DEVICES=cpu .
#   docker run --rm -v engines:/engines driffusion:cpu python -m engines build --devices auto --build /engines
#   docker run --read-only --tmpfs /tmp -v engines:/engines -p 127.0.0.1:8000:8000 --stop-timeout 70 driffusion:cpu
# Other models: export them with `make engines MODEL=…` and put build/MODEL into the volume.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE} AS python
ARG PYTHON=python3.12
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "${PYTHON}=3.*" "${PYTHON}-venv=3.*" \
    && rm -rf /var/lib/apt/lists/* \
    && "${PYTHON}" -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

# the pins of pyproject.toml alone: these layers are made again when they change, not when the code does
FROM python AS pins
WORKDIR /pins
COPY pyproject.toml .
ENV PINS="import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [pin for name in sys.argv[1:] for pin in project['optional-dependencies'][name]]; \
print(*project['dependencies'], *extras, sep='\\n')"

# the embedded model as ONNX, by PyTorch for processors; nothing else of this stage is kept
FROM pins AS export
ARG DEVICES=cuda:0
RUN python -c "${PINS}" cpu export > requirements.txt \
    && pip install --extra-index-url https://download.pytorch.org/whl/cpu --requirement requirements.txt
WORKDIR /app
COPY engines engines
COPY runtime runtime
COPY export export
RUN python -m export shapes --devices "${DEVICES}"

FROM pins AS install
ARG EXTRAS="cuda trt"
# shellcheck disable=SC2086 # several words
RUN python -c "${PINS}" ${EXTRAS} > requirements.txt \
    && pip install --extra-index-url https://pypi.nvidia.com --requirement requirements.txt

FROM python AS server
RUN useradd --uid 10001 --create-home driffusion \
    && install --directory --owner driffusion /engines
COPY --from=install /opt/venv /opt/venv
COPY --from=export --chown=driffusion /app/build /engines
WORKDIR /app
COPY kernels kernels
COPY engines engines
COPY runtime runtime
COPY bench/__init__.py bench/floor.py bench/statistics.py bench/torch_lane.py bench/
COPY bench/gpu bench/gpu
ENV XDG_CACHE_HOME=/engines/.cache PYTHONUNBUFFERED=1
USER 10001
VOLUME /engines
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=9)"]
CMD ["python", "-m", "runtime.serve", "--host", "0.0.0.0", "--port", "8000", "--devices", "auto", "--build", "/engines"]

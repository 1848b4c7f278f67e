# The server for NVIDIA GPUs. Engines are compiled for the card that is there, so they live in a volume:
#   docker build -t driffusion .                         (--build-arg TENSORRT=rtx for GeForce and RTX cards)
#   docker run --rm --gpus all -v engines:/engines driffusion python -m engines build --devices auto --build /engines
#   docker run --gpus all -v engines:/engines -p 127.0.0.1:8000:8000 --stop-timeout 70 driffusion
# Driver 580 or newer on the host. Other models: export them with `make engines MODEL=…` and put build/MODEL into the volume.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12=3.12.* python3.12-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

# the pins of pyproject.toml alone: these layers are made again when they change, not when the code does
FROM python AS pins
WORKDIR /pins
COPY pyproject.toml .
ENV PINS="import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [pin for name in sys.argv[1:] for pin in project['optional-dependencies'][name]]; \
print(*project['dependencies'], *extras, sep='\\n')"

# the embedded model as ONNX in fp16, by PyTorch for processors; nothing else of this stage is kept
FROM pins AS export
RUN python -c "${PINS}" cpu export > requirements.txt \
    && pip install --extra-index-url https://download.pytorch.org/whl/cpu --requirement requirements.txt
WORKDIR /app
COPY engines engines
COPY runtime runtime
COPY export export
RUN python -m export shapes --devices cuda:0

FROM pins AS install
ARG TENSORRT=trt
RUN python -c "${PINS}" cuda "${TENSORRT}" > requirements.txt \
    && pip install --extra-index-url https://pypi.nvidia.com --requirement requirements.txt

FROM python AS server
RUN useradd --uid 10001 --create-home driffusion \
    && install --directory --owner driffusion /engines
COPY --from=install /opt/venv /opt/venv
COPY --from=export --chown=driffusion /app/build/shapes-fp16 /engines/shapes-fp16
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

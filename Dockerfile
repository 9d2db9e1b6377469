# flowreel with all that it uses of an NVIDIA GPU: torch for CUDA, our kernels, and NVDEC.
#
#   docker build -t flowreel .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/data" flowreel run dance.mp4
#   docker run --rm --gpus all flowreel doctor --gpu
#
# It has been linted, but not been built nor run yet. The host needs a driver of CUDA 13 and NVIDIA's container toolkit.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Ubuntu keeps only the newest build of a package: a pinned one would be gone in a month.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /flowreel
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY sinks sinks
# The constraints fit a torch for the CPU; one for CUDA itself says which builds of NVIDIA's packages it takes.
RUN grep --invert-match --extended-regexp '^(nvidia|cuda)-' constraints.txt > /tmp/constraints.txt \
    && python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt '.[cuda]' \
    && rm /tmp/constraints.txt

# Not the root user. Any other (--user) may run it too, without a home: kernels and downloaded weights are kept where all
# may write, and so is CuPy's cache, without which it does not load.
RUN useradd --uid 10001 --create-home flowreel \
    && mkdir --mode 1777 /cache /cache/cupy \
    && install --directory --owner flowreel /data

# video: without it a container gets neither libnvcuvid nor libnvidia-encode, and NVDEC cannot be used.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    XDG_CACHE_HOME=/cache \
    CUPY_CACHE_DIR=/cache/cupy \
    PATH=/venv/bin:$PATH

USER 10001
WORKDIR /data
ENTRYPOINT ["flowreel"]
CMD ["--help"]

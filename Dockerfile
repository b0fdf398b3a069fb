# The program with all that training needs, for a machine with NVIDIA GPUs (or with --build-arg EXTRA=... other ones):
#
#   docker build --build-arg EXTRA=cuda12 -t omnistream-jax .
#   docker run --gpus=all -v /data:/data -v "$PWD/runs:/work/runs" omnistream-jax --config=configs/pretrain.py
#
# EXTRA: cuda12, cuda13, tpu, or cpu. The CUDA libraries come with JAX's packages; the host needs only the driver and
# the NVIDIA container toolkit. /work/runs must be writable for the user 1000.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRA=cuda12
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 omnistream \
    && mkdir -p /work/runs \
    && chown -R omnistream:omnistream /work
WORKDIR /work

# The dependencies have a layer of their own: a change of the program does not install them anew.
COPY setup.py ./
# hadolint ignore=DL3013
RUN mkdir omnistream_jax && touch omnistream_jax/__init__.py LICENSE NOTICE README.md \
    && extras="data,hf" && if [ "$EXTRA" != "cpu" ]; then extras="$extras,$EXTRA"; fi \
    && pip install ".[$extras]" \
    && pip uninstall --yes omnistream_jax

COPY --chown=omnistream:omnistream setup.py LICENSE NOTICE README.md ./
COPY --chown=omnistream:omnistream omnistream_jax omnistream_jax
COPY --chown=omnistream:omnistream configs configs
RUN pip install --no-deps --editable .

USER 1000
# SIGTERM reaches the program itself: it saves, and ends with the status to start it again.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "omnistream_jax.main"]
CMD ["--config=configs/pretrain.py"]

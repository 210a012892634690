# docker build -t gddim .                                                    CPU
# docker build -t gddim --build-arg ACCELERATOR=cuda .                       NVIDIA GPUs: docker run --gpus all …
# docker build -t gddim --build-arg ACCELERATOR=tpu --build-arg EXTRAS=gcs . TPUs: docker run --privileged --network host --user root …
#                                        (the TPU's device files are root's, and its driver locks memory)
# mkdir -p runs      # Docker would make it root's; user 1000 must be able to write there (another: --user "$(id -u)")
# docker run --init -v "$PWD/runs:/srv/gddim/runs" gddim                          the main job, experiments.cld_digits
# docker run --init -v "$PWD/runs:/srv/gddim/runs" gddim python -m experiments.points
FROM python:3.12.12-slim-bookworm

# The folder that a user mounts over belongs to user 1000; the program itself to root.
RUN useradd --uid 1000 --create-home gddim && mkdir -p /srv/gddim/runs && chown -R 1000 /srv/gddim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/opt/gddim MPLCONFIGDIR=/tmp

# What changes seldom comes first: the dependencies are installed again only when they themselves change.
ARG ACCELERATOR=cpu
ARG EXTRAS=
COPY pyproject.toml infra/constraints.txt infra/requirements.py /tmp/
RUN python /tmp/requirements.py /tmp/pyproject.toml "$ACCELERATOR" "$EXTRAS" >/tmp/requirements.txt \
    && pip install -c /tmp/constraints.txt -r /tmp/requirements.txt

COPY gddim /opt/gddim/gddim
COPY experiments /opt/gddim/experiments

USER 1000
WORKDIR /srv/gddim
CMD ["python", "-m", "experiments.cld_digits"]

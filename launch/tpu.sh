#!/usr/bin/env bash
# One run on a slice of Cloud TPU, all of its hosts at once, with gcloud:
#
#   launch/tpu.sh create  NAME ZONE TYPE [gcloud's options, as --spot]   v5litepod-256, v6e-64, ...; waits for it
#   launch/tpu.sh install NAME ZONE                                      this checkout, with the extra tpu, on all hosts
#   launch/tpu.sh run     NAME ZONE -- --config=configs/pretrain.py:stage1 --workdir=/data/runs/stage1 [...]
#   launch/tpu.sh delete  NAME ZONE
#
# The hosts find each other by the TPU's own services. DIR and the data must be a file system that all hosts share
# (Filestore, or a disk that is mounted on all). `run` ends with a status of its own where a host's did:
# 0 done, 2 a wrong configuration, else run it again: it goes on from the last checkpoint. RUNTIME chooses the image.
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 3 ] || usage
action=$1 name=$2 zone=$3
shift 3
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

on_all_hosts() { # runs a command on every host of the slice
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case $action in
    create)
        [ $# -ge 1 ] || usage
        accelerator=$1
        shift
        case $accelerator in
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            *) runtime=tpu-ubuntu2204-base ;;
        esac
        gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$accelerator" \
            --version="${RUNTIME:-$runtime}" "$@"
        ;;
    install)
        archive=$(mktemp --suffix=.tar.gz)
        trap 'rm -f "$archive"' EXIT
        tar --create --gzip --file="$archive" --directory="$repository" --exclude=__pycache__ \
            setup.py README.md LICENSE NOTICE configs omnistream_jax
        gcloud compute tpus tpu-vm scp "$archive" "$name:omnistream_jax.tar.gz" --zone="$zone" --worker=all
        on_all_hosts 'set -e
            mkdir -p omnistream && tar --extract --gzip --file=omnistream_jax.tar.gz --directory=omnistream
            cd omnistream
            if [ ! -d .venv ]; then # the images are Ubuntu 22.04, whose own Python is too old
                python3.11 -m venv .venv || { sudo apt-get update && sudo apt-get install --yes python3.11-venv
                    python3.11 -m venv --clear .venv; }
            fi
            .venv/bin/pip install --quiet --editable ".[tpu,data,hf]"'
        ;;
    run)
        [ $# -ge 2 ] && [ "$1" = "--" ] || usage
        shift
        printf -v arguments '%q ' "$@"
        on_all_hosts "cd omnistream && exec .venv/bin/python -u -m omnistream_jax.main $arguments"
        ;;
    delete)
        gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet
        ;;
    *) usage ;;
esac

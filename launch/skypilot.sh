#!/usr/bin/env bash
# Run a whole recipe as a managed job of SkyPilot (launch/skypilot.yaml): on the cloud with machines to be had, again
# from the newest checkpoint when a spot machine is taken away, and with nothing left behind at the end. This checkout
# is copied to the machines; MODEL_DIR must be a bucket.
#
#   launch/skypilot.sh RECIPE MODEL_DIR [settings] [flags of `pit-jax pipeline`]
#   launch/skypilot.sh hh_rlhf_1b gs://bucket/hh_1b --sky=--gpus=H100:8 --sky=--use-spot --gin_file=meshes/gpu_8.gin
#   launch/skypilot.sh hh_rlhf_1b gs://bucket/hh_1b --extra=tpu --sky=--gpus=tpu-v5p-8 --gin_file=meshes/fsdp.gin
#
#   --name=NAME    of the job (default: pit-jax)
#   --extra=EXTRA  what to install with pit_jax: cuda (default) or tpu
#   --sky=FLAG     a flag of `sky jobs launch`, such as --sky=--num-nodes=2 or --sky=--infra=gcp; may be repeated
#   --dry-run      print the command without running it
# Ctrl-C leaves the job running: `sky jobs logs` shows it again, `sky jobs cancel --name NAME` ends it.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

name=pit-jax extra=cuda more=()
setting() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --extra=*) extra=${1#*=} ;;
    --sky=*) more+=("${1#*=}") ;;
    *) return 1 ;;
  esac
}
parse "$0" "$@"
pipeline_line pit-jax
run sky jobs launch --yes --name="$name" --workdir="$(dirname "$here")" --env="PIT_JAX_EXTRA=$extra" \
  --env="PIT_JAX_LINE=$(quote "${line[@]}")" ${more[@]+"${more[@]}"} "$here/skypilot.yaml"

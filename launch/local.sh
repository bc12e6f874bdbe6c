#!/bin/sh
# Run a whole recipe on this machine: on its accelerators if jax finds some, otherwise on the CPU.
#
#   launch/local.sh RECIPE MODEL_DIR [--dry-run] [flags of `pit-jax pipeline`]
#   launch/local.sh demo runs/demo --gin.RANDOM_SEED=2
#   launch/local.sh hh_rlhf_1b runs/hh_1b --gin_file=meshes/fsdp_tensor_4.gin --gin.TOKENIZER="'tokenizer.model'" ...
#
# RECIPE is a name in gin/recipes or a gin file. The same command again continues an interrupted run.
# --dry-run prints the command without running it. PIT_JAX names the program (default: .venv/bin/pit-jax, else pit-jax).
set -eu

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
  exit "$1"
}

case "${1-}" in
  -h | --help) usage 0 ;;
esac
[ "$#" -ge 2 ] || usage 2 >&2

recipe=$1 directory=$2
shift 2
case "$recipe" in
  *.gin) ;;
  *) recipe=recipes/$recipe.gin ;;
esac

# Move every flag but --dry-run to the end, so that what is left are pipeline's own, with their quotes intact.
dry=
count=$#
while [ "$count" -gt 0 ]; do
  if [ "$1" = --dry-run ]; then dry=1; else set -- "$@" "$1"; fi
  shift
  count=$((count - 1))
done

here=$(cd "$(dirname "$0")/.." && pwd)
program=${PIT_JAX-}
if [ -z "$program" ]; then
  program=pit-jax
  [ ! -x "$here/.venv/bin/pit-jax" ] || program=$here/.venv/bin/pit-jax
fi

set -- "$program" pipeline "--gin_file=$recipe" "--gin.MODEL_DIR='$directory'" "$@"
if [ -n "$dry" ]; then
  printf '%s\n' "$@"
else
  exec "$@"
fi

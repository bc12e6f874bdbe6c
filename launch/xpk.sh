#!/usr/bin/env bash
# Run a whole recipe on TPU slices (or GPU nodes) of a GKE cluster that XPK has made, and show the log of process 0.
# The image has pit_jax[tpu] in it (launch/Dockerfile), MODEL_DIR is a bucket (gs://...).
#
#   launch/xpk.sh RECIPE MODEL_DIR --cluster=C --name=NAME --image=IMAGE --type=TYPE [settings] [flags of the pipeline]
#   launch/xpk.sh hh_rlhf_1b gs://bucket/hh_1b --cluster=tpus --name=pit --image=us-docker.pkg.dev/project/repo/pit_jax \
#     --type=v5p-128 --gin_file=meshes/v5p_4x4x4.gin
#
#   --cluster=C      that `xpk cluster create` has made;   --zone=ZONE   --project=PROJECT   of it
#   --name=NAME      of the workload
#   --image=IMAGE    container image
#   --type=TYPE      as XPK calls it: v5litepod-16, v5p-128, v6e-256, h100-mega-80gb-8 ...
#   --slices=N       so many slices as one job (default: 1)
#   --xpk=FLAG       a further flag of `xpk workload create`, such as --xpk=--priority=high; may be repeated
#   --tries=N        restarts before giving up (default: 5); XPK restarts after 143 and 128 to 255, and 75 (a lost host)
#   --delete         delete the workload at the end, also after Ctrl-C; without it Ctrl-C leaves the job running
#   --dry-run        print the commands without running them
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

cluster='' name='' image='' type='' slices=1 delete='' place=() more=()
setting() {
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=* | --project=*) place+=("$1") ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=$(number "$1") ;;
    --xpk=*) more+=("${1#*=}") ;;
    --delete) delete=1 ;;
    *) return 1 ;;
  esac
}
parse "$0" "$@"
[ -n "$cluster" ] && [ -n "$name" ] && [ -n "$image" ] && [ -n "$type" ] ||
  die "--cluster, --name, --image and --type are needed (--help says more)"
case $type in
  v[0-9]* | tpu*) device=--tpu-type=$type count=--num-slices=$slices ;;
  *) device=--device-type=$type count=--num-nodes=$slices ;;
esac

pipeline_line pit-jax
# `exec`: XPK passes SIGTERM to the shell around the command, which would not hand it on.
command="exec $(quote "${line[@]}")"
case $command in
  *$'\n'*) die "XPK writes the command into one line of YAML: no word may hold a line break" ;;
esac

remove() { run xpk workload delete --cluster="$cluster" --workload="$name" ${place[@]+"${place[@]}"} --force; }
leave_job "workload $name" "this ends it"

run xpk workload create --cluster="$cluster" --workload="$name" "$device" "$count" --docker-image="$image" \
  --max-restarts="$tries" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
  ${place[@]+"${place[@]}"} ${more[@]+"${more[@]}"} --command="$command"
[ -n "$dry" ] || follow_jobset default "$name"

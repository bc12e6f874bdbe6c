#!/usr/bin/env bash
# Run a whole recipe on TPU slices of a GKE cluster, as a JobSet (launch/jobset.yaml), and show the log of process 0.
# kubectl must point to the cluster, which needs the JobSet controller, and node pools of the topology, one a slice.
# The image has pit_jax[tpu] in it (launch/Dockerfile), MODEL_DIR is a bucket (gs://...).
#
#   launch/jobset.sh RECIPE MODEL_DIR --name=NAME --image=IMAGE --topology=v5p:4x4x4 [settings] [flags of the pipeline]
#   launch/jobset.sh hh_rlhf_1b gs://bucket/hh_1b --name=pit --image=us-docker.pkg.dev/project/repo/pit_jax \
#     --topology=v6e:4x4 --gin_file=meshes/fsdp.gin
#
#   --name=NAME       of the JobSet; one of this name that still runs is followed, one that has ended is replaced
#   --image=IMAGE     container image
#   --topology=T      v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4, as in `pit-jax plan --topology`
#   --slices=N        so many slices as one job (default: 1)
#   --chips=N         chips a host (default: 4, or all of a smaller slice)
#   --namespace=NS    (default: default);   --queue=QUEUE   of Kueue
#   --spot            on spot nodes
#   --tries=N         restarts before giving up (default: 5)
#   --delete          delete the JobSet at the end, also after Ctrl-C; without it Ctrl-C leaves the job running
#   --dry-run         print the commands without running them
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

name='' image='' topology='' slices=1 chips='' space=default queue='' spot='' delete=''
setting() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) slices=$(number "$1") ;;
    --chips=*) chips=$(number "$1") ;;
    --namespace=*) space=${1#*=} ;;
    --queue=*) queue=${1#*=} ;;
    --spot) spot=', "cloud.google.com/gke-spot": "true"' ;;
    --delete) delete=1 ;;
    *) return 1 ;;
  esac
}
parse "$0" "$@"
[ -n "$name" ] && [ -n "$image" ] && [ -n "$topology" ] ||
  die "--name, --image and --topology are needed (--help says more)"

shape=${topology#*:}
case ${topology%%:*} in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  tpu7x) accelerator=tpu7x ;;
  *) die "--topology=$topology: write v4, v5e, v5p, v6e or tpu7x, a colon and the shape, such as v5p:4x4x4" ;;
esac
case $shape in
  '' | *[!0-9x]* | x* | *x | *xx*) die "--topology=$topology: the shape must be numbers with x between, such as 4x4x4" ;;
esac
total=$((${shape//x/*}))
[ -n "$chips" ] || chips=$((total < 4 ? total : 4))
[ $((total % chips)) -eq 0 ] || die "--chips=$chips does not divide the $total chips of --topology=$topology"

# A word as a JSON string, which YAML takes too. The point keeps line breaks at the end.
json() {
  local text
  text=$(printf '%s.' "$1" | sed -e 's/[\\"]/\\&/g' -e "s/$(printf '\t')/\\\\t/g" |
    awk 'NR > 1 { printf "\\n" } { printf "%s", $0 }')
  printf '"%s"\n' "${text%.}"
}

# The text that stands for a placeholder goes into sed, where \ & and | mean something.
fill() { printf 's|%s|%s|g\n' "\${$1}" "$(printf '%s' "$2" | sed 's/[\\&|]/\\&/g')"; }

manifest() {
  local args='' labels='' word
  # Kubernetes puts variables in the place of $(NAME), and one $ in that of $$.
  for word in "${line[@]:1}"; do args="$args${args:+, }$(json "${word//\$/\$\$}")"; done
  [ -z "$queue" ] || labels="\"kueue.x-k8s.io/queue-name\": $(json "$queue")"
  sed -e '/^#/d' -e "$(
    fill NAME "$name"
    fill LABELS "$labels"
    fill TRIES "$tries"
    fill SLICES "$slices"
    fill HOSTS $((total / chips))
    fill ACCELERATOR "$accelerator"
    fill TOPOLOGY "$shape"
    fill SPOT "$spot"
    fill IMAGE "$image"
    fill CHIPS "$chips"
    fill ARGS "$args"
  )" "$here/jobset.yaml"
}

kube=(kubectl --namespace="$space")
remove() { run "${kube[@]}" delete jobset "$name" --ignore-not-found; }

pipeline_line pit-jax
if [ -n "$dry" ]; then
  run "${kube[@]}" get jobset "$name" --output='jsonpath={.status.terminalState}'
  printf '%s <<'\''MANIFEST'\''\n%s\nMANIFEST\n' "$(quote "${kube[@]}" create --filename=-)" "$(manifest)"
  [ -z "$delete" ] || remove
  exit
fi
leave_job "JobSet $name" "this command follows it again, and this one ends it"

if state=$("${kube[@]}" get jobset "$name" --output='jsonpath={.status.terminalState}' 2>/dev/null) && [ -z "$state" ]; then
  say "the JobSet $name is there, and is followed"
else
  remove
  manifest | "${kube[@]}" create --filename=-
fi
follow_jobset "$space" "$name"

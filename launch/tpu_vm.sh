#!/usr/bin/env bash
# Run a whole recipe on Cloud TPU VMs (v2 to v6e): asks for them through a queue, or uses those that are there, installs
# this checkout on all workers, runs the same line on each, shows the log of process 0, and starts again from the newest
# checkpoint after a preemption. MODEL_DIR must be a bucket (gs://...), and the data, tokenizer and models in one too.
#
#   launch/tpu_vm.sh RECIPE MODEL_DIR --name=NAME --zone=ZONE --type=TYPE [settings] [flags of `pit-jax pipeline`]
#   launch/tpu_vm.sh hh_rlhf_1b gs://bucket/hh_1b --name=pit --zone=us-east5-a --type=v5p-128 --spot --delete \
#     --gin_file=meshes/v5p_4x4x4.gin
#
#   --name=NAME      of the queued resource; it is used if it is there, and made if not
#   --zone=ZONE      such as us-east5-a;   --project=PROJECT   (default: gcloud's own settings)
#   --type=TYPE      v4-32, v5litepod-16, v5p-128 (64 chips), v6e-256 ...: v4 and v5p count cores, v5e and v6e chips
#   --slices=N       so many of them as one job (default: 1)
#   --version=IMAGE  runtime version (default: by type)
#   --spot           cheaper, and taken away at any moment;   --reserved   from a reservation
#   --vm             a plain TPU VM instead of a queued resource
#   --with=PATH      copy a file or folder into the working directory of every host; may be repeated
#   --delete         delete the machines at the end, however it comes (also Ctrl-C)
#   --tries=N        short attempts in a row before giving up (default: 5);   --backoff=SECONDS (default: 10)
#   --dry-run        print the commands without running them
# Without --delete the machines stay, and cost, until you delete them: the last line says how.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

name='' zone='' project='' type='' slices=1 image='' queue=1 delete='' tier=() with=()
setting() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=$(number "$1") ;;
    --version=*) image=${1#*=} ;;
    --spot | --reserved) tier+=("$1") ;;
    --vm) queue= ;;
    --with=*) with+=("${1#*=}") ;;
    --delete) delete=1 ;;
    *) return 1 ;;
  esac
}
parse "$0" "$@"
[ -n "$name" ] && [ -n "$zone" ] && [ -n "$type" ] || die "--name, --zone and --type are needed (--help says more)"
[ -n "$queue" ] || [ "$slices" -eq 1 ] || die "--vm has one slice; leave it out for --slices=$slices"
case $directory in
  gs://*) ;;
  *) say "MODEL_DIR = $directory is not a bucket (gs://...): the hosts must share it, for example by NFS" ;;
esac
if [ -z "$image" ]; then
  case $type in
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    v[234]-*) image=tpu-ubuntu2204-base ;;
    *) die "--type=$type: no runtime version is known for it; give --version (TPU7x: use launch/jobset.sh)" ;;
  esac
fi

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")
if [ -n "$queue" ]; then
  kind=(gcloud compute tpus queued-resources) all=(--node=all --worker=all) field=state.state
else
  kind=(gcloud compute tpus tpu-vm) all=(--worker=all) field=state
fi

state() { "${kind[@]}" describe "$name" "${place[@]}" --format="value($field)" 2>/dev/null || true; }

create() {
  local nodes=(--node-id="$name")
  if [ -z "$queue" ]; then
    run "${kind[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --version="$image" ${tier[@]+"${tier[@]}"}
    return
  fi
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  run "${kind[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --runtime-version="$image" "${nodes[@]}" \
    ${tier[@]+"${tier[@]}"}
}

remove() {
  if [ -n "$queue" ]; then
    run "${kind[@]}" delete "$name" "${place[@]}" --force --quiet
  else
    run "${kind[@]}" delete "$name" "${place[@]}" --quiet
  fi
}

# Have machines: returns 0 once they are there; `fresh` says whether they are new.
fresh=
machines() {
  local now made=0
  while :; do
    now=$(state)
    case $now in
      ACTIVE | READY) return 0 ;;
      '' | FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
        if [ "$made" -ge "$tries" ]; then
          say "$name is ${now:-not there} after $made requests; giving up"
          return 1
        fi
        [ -z "$now" ] || { say "$name is $now: asking for it anew"; remove; }
        create || return 1
        made=$((made + 1)) fresh=1
        ;;
      *) say "$name is $now"; nap "$poll" ;;
    esac
  done
}

on_all() { run "${kind[@]}" ssh "$name" "${place[@]}" "${all[@]}" --command="$1"; }

# `set -e` is off in functions that are tested, so each step says what follows its failure.
install() {
  local scratch status=0
  scratch=$(mktemp -d) || return 1
  mkdir "$scratch/work"
  { [ "${#with[@]}" -eq 0 ] || cp -R "${with[@]}" "$scratch/work"; } &&
    run tar -czf "$scratch/pit_jax.tar.gz" --exclude=__pycache__ -C "$here/.." \
      pit_jax gin tasks launch requirements pyproject.toml hatch_build.py README.md LICENSE -C "$scratch" work &&
    run "${kind[@]}" scp "$scratch/pit_jax.tar.gz" "$name:" "${place[@]}" "${all[@]}" || status=1
  rm -rf "$scratch"
  [ "$status" -eq 0 ] || return 1
  on_all 'rm -rf pit_jax/source && mkdir -p pit_jax/source && tar -xzf pit_jax.tar.gz -C pit_jax/source &&'\
' cp -R pit_jax/source/work pit_jax && bash pit_jax/source/launch/install.sh pit_jax/source pit_jax/env tpu'
}

attempt() { attend "${kind[@]}" ssh "$name" "${place[@]}" "${all[@]}" --command="$remote"; }

recover() {
  fresh=
  machines || return 1
  [ -z "$fresh" ] || install
}

finish() {
  local status=$?
  trap '' INT TERM
  trap - EXIT
  if [ -n "$attended" ]; then
    say "stopping the run on all hosts, at its next step"
    on_all "$(quote bash pit_jax/source/launch/host.sh stop "$name")" || true
    kill -TERM "$attended" 2>/dev/null || true
  fi
  if [ -n "$delete" ]; then
    say "deleting $name"
    remove || say "could not delete $name: do it by hand, it costs"
  else
    say "$name is still there, and costs; delete it with: $(dry=1 remove)"
  fi
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

pipeline_line pit-jax
remote=$(quote bash pit_jax/source/launch/host.sh run "$name" "${line[@]}")
if [ -n "$dry" ]; then
  run "${kind[@]}" describe "$name" "${place[@]}" --format="value($field)"
  create
  install
  on_all "$remote"
  exit
fi
machines && install || exit 1
supervise attempt

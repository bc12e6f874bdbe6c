#!/usr/bin/env bash
# Run a whole recipe on this machine: on its accelerators if jax finds some, otherwise on the CPU.
#
#   launch/local.sh RECIPE MODEL_DIR [settings] [flags of `pit-jax pipeline`]
#   launch/local.sh demo runs/demo --gin.RANDOM_SEED=2
#   launch/local.sh hh_rlhf_1b runs/hh_1b --gin_file=meshes/fsdp_tensor_4.gin --gin.TOKENIZER="'tokenizer.model'" ...
#   launch/local.sh demo runs/demo --processes=2 --devices=2        as two hosts with two (fake) CPU devices each
#
# RECIPE is a name in gin/recipes or a gin file. The same command again continues an interrupted run.
#   --processes=N   several processes as one job, as on several hosts; GPUs are shared out among them (default: 1)
#   --devices=N     so many fake CPU devices a process
#   --tries=N       attempts in a row when it is stopped, killed, or a process dies (default: 1, that is, none again)
#   --dry-run       print the commands without running them
# PIT_JAX names the program (default: .venv/bin/pit-jax, else pit-jax).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
. "$here/lib.sh"

tries=1 processes=1 devices='' grace=120
setting() {
  case $1 in
    --processes=*) processes=$(number "$1") ;;
    --devices=*) devices=$(number "$1") ;;
    *) return 1 ;;
  esac
}
parse "$0" "$@"

program=${PIT_JAX-}
if [ -z "$program" ]; then
  program=pit-jax
  [ ! -x "$here/../.venv/bin/pit-jax" ] || program=$here/../.venv/bin/pit-jax
fi
pipeline_line "$program"
[ -z "$devices" ] || export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices"

recover() { :; }

# A port that nothing listens on.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 20000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  printf '%s\n' "$port"
}

# The GPUs of this machine, as CUDA_VISIBLE_DEVICES lists them; none where there are none.
all_gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -)} ||
  all_gpus=
share=0
if [ -n "$all_gpus" ] && [ "$processes" -gt 1 ]; then
  count=$(($(printf '%s\n' "$all_gpus" | tr -cd , | wc -c) + 1))
  [ $((count % processes)) -eq 0 ] || die "$count GPUs cannot be shared out evenly among --processes=$processes"
  share=$((count / processes))
fi

children=()

# Ask all processes to stop at the next step, with a checkpoint, and end those that do not.
stop() {
  local child waited=0
  for child in ${children[@]+"${children[@]}"}; do kill -TERM "$child" 2>/dev/null || true; done
  for child in ${children[@]+"${children[@]}"}; do
    while kill -0 "$child" 2>/dev/null && [ "$waited" -lt $((grace * 10)) ]; do
      sleep 0.1
      waited=$((waited + 1))
    done
    kill -KILL "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  done
  children=()
}
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM
trap stop EXIT

# Start all processes; the first one that ends with a fault decides, and the others are stopped.
attempt() {
  local port id child status left mine words
  port=$(free_port)
  children=()
  for ((id = 0; id < processes; id++)); do
    words=("${line[@]}")
    mine=()
    if [ "$processes" -gt 1 ]; then
      words+=("--coordinator_address=127.0.0.1:$port" "--process_count=$processes" "--process_id=$id")
      [ "$share" -eq 0 ] ||
        mine=(env "CUDA_VISIBLE_DEVICES=$(printf '%s\n' "$all_gpus" | cut -d, -f"$((id * share + 1))-$(((id + 1) * share))")")
    fi
    ${mine[@]+"${mine[@]}"} "${words[@]}" &
    children+=("$!")
  done
  while :; do
    left=()
    for child in "${children[@]}"; do
      if kill -0 "$child" 2>/dev/null; then
        left+=("$child")
        continue
      fi
      status=0
      wait "$child" || status=$?
      if [ "$status" -ne 0 ]; then
        stop
        return "$status"
      fi
    done
    children=(${left[@]+"${left[@]}"})
    [ "${#children[@]}" -gt 0 ] || return 0
    sleep 0.2
  done
}

if [ -n "$dry" ]; then
  port=PORT
  free_port() { printf '%s\n' "$port"; }
  if [ "$processes" -eq 1 ]; then
    printf '%s\n' "${line[@]}"
  else
    for ((id = 0; id < processes; id++)); do
      quote "${line[@]}" "--coordinator_address=127.0.0.1:$port" "--process_count=$processes" "--process_id=$id"
    done
  fi
  trap - EXIT
elif [ "$processes" -eq 1 ] && [ "$tries" -eq 1 ]; then
  trap - EXIT INT TERM
  exec "${line[@]}"
else
  supervise attempt
fi

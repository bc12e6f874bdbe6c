#!/usr/bin/env bash
# On a host of a job, called by the launchers through ssh:
#
#   host.sh run NAME WORDS...    run the words in ~/pit_jax/work, with ~/pit_jax/env first in PATH; one run a NAME
#   host.sh stop NAME            ask that run to stop at its next step, with a checkpoint, and wait for it
#
# A connection that broke may have left a run behind, so `run` stops it first.
set -euo pipefail

home=$HOME/pit_jax
verb=$1 name=$2
shift 2
pids=$home/pids
mkdir -p "$pids" "$home/work"

# Whether the process is there, has not ended, and is ours: its number may belong to another program by now.
ours() {
  case $(ps -o stat= -o args= -p "$1" 2>/dev/null || true) in
    Z*) return 1 ;;
    *pit-jax*) return 0 ;;
    *) return 1 ;;
  esac
}

stop() {
  local pid waited=0
  [ -s "$pids/$name" ] || return 0
  pid=$(cat "$pids/$name")
  ! ours "$pid" || kill -TERM "$pid" 2>/dev/null || true
  while ours "$pid"; do
    [ "$waited" -lt 240 ] || kill -KILL "$pid" 2>/dev/null || true
    sleep 0.5
    waited=$((waited + 1))
  done
  rm -f "$pids/$name"
}

stop
if [ "$verb" = run ]; then
  printf '%s\n' "$$" >"$pids/$name"
  export PATH="$home/env/bin:$PATH"
  cd "$home/work"
  exec "$@"
fi

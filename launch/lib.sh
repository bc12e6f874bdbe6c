# What the launchers share. Sourced by bash (3.2 or newer, so that macOS's own will do), never run.
# shellcheck shell=bash

# What every launcher takes besides its own settings.
dry=          # 1: print commands, run none
tries=5       # attempts in a row that may end within `steady` seconds
backoff=10    # seconds before the second attempt; doubled each time, up to 300
poll=10       # seconds between two looks at a resource
steady=600    # an attempt that lasted this long starts the count anew: spot machines are preempted for days
recipe='' directory=''
flags=()      # for `pit-jax pipeline`

say() { printf '%s\n' "launch: $*" >&2; }

die() {
  say "$*"
  exit 2
}

# The comment at the top of a launcher is its help.
usage() {
  sed -n '2,/^[^#]/{/^#SBATCH/d;/^# shellcheck/d;/^#/s/^# \{0,1\}//p;}' "$1"
}

# One word in single quotes, for any POSIX shell, whatever it holds.
quote_word() {
  printf '%s\n' "$1" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/"
}

# Words as one line of shell that gives back exactly these words. Plain ones stay as they are, to be read with ease.
quote() {
  local word line=
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word=$(quote_word "$word") ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Run a command, or print it in a dry run.
run() {
  if [ -n "$dry" ]; then quote "$@"; else "$@"; fi
}

# parse SCRIPT WORDS...: settings may stand anywhere; RECIPE and MODEL_DIR are the first two other words, and what
# follows them is for pit-jax. `setting WORD` is the launcher's own: it returns 1 for a word that it does not know.
parse() {
  local script=$1 ours=1
  shift
  for word; do
    if [ -n "$ours" ]; then
      case $word in
        --) ours= ; continue ;;
        -h | --help) usage "$script"; exit 0 ;;
        --dry-run) dry=1; continue ;;
        --tries=*) tries=$(number "$word"); continue ;;
        --backoff=*) backoff=$(number "$word"); continue ;;
        --poll=*) poll=$(number "$word"); continue ;;
        *) if setting "$word"; then continue; fi ;;
      esac
    fi
    if [ -n "$directory" ]; then
      flags+=("$word")
    elif [ "${word#-}" != "$word" ]; then
      die "$word is no setting of ${script##*/}; flags of pit-jax come after MODEL_DIR (--help says more)"
    elif [ -z "$recipe" ]; then
      recipe=$word
    else
      directory=$word
    fi
  done
  if [ -z "$directory" ]; then
    usage "$script" >&2
    exit 2
  fi
}

number() {
  case ${1#*=} in
    '' | *[!0-9]*) die "$1: a whole number is needed" ;;
  esac
  printf '%s\n' "${1#*=}"
}

# Sleep so that a signal is noticed at once, which bash does not while it waits for a command in the foreground.
nap() {
  sleep "$1" &
  wait "$!" || true
}

# attend COMMAND...: run it so that a signal is noticed at once; `attended` is its process until it has ended.
attended=
attend() {
  local status=0
  "$@" &
  attended=$!
  wait "$attended" || status=$?
  attended=
  return "$status"
}

# pipeline_line PROGRAM...: set `line`, the words of the command that every host runs.
pipeline_line() {
  local file=$recipe place
  case $file in
    *.gin) ;;
    *) file=recipes/$file.gin ;;
  esac
  # gin reads a Python string.
  place=$(printf '%s\n' "$directory" | sed "s/[\\\\']/\\\\&/g")
  line=("$@" pipeline "--gin_file=$file" "--gin.MODEL_DIR='$place'" ${flags[@]+"${flags[@]}"})
}

# The same command again goes on from the newest checkpoint. Worth it after 143 (stopped, with a checkpoint), 75
# (another host is gone) and whatever a signal or a lost connection ended; 1 and 2 are errors that would come again,
# and 130 is Ctrl-C.
worth_another_try() {
  [ "$1" -eq 75 ] || { [ "$1" -ge 128 ] && [ "$1" -ne 130 ]; }
}

# supervise COMMAND...: run it until it ends for good, and return its status. `recover`, the launcher's own, is called
# before another attempt.
supervise() {
  local short=0 status start pause=$backoff
  while :; do
    start=$SECONDS status=0
    "$@" || status=$?
    worth_another_try "$status" || return "$status"
    if [ $((SECONDS - start)) -ge "$steady" ]; then short=0 pause=$backoff; fi
    short=$((short + 1))
    if [ "$short" -ge "$tries" ]; then
      say "ended with status $status; giving up after $short short attempts in a row"
      return "$status"
    fi
    say "ended with status $status; going on from the newest checkpoint in $pause s (attempt $((short + 1)) of $tries)"
    nap "$pause"
    pause=$((pause * 2 > 300 ? 300 : pause * 2))
    recover "$status" || return $?
  done
}

# leave_job WHAT HINT: from now on, end by deleting the job (--delete), or after a signal by saying that it goes on and
# how to end it. `remove` is the launcher's own; `delete` is its setting.
leave_job() {
  job=$1 hint=$2
  trap finish_job EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# shellcheck disable=SC2154,SC2329  # `delete` is the launcher's; called by the trap
finish_job() {
  local status=$?
  trap '' INT TERM
  trap - EXIT
  [ -z "$attended" ] || kill -TERM "$attended" 2>/dev/null || true
  if [ -n "$delete" ]; then
    remove || say "could not delete the $job: do it by hand, its nodes cost"
  elif [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; then
    say "the job goes on; $hint: $(dry=1 remove)"
  fi
  exit "$status"
}

# follow_jobset NAMESPACE NAME: print the log of process 0, over restarts, until the JobSet has ended.
# Returns 0 where it is complete, 1 where it has failed.
follow_jobset() {
  local space=$1 name=$2 state pod last=
  local first="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  while :; do
    state=$(kubectl --namespace="$space" get jobset "$name" --output='jsonpath={.status.terminalState}') || return 1
    pod=$(kubectl --namespace="$space" get pods --selector="$first" --field-selector=status.phase!=Pending \
      --sort-by=.metadata.creationTimestamp --output='jsonpath={.items[-1:].metadata.name}') || pod=
    if [ -n "$pod" ] && [ "$pod" != "$last" ]; then
      last=$pod
      attend kubectl --namespace="$space" logs --follow "$pod" || true
      continue
    fi
    case $state in
      Completed) return 0 ;;
      Failed) say "the JobSet $name has failed: kubectl describe jobset $name --namespace=$space"; return 1 ;;
    esac
    nap "$poll"
  done
}

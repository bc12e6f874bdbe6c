#!/bin/sh
# Everything in docs/performance.md that is measured on one GPU, at full size: tables on the screen, JSON in a folder.
#
#   sh benchmarks/gpu.sh [OUTPUT]
#
# PYTHON, PYTHON_TRANSFORMERS, PYTHON_TRL, PYTHON_TUNIX: interpreters (how to install what each needs stands at the top
#   of benchmarks/peers/*_peer.py). PEERS="": none of the others. STEPS, ROUNDS: how often.
# SHAPE=tiny PLATFORM=cpu TOKENS=256 RESPONSES="4 8" PEERS= STEPS=1 ROUNDS=1: a try without a GPU, in minutes.
set -eu

cd "$(dirname "$0")/.."
output=${1:-speed-gpu}
shape=${SHAPE:-llama-3.2-1b}
steps=${STEPS:-10}
python=${PYTHON:-python}
peers=${PEERS-transformers,trl,tunix}
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.93}"

title() { printf '\n== %s\n\n' "$*"; }
bench() {
  title "$@"
  name=$1
  shift
  "$python" -m "benchmarks.$name" --shape "$shape" --output "$output" "$@" || echo "FAILED: $name $*"
}

bench ceilings
bench sft_step --steps "$steps"
bench sft_step --steps "$steps" --variant full --set remat=full
bench gap_step --steps "$steps" --variant bidirectional
bench gap_step --steps "$steps" --variant shared --stage attention=causal
bench gap_step --steps "$steps" --variant unshared --stage attention=causal --training share_prompts=False
bench rollout --steps "$steps"
bench rollout --steps "$steps" --variant bfloat16 --set param_dtype=bfloat16
bench rollout_ending --steps "$steps"
bench rollout_ending --steps "$steps" --variant replaced --stage portions=4
bench drafting --repeats "$steps" --rows 1 --prompt 512 --response 256 --drafts 4 8
bench drafting --repeats "$steps" --rows 32 --prompt 512 --response 256 --drafts 4 8
bench rl_step --steps "$steps"
bench rl_step --steps "$steps" --variant unshared --training share_prompts=False
bench rl_step --steps "$steps" --variant one-step-off --stage one_step_off=True
# shellcheck disable=SC2086  # a list of numbers
bench growth --steps "$steps" --tokens "${TOKENS:-32768}" --responses ${RESPONSES:-64 128 256 512}

title against the others
"$python" -m benchmarks.peers.compare --shape "$shape" --platform "${PLATFORM:-gpu}" --peers "$peers" \
  --python-transformers "${PYTHON_TRANSFORMERS:-$python}" --python-trl "${PYTHON_TRL:-$python}" \
  --python-tunix "${PYTHON_TUNIX:-$python}" --rounds "${ROUNDS:-2}" --steps "$steps" --output "$output/peers"

title starts
"$python" benchmarks/startup.py --tables compile ahead --runs "${ROUNDS:-2}" --json "$output/startup.json" \
  || echo "FAILED: startup"

title pictures
"$python" -m benchmarks.plots "$output" --output "$output" || echo "no pictures; they need matplotlib"

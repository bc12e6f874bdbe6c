#!/bin/sh
# Install pit_jax (editable) into the environment of a Python: sh requirements/install.sh .venv/bin/python [parity|planner]
# Uses uv where it can be installed, because it is many times faster, and plain pip otherwise.
# With `parity`, adds torch and transformers; PIT_JAX_TORCH="torch==2.9.1" asks for another version of torch.
# With `planner`, puts the TPU compiler that fits jax into a folder of its own, .venv/planner: inside the environment,
# jax would look for a TPU at every start.
set -eu
python=$1
extra=${2:-}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
lock=requirements/lock-$version.txt

"$python" -m pip install --quiet --disable-pip-version-check uv ||
    echo "uv is not to be had; going on with pip." >&2

install() {
    if "$python" -m uv --version >/dev/null 2>&1; then
        "$python" -m uv pip install --python "$python" "$@" && return
        echo "uv failed; trying pip." >&2
    fi
    "$python" -m pip install --disable-pip-version-check "$@"
}

if [ "$extra" = parity ]; then
    # On Linux torch's CPU build is a tenth of the usual one, and pip (not uv) takes it wherever it is told to look:
    # set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS. The rest of the extra then takes torch as it is.
    "$python" -m pip install --disable-pip-version-check --constraint "$lock" "${PIT_JAX_TORCH:-torch==2.13.0}"
    install --constraint "$lock" --no-build-isolation --editable ".[parity]"
    exit
fi
if [ "$extra" = planner ]; then
    compiler=$("$python" -c 'from importlib.metadata import requires
print(*(line.partition(";")[0].strip() for line in requires("jax") if line.startswith("libtpu")))')
    install --no-deps --target "$(dirname "$python")/../planner" "$compiler"
    exit
fi
install --requirement "$lock"
install --no-deps --no-build-isolation --editable .

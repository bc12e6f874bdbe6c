#!/usr/bin/env bash
# Install pit_jax from a folder into an environment of its own, on a host that may have another Python than it needs:
#
#   install.sh SOURCE ENVIRONMENT EXTRA        EXTRA: tpu, cuda, or - for none
#
# uv brings Python 3.12 where it is missing. Running it again brings the environment up to date.
set -euo pipefail

source=$(cd "$1" && pwd)
environment=$2 extra=$3
boot=$environment-boot
package=pit_jax
[ "$extra" = - ] || package="pit_jax[$extra]"

if ! "$boot/bin/uv" --version >/dev/null 2>&1; then
  if python3 -m venv "$boot" >/dev/null 2>&1; then
    "$boot/bin/pip" install --quiet --disable-pip-version-check uv
  else # Debian without python3-venv
    mkdir -p "$boot/bin"
    python3 -m pip install --quiet --disable-pip-version-check --user --break-system-packages uv ||
      python3 -m pip install --quiet --disable-pip-version-check --user uv
    ln -sf "$(python3 -m site --user-base)/bin/uv" "$boot/bin/uv"
  fi
fi
[ -x "$environment/bin/python" ] || "$boot/bin/uv" venv --quiet --python 3.12 "$environment"
"$boot/bin/uv" pip install --quiet --python "$environment/bin/python" \
  --constraint "$source/requirements/lock-3.12.txt" --reinstall-package pit_jax "$package @ file://$source"
"$environment/bin/pit-jax" --version

#!/usr/bin/env bash
# Print the Python of the environment that install.sh installs into (see there for PARALLEL_R1_VENV).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PARALLEL_R1_VENV:-$root/.venv}
[[ $venv == active ]] && venv=${VIRTUAL_ENV:-${CONDA_PREFIX:?no environment is active}}
echo "$venv/bin/python"

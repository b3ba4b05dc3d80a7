#!/usr/bin/env bash
# Install what is missing and run the test suite. Usage: training_scripts/test.sh [pytest options]
# Without the tests that start verl, Ray and vLLM (seconds instead of minutes): training_scripts/test.sh -m "not slow"
# Tests on the real data sets read the folder named by PARALLEL_R1_DATA and are skipped without it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/training_scripts/install.sh"
cd "$root"
exec "$("$root/training_scripts/python.sh")" -m pytest "$@"

#!/usr/bin/env bash
# The whole chain on a laptop, about 12 minutes on 2 cores: install, then data, cold-start SFT, RL, evaluation, report.
# Usage: training_scripts/quickstart.sh [--smoke] [--seed N] [--fresh] [--out DIR] [key=value ...]
# Running it again continues after the last finished stage. Results: runs/quickstart/report.md and report.json.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/training_scripts/install.sh"
cd "$root" # the default run folder is runs/quickstart of the repository
exec "$("$root/training_scripts/python.sh")" -m parallel_r1.quickstart "$@"

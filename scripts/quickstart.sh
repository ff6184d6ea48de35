#!/usr/bin/env bash
# Makes the environment and runs the embedded default chain, SFT -> reward model -> PPO -> evaluation, into runs/quickstart.
# A second run finds everything up to date. Options are those of `relay run`, such as --num-gpus 1 or --set seed=1.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ""
relay run quickstart "$@"

#!/usr/bin/env bash
# The two recipes on real data and a real 260K-parameter model, in full; writes the tables of docs/results.
# RELAY_TEST_DATA is the folder that holds stories260K, hh-rlhf and polite-pref; default ../shared/data.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ""
export RELAY_TEST_DATA=${RELAY_TEST_DATA:-$(cd ../shared/data && pwd)}

python scripts/seeds.py tests/recipes/polite_stories260k.yaml --out docs/results/polite.md
python scripts/seeds.py tests/recipes/hh_stories260k.yaml --seeds 0 --out docs/results/hh.md

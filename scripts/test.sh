#!/usr/bin/env bash
# Installs what the tests need and runs them: style, types, security, tests. Arguments go to pytest, such as -m fast or -k handoff.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh test
ruff check .
mypy
bandit -q -c pyproject.toml -r pipeline stages
scripts/audit.sh
exec python -m pytest "$@"

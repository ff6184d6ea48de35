#!/usr/bin/env bash
# Installs what the tests need and runs them: style, types, security, tests. Arguments go to pytest, such as -m fast or -k handoff;
# without any, most tests run two at a time, and then those that want the machine to themselves.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh test
ruff check .
mypy
bandit -q -c pyproject.toml -r pipeline stages
scripts/audit.sh
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$(mktemp -d)/site"
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi
python -m pytest -m "not alone" --numprocesses 2 --dist loadfile
python -m pytest -m alone

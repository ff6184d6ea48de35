# Sourced by the scripts beside it: makes .venv once, installs the tested versions, and puts it on PATH.
# Usage: . scripts/environment.sh [extra], where extra is a dependency group of pyproject.toml, such as test.
extra=${1:-}
PYTHON=${PYTHON:-python3}
stamp=.venv/installed${extra:+-$extra}
want=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "== installing into .venv (once; a few minutes) =="
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  # torch first and by its exact version: a range could bring another build than the tested one.
  .venv/bin/python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".${extra:+[$extra]}"
  echo "$want" > "$stamp"
fi
PATH=$PWD/.venv/bin:$PATH
export PATH

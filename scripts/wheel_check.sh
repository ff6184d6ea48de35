#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment, and runs a shortened quickstart there from an empty directory, with
# the installed packages read-only where this machine lets one mount them so. Says what it did.
#   scripts/wheel_check.sh [FOLDER]      FOLDER keeps the environment for another try; default: a new one, removed at the end
# PYTHON names the interpreter, by default python3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
work=$(cd "$work" && pwd)
export TORCH_EXTENSIONS_DIR=$work/kernels  # two environments with one folder build each other's kernels anew
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
said() { echo "== $* =="; }

said "a copy of the sources, and the wheel from it"
rm -rf "$work/source" "$work/dist" "$work/elsewhere"
mkdir -p "$work/source" "$work/elsewhere"
tar -C "$root" --exclude=__pycache__ -cf - pyproject.toml README.md LICENSE scripts/slurm.sbatch pipeline stages ds_configs |
  tar -C "$work/source" -xf -
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work/source"
wheel=$(echo "$work"/dist/*.whl)
ls -l "$wheel" | awk '{print $5 " bytes"}'

said "an empty environment"
python=$work/env/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$work/env"
"$python" --version
"$python" -m pip install --quiet "$(grep '^torch==' "$root/constraints.txt")"
"$python" -m pip install --quiet --constraint "$root/constraints.txt" "$wheel"
"$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
"$python" -m pip check
"$python" -m pip list 2>/dev/null | grep -iE '^(relay|torch|transformers|trl|peft|deepspeed) '

said "from an empty directory, $work/elsewhere"
cd "$work/elsewhere"
PATH=$work/env/bin:$PATH
site=$("$python" -c 'import pipeline, pathlib; print(pathlib.Path(pipeline.__file__).parents[1])')
case $site in "$work"/env/*) ;; *) echo "pipeline comes from $site" >&2; exit 1 ;; esac
relay --help > /dev/null
python -m pipeline plan quickstart > /dev/null
[ -f "$work/env/share/relay/slurm.sbatch" ]

short=(--set stages.ppo.steps=4 --set stages.ppo.rollout_batch=16 --set stages.reward.epochs=1)
if [ "$(id -u)" = 0 ] && unshare -m true 2>/dev/null; then
  said "the quickstart, shortened, with $site mounted read-only"
  unshare -m bash -ec 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; ! touch "$1/x" 2>/dev/null; shift; relay run quickstart "$@"' \
    _ "$site" "${short[@]}"
else
  said "the quickstart, shortened; $site cannot be mounted read-only here, what is new there is listed below"
  touch "$work/before"
  relay run quickstart "${short[@]}"
  find "$site" -newer "$work/before" -type f ! -name '*.pyc'
fi
said "and again: all up to date; every file verified"
relay run quickstart "${short[@]}" | grep -c 'up to date'
relay verify quickstart

said "from a directory with packages of the same names, and a recipe's function"
mkdir -p clash/pipeline clash/stages clash/ds_configs
cd clash
for name in pipeline stages ds_configs; do echo 'raise RuntimeError("the wrong package")' > $name/__init__.py; done
printf 'def judge(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n' > lengths.py
relay run quickstart "${short[@]}" --until sft
relay run quickstart "${short[@]}" --run-dir ../runs/quickstart --set stages.evaluate.judge=lengths:judge | grep judge
said "the wheel works"

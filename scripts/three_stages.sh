#!/usr/bin/env bash
# SFT, reward model and PPO by hand: nothing but three `deepspeed` commands on one recipe and one run directory.
# Usage: scripts/three_stages.sh [RECIPE] [RUN_DIR] [NUM_GPUS]
set -euo pipefail
recipe=${1:-quickstart} run=${2:-runs/three_stages} gpus=${3:-2}
if ! command -v nvidia-smi > /dev/null; then export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi

deepspeed --num_gpus "$gpus" --module stages.sft    --recipe "$recipe" --stage sft    --run-dir "$run"
deepspeed --num_gpus "$gpus" --module stages.reward --recipe "$recipe" --stage reward --run-dir "$run"
deepspeed --num_gpus "$gpus" --module stages.ppo    --recipe "$recipe" --stage ppo    --run-dir "$run"

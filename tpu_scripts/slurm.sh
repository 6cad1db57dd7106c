#!/usr/bin/env bash
# A run on GPUs under SLURM. Edit the #SBATCH lines, then:
#
#   sbatch tpu_scripts/slurm.sh --config configs/llama-3.1-8b.yaml --dataset train.jsonl --output_dir /shared/out
#
# One process for each GPU: under SLURM JAX takes every task for one process with one device, the
# one with the task's number on its node (jax/_src/clusters/cluster.py). So --ntasks-per-node is the
# number of GPUs of a node, and GPUs are asked for by node: with --gpus-per-task each task would see
# one GPU, number 0, and look for number SLURM_LOCALID.
# --output_dir is a folder that all nodes see, or gs:// or s3://. Secrets: set HF_TOKEN and
# WANDB_API_KEY in the environment of sbatch, which passes it on; not among the arguments.
#
#SBATCH --job-name=jaxtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300

# --signal: SIGTERM to the tasks 300 s before the time is up (no B: before it, which would tell this
# shell alone): train saves and ends with 75, and this script puts the job back into the queue.
set -euo pipefail

if [[ ${1:-} == --help || $# == 0 ]]; then
  sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p;}' "$0"
  exit 0
fi
command=(srun --kill-on-bad-exit=0)
# srun does not take it from sbatch since SLURM 22.05, and would give every task one core.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
command+=("${PYTHON:-.venv/bin/python}" -m jaxtune.train)
if [[ $1 == --dry-run || $1 == --dry_run ]]; then
  shift
  printf '+ %s\n' "${command[*]} $*"
  exit 0
fi

code=0
"${command[@]}" "$@" || code=$? # srun gives the highest code of its tasks
if ((code == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

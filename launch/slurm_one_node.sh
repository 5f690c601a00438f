#!/usr/bin/env bash
# One machine with several GPUs: sbatch launch/slurm_one_node.sh RECIPE.yaml [--KEY VALUE ...]
# Choose the accelerate file, the GPUs and the time below. The same command continues what the time limit cut off.
#SBATCH --job-name=infalign
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=infalign-%j.out
# --signal: training is told two minutes before the time limit, so that a checkpoint can be saved.
# --requeue: Slurm starts the job again after a preemption or a lost node (not after the time limit: submit it again).
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # seconds that the launcher leaves its processes after TERM; its own is 30

# srun, because the signal goes to job steps and not to this script.
srun infalign run --config "$1" --accelerate_config zero3 --num_processes "$SLURM_GPUS_ON_NODE" "${@:2}"

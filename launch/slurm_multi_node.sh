#!/usr/bin/env bash
# Several machines with GPUs: sbatch launch/slurm_multi_node.sh RECIPE.yaml [--KEY VALUE ...]
# Choose the accelerate file, machines, GPUs and the time below; output_dir must be on a file system they share.
#SBATCH --job-name=infalign
#SBATCH --nodes=8
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

MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_PROCESS_IP=${MAIN_PROCESS_IP%%$'\n'*} # the first of them
MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another for every job
export MAIN_PROCESS_IP MAIN_PROCESS_PORT

# One task a machine; inside a task SLURM_NODEID is the machine's number. The quotes are single: each machine expands.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  exec infalign run --config "$1" --accelerate_config zero3 \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" "${@:2}"
' infalign "$@"

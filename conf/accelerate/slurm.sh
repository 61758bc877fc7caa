#!/bin/bash
# Trains one run on all GPUs of several machines. What stands behind the script's name goes to selfdistill.train:
#
#   sbatch --nodes 2 slurm.sh experiment=sdft model=local model.name=/shared/model data=jsonl data.path=/shared/my.jsonl
#
# SHARDING (ddp, fsdp2, zero2, zero3) says how the model is divided, and RUN which folder the run has, on a disk that all
# machines share. A RUN that is there already is continued:
#
#   RUN=outputs/slurm-1234 sbatch --nodes 2 slurm.sh
#
#SBATCH --job-name=selfdistill
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Five minutes before the time is over every process finishes its step, saves a checkpoint and ends.
#SBATCH --signal=TERM@300
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240} # seconds until what still runs is killed

sharding=${SHARDING:-fsdp2}
run=${RUN:-outputs/slurm-$SLURM_JOB_ID}
conf=$(python -c 'from selfdistill.config.conf import CONF; print(CONF)')
gpus=${SLURM_GPUS_ON_NODE:-8}
if [ -e "$run/config.yaml" ]; then
  set -- "resume=$run"
else
  set -- "$@" "hydra.run.dir=$run"
fi
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MAIN PORT=${MASTER_PORT:-29500}
export CONFIG=$conf/accelerate/$sharding.yaml PROCESSES=$((SLURM_NNODES * gpus))

# One launcher a machine, each with the number of its machine.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$PROCESSES" \
  --main_process_ip "$MAIN" --main_process_port "$PORT" -m selfdistill.train "$@"' selfdistill "$@"

#!/usr/bin/env bash
# A task of Slurm as a rank: srun --nodes=2 --ntasks-per-node=8 launch/slurm/rank.sh doctor --distributed
set -euo pipefail

hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
export MASTER_ADDR=${hosts%%$'\n'*}
# Jobs that share a node must not meet.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
# "exec": Slurm's signals reach the rank and no shell in between.
exec longer-rec "$@"

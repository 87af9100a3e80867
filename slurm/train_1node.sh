#!/bin/bash
# Train on one node of 8 GPUs: sbatch slurm/train_1node.sh [ARGUMENTS of train.py]
#
#   CONFIG=configs/paper/enwik8.json sbatch --gres=gpu:4 --ntasks-per-node=4 slurm/train_1node.sh
#
# Variables, beside those of slurm/site.sh:
#   CONFIG  configuration (default: configs/hg_1b.json)
#   RUN     run folder (default: runs/ and the configuration's name)
#
# Otherwise like slurm/train_64gpu.sh.
#SBATCH --job-name=hg-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Slurm runs a spooled copy of this file; common.sh is next to the original, whose path the job has.
here=$(dirname "$0")
[[ -e $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" |
  sed -n '/^ *Command=/{s///;s|/[^/]*\.sh\( .*\)\{0,1\}$||;p;q}')
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/slurm
# shellcheck source=slurm/common.sh
. "$here/common.sh" train_1node.sh "$@" || exit 2

hg_train "${CONFIG:-configs/hg_1b.json}" "${RUN:-}" "$@"

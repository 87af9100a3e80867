#!/bin/bash
# Train on 8 nodes of 8 GPUs: sbatch slurm/train_64gpu.sh [ARGUMENTS of train.py]
#
#   CONFIG=configs/hg_7b_bytes.json sbatch --nodes=16 slurm/train_64gpu.sh --set training.steps=900
#
# Variables, beside those of slurm/site.sh:
#   CONFIG  configuration (default: configs/hg_1b.json)
#   RUN     run folder on a shared disk (default: runs/ and the configuration's name)
#
# When submitted again with the same run folder, it resumes from the last checkpoint. It requeues
# itself if that helps: docs/slurm.md. Options of sbatch override the lines below.
#SBATCH --job-name=hg-train
#SBATCH --nodes=8
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
. "$here/common.sh" train_64gpu.sh "$@" || exit 2

hg_train "${CONFIG:-configs/hg_1b.json}" "${RUN:-}" "$@"

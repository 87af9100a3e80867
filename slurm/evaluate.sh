#!/bin/bash
# Score every checkpoint of a run on held-out text: sbatch slurm/evaluate.sh RUN_OR_CHECKPOINT [OPTIONS]
#
# The arguments are those of `hg-scale evaluate`, such as: runs/hg_1b --split test --precision bf16
# For a run folder all checkpoints are scored, one line each.
#
# Variables: those of slurm/site.sh.
#SBATCH --job-name=hg-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Slurm runs a spooled copy of this file; common.sh is next to the original, whose path the job has.
here=$(dirname "$0")
[[ -e $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" |
  sed -n '/^ *Command=/{s///;s|/[^/]*\.sh\( .*\)\{0,1\}$||;p;q}')
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/slurm
# shellcheck source=slurm/common.sh
. "$here/common.sh" evaluate.sh "$@" || exit 2

(($# >= 1)) || hg_die "usage: sbatch slurm/evaluate.sh RUN_OR_CHECKPOINT [OPTIONS]"
if [[ -d $1/checkpoints ]]; then
  set -- "$@" --all
  # `hg-scale report` shows the results in the run folder.
  [[ " $* " == *\ --json[\ =]* ]] || set -- "$@" --json "$1/evaluation-$SLURM_JOB_ID.json"
fi
hg_srun 1 -m hg_scale evaluate "$@"

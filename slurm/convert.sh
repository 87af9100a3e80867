#!/bin/bash
# Export a checkpoint as a plain model: sbatch slurm/convert.sh CHECKPOINT OUTPUT [OPTIONS]
#
# The arguments are those of `hg-scale convert export`. Needs memory but no GPU.
#
# Variables: those of slurm/site.sh.
#SBATCH --job-name=hg-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
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
. "$here/common.sh" convert.sh "$@" || exit 2

(($# >= 2)) || hg_die "usage: sbatch slurm/convert.sh CHECKPOINT OUTPUT [OPTIONS]"
hg_srun 1 -m hg_scale convert export "$@"

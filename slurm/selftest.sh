#!/bin/bash
# Test a node of GPUs in ten minutes: sbatch slurm/selftest.sh [OPTIONS]
#
# Checks the golden files (--golden FOLDER), equal curves of all layouts, a kill and a resume in
# another layout, and the bandwidth, and prints a table for the README. For OPTIONS see
# slurm/selftest.py --help.
#
# Variables: those of slurm/site.sh.
#SBATCH --job-name=hg-selftest
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:30:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Slurm runs a spooled copy of this file; common.sh is next to the original, whose path the job has.
here=$(dirname "$0")
[[ -e $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" |
  sed -n '/^ *Command=/{s///;s|/[^/]*\.sh\( .*\)\{0,1\}$||;p;q}')
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/slurm
# shellcheck source=slurm/common.sh
. "$here/common.sh" selftest.sh "$@" || exit 2

hg_srun 1 "$HG_CODE/slurm/selftest.py" "$@"

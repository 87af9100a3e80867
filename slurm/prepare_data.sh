#!/bin/bash
# Prepare data with many processes: sbatch slurm/prepare_data.sh SCRIPT [ARGUMENTS]
#
#   sbatch --nodes=4 slurm/prepare_data.sh prepare_text.py --input corpus/ --output corpora/text
#
# SCRIPT is one of data_prep/. Its processes find each other over the output folder, so that MPI is
# not needed (site.sh: HG_MPI sets `srun --mpi=`). Submitted again, it resumes.
#
# Variables: those of slurm/site.sh.
#SBATCH --job-name=hg-data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Slurm runs a spooled copy of this file; common.sh is next to the original, whose path the job has.
here=$(dirname "$0")
[[ -e $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" |
  sed -n '/^ *Command=/{s///;s|/[^/]*\.sh\( .*\)\{0,1\}$||;p;q}')
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/slurm
# shellcheck source=slurm/common.sh
. "$here/common.sh" prepare_data.sh "$@" || exit 2

script=$HG_CODE/data_prep/${1:-}
[[ -f $script ]] || hg_die "usage: sbatch slurm/prepare_data.sh SCRIPT [ARGUMENTS], one of" \
  "$(cd "$HG_CODE/data_prep" && echo ./*.py)"
shift
[[ -z ${HG_MPI:-} ]] || HG_SRUN+=(--mpi="$HG_MPI")
hg_srun "$hg_tasks" "$script" "$@"

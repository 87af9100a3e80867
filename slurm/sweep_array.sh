#!/bin/bash
# Train one run per line of a file of overrides, as elements of an array:
#
#   POINTS=sweep.txt CONFIG=configs/hg_1b.json sbatch --array=1-4%2 slurm/sweep_array.sh [ARGUMENTS]
#
# A line has KEY=VALUE words, quoted as in a shell: optimizer.learning_rate=3e-4 'model.hierarchy=6@1'.
# Empty lines and those that begin with # do not count. The run folder of a point is named after its
# line, so lines may be added and moved. When submitted again, points that finished with the same
# ARGUMENTS are skipped and others resume.
#
# Variables, beside those of slurm/site.sh:
#   POINTS  the file of overrides
#   CONFIG  configuration (default: configs/hg_1b.json)
#   SWEEP   parent of the run folders (default: runs/ and the name of POINTS)
#SBATCH --job-name=hg-sweep
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
#SBATCH --output=%x-%A-%a.log

# Slurm runs a spooled copy of this file; common.sh is next to the original, whose path the job has.
here=$(dirname "$0")
[[ -e $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" |
  sed -n '/^ *Command=/{s///;s|/[^/]*\.sh\( .*\)\{0,1\}$||;p;q}')
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/slurm
# shellcheck source=slurm/common.sh
. "$here/common.sh" sweep_array.sh "$@" || exit 2

[[ -n ${POINTS:-} && -n ${SLURM_ARRAY_TASK_ID:-} ]] ||
  hg_die "usage: POINTS=FILE sbatch --array=1-N slurm/sweep_array.sh"
export SWEEP=${SWEEP:-runs/$(basename "${POINTS%.*}")}
HG_COPIES=$SWEEP/code
# A requeued element keeps its line, whatever has been edited since the first element started.
copy=$HG_COPIES/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}/points
[[ ! -e $copy ]] || POINTS=$copy
[[ -r $POINTS ]] || hg_die "POINTS=$POINTS: cannot be read"
point=$(grep -v '^[[:space:]]*\(#\|$\)' "$POINTS" | sed -n "${SLURM_ARRAY_TASK_ID}p")
[[ -n $point ]] || hg_die "$POINTS has no line $SLURM_ARRAY_TASK_ID of overrides; see --array"
unquoted=$(xargs printf '%s\n' <<<"$point") ||
  hg_die "$POINTS, line $SLURM_ARRAY_TASK_ID of overrides: cannot be read: $point"
mapfile -t words <<<"$unquoted"

name=$(tr -c 'A-Za-z0-9.=,@_\n-' _ <<<"${words[*]}")
# Two lines must not share a folder, nor may its name be too long for a file system.
[[ $name == "${words[*]// /_}" && ${#name} -le 120 ]] ||
  name=${name:0:100}-$(cksum <<<"${words[*]}" | cut -d ' ' -f 1)
if [[ -e $SWEEP/$name/finished && $(<"$SWEEP/$name/finished") == "$*" ]]; then
  hg_say "point $SLURM_ARRAY_TASK_ID is finished: $SWEEP/$name"
  exit 0
fi
overrides=()
for word in "${words[@]}"; do overrides+=(--set "$word"); done
hg_train "${CONFIG:-configs/hg_1b.json}" "$SWEEP/$name" "${overrides[@]}" "$@"

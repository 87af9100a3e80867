# shellcheck shell=bash
# Shared by the launchers of this folder: paths, the environment of the ranks, and one training job
# from its checks to its end. Sourced by them, never run.
#
# Everything that needs a Slurm command happens here, in the batch script on the first node. Ranks
# get the results through their environment, so they may run in containers without Slurm.

set -uo pipefail # not -e: exit codes are handled

hg_launcher=$1 # sourced as: . common.sh LAUNCHER ARGUMENTS...
shift
hg_arguments=("$@")

hg_say() { printf '%s  %s\n' "$(date '+%F %T')" "$*"; }
hg_die() { hg_say "$@" >&2; exit 2; } # 2 is a configuration error, which is never requeued

# --- paths ----------------------------------------------------------------------------------------

HG_CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)          # the code that this job runs
HG_ROOT=$(cat "$HG_CODE/copied-from" 2>/dev/null || echo "$HG_CODE") # the repository

HG_SRUN=()      # site.sh: further options of every srun
HG_CONTAINER=() # site.sh: command before python, such as (apptainer exec --nv image.sif)
set +u # scripts that a site sources, such as conda's, read variables that are not set
# shellcheck source=slurm/site.sh
. "${HG_SITE:-$HG_CODE/slurm/site.sh}" || hg_die "cannot read the site's settings"
set -u

if [[ -z ${HG_PYTHON:-} ]]; then
  HG_PYTHON=$HG_ROOT/.venv/bin/python
  [[ -x $HG_PYTHON ]] || HG_PYTHON=python3
fi
if ! command -v srun >/dev/null || [[ -z ${SLURM_JOB_ID:-} ]]; then
  hg_die "not in a Slurm job; submit it with: sbatch slurm/$hg_launcher"
fi

# The path of a file relative to the folder of the sbatch or, if missing there, to the repository.
hg_file() {
  if [[ -e $1 || ! -e $HG_ROOT/$1 ]]; then realpath -m -- "$1"; else realpath -- "$HG_ROOT/$1"; fi
}

# --- environment of the ranks ---------------------------------------------------------------------

# The copy of the code precedes an editable installation of the repository.
export PYTHONPATH=$HG_CODE${PYTHONPATH:+:$PYTHONPATH}

# srun of Slurm 22.05 and later ignores the batch script's --cpus-per-task.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Compiled kernels on the node's local disk: on a shared one, ranks of many nodes wait for each
# other's locks, sometimes forever.
hg_cache=${HG_SCRATCH:-/tmp}/hg_scale-$(id -u)
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$hg_cache/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$hg_cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$hg_cache/inductor}

# Rendezvous of the ranks: the address that Slurm uses for the first node, and a port that depends
# on the job, below the ephemeral ports of outgoing connections.
hg_nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$1"; } # the first $1 nodes
hg_first=$(hg_nodes 1)
MASTER_ADDR=$(scontrol show node "$hg_first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$hg_first}
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000))

# The job's id for scontrol: the id of an array's last element is also that of the whole array.
hg_job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || hg_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
hg_field() { scontrol show job "$hg_job" | sed -n "/\b$1=/{s/.*\b$1=\(${2:-[^ ]*}\).*/\1/p;q}"; }

# End of the job's time limit, in seconds since 1970; empty without a limit.
HG_END_TIME=$(date -d "$(hg_field EndTime)" +%s 2>/dev/null)
export HG_END_TIME

# Tasks of the job. SLURM_NTASKS may count requested nodes (--nodes=4-8), not allocated ones.
hg_tasks=${SLURM_NTASKS:-1}
[[ -z ${SLURM_NTASKS_PER_NODE:-} ]] || hg_tasks=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))

# Errors of srun itself, such as a node that does not respond, count as a lost node: exit_codes.py.
export SLURM_EXIT_ERROR=76

# hg_srun TASKS ARGUMENTS...: run python ARGUMENTS as TASKS tasks; a single one on the first node.
hg_srun() {
  hg_step "$@"
  "${hg_command[@]}"
}

# Only set hg_command to the srun command, for callers that start it themselves.
hg_step() {
  local tasks=$1 options=(--kill-on-bad-exit=0)
  shift
  if ((tasks == 1)); then
    options+=(--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$hg_first")
  else
    # When a rank is lost, the others get two minutes to exit. Killing them at once would hide the
    # exit code on which they agree.
    options+=(--ntasks="$tasks" --wait="${HG_WAIT:-120}")
    if ((tasks == hg_tasks)); then
      options+=(--distribution=block)
    else # fill the first nodes
      local each=$((hg_tasks / SLURM_JOB_NUM_NODES)) nodes
      nodes=$(((tasks + each - 1) / each))
      options+=(--nodes="$nodes" --nodelist="$(hg_nodes "$nodes" | paste -sd,)")
      options+=(--ntasks-per-node="$each" --distribution=plane="$each")
    fi
  fi
  hg_command=(srun "${options[@]}" "${HG_SRUN[@]}" "${HG_CONTAINER[@]}" "$HG_PYTHON" "$@")
}

# --- a training job -------------------------------------------------------------------------------

# hg_train CONFIG RUN ARGUMENTS...: check, train, and requeue or end according to the exit code.
hg_train() {
  local config run code output tasks own
  config=$(hg_file "$1")
  run=$(realpath -m -- "${2:-runs/$(basename "$1" .json)}")
  shift 2
  [[ " $* " != *\ --run[\ =]* && " $* " != *\ --config[\ =]* ]] ||
    hg_die "--run and --config are set as variables: RUN=... CONFIG=... sbatch slurm/$hg_launcher"
  mkdir -p "$run/logs" || hg_die "cannot create the run folder $run; set RUN to another"
  [[ -e $HG_CODE/copied-from ]] || hg_copy_code "$run"
  hg_say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $hg_tasks tasks on" \
    "$SLURM_JOB_NODELIST, run folder $run, code $HG_CODE"
  local gpus=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-0}))
  if ((gpus && gpus != hg_tasks)); then
    hg_say "warning: $gpus GPUs but $hg_tasks tasks; set --ntasks-per-node to one task per GPU"
  fi

  # Until here, and if it is refused, the job changes nothing of a run that has the folder.
  local train=("$HG_CODE/hg_scale/train.py" --config "$config" --run "$run"
    --resolved "$(hg_copy_config "$config")" "$@")
  output=$(hg_srun 1 "${train[@]}" --check --world-size "$hg_tasks")
  code=$?
  [[ -z $output ]] || echo "$output"
  [[ $output != refused:* ]] || exit "$code"
  hg_journal "$run" start \
    "\"nodes\": \"$SLURM_JOB_NODELIST\", \"tasks\": $hg_tasks, \"ends\": ${HG_END_TIME:-null}"
  [[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || rm -f "$run/restarts"
  if ((code == 0)); then
    # With parallel.elastic, possibly fewer tasks than the job has.
    tasks=$(sed -n '$s/^\([0-9]*\) processes = .*/\1/p' <<<"$output")
    rm -f "$run"/ranks/*.end
    # Slurm signals the ranks too, which act on it; this script only has to survive, to requeue.
    trap : TERM USR1 USR2
    hg_step "${tasks:-$hg_tasks}" "${train[@]}"
    "${hg_command[@]}" &
    hg_wait $!
    code=$?
    # An error of one rank takes precedence over the lost connection that it causes on the others.
    own=$(cat "$run"/ranks/*.end 2>/dev/null | sed -n 's/.*"code": \([0-9]*\).*/\1/p' | head -n 1)
    ((code == 0)) || code=${own:-$code}
  fi
  hg_end "$run" "$code"
}

# Copy the code into the run folder, once per job, and continue there: an edit of the repository
# changes new jobs, not a requeued one.
hg_copy_code() {
  local copies=${HG_COPIES:-$1/code} copy partial
  copy=$(realpath -m -- "$copies/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}")
  if [[ ! -d $copy ]]; then
    mkdir -p "$copies"
    partial=$(mktemp -d "$copies/.XXXXXX") || hg_die "cannot write to $copies"
    tar -C "$HG_ROOT" --exclude=__pycache__ -cf - hg_scale configs data_prep slurm |
      tar -C "$partial" -xf - || hg_die "cannot copy the code into $copies"
    echo "$HG_ROOT" >"$partial/copied-from"
    [[ $hg_launcher != sweep_array.sh ]] || cp "$POINTS" "$partial/points" || hg_die "cannot copy $POINTS"
    git -C "$HG_ROOT" describe --always --dirty >"$partial/version" 2>/dev/null
    mv -T "$partial" "$copy" 2>/dev/null || rm -rf "$partial" # another array element was first
  fi
  exec bash "$copy/slurm/$hg_launcher" "${hg_arguments[@]}"
}

# The job's copy of a configuration, merged with those that it extends: the check writes it at the
# job's first start, and every start runs from it.
hg_copy_config() { echo "$HG_CODE/resolved/${1##*/}"; }

# Wait for a child through any number of signals; return its exit code.
hg_wait() {
  local code again
  wait "$1"
  code=$?
  while kill -0 "$1" 2>/dev/null; do
    wait "$1"
    code=$?
  done
  wait "$1" 2>/dev/null # it may have ended between a signal and kill -0
  again=$?
  ((again == 127)) || code=$again
  return "$code"
}

# --- end of a job: the codes of hg_scale/exit_codes.py --------------------------------------------

hg_end() {
  local run=$1 code=$2
  case $code in
    0) hg_finish "$run" 0 "done" ;;
    2) hg_finish "$run" 2 "the configuration cannot be used: not requeued" ;;
    75) hg_requeue "$run" 75 "saved, to be started again" ;;
    76) hg_requeue "$run" 76 "lost a rank or a node" ;;
    77) hg_finish "$run" 77 "gave up: not requeued" ;;
    130) hg_finish "$run" 130 "interrupted by Ctrl-C: not requeued" ;;
    *)
      if ((code > 192)); then # of srun itself, such as 255 when a node ends the step
        hg_requeue "$run" "$code" "lost a rank or a node"
      elif ((code > 128)); then
        hg_requeue "$run" "$code" "a rank was ended by signal $((code - 128))"
      else
        hg_finish "$run" "$code" "failed: see above, and $run/logs; not requeued"
      fi
      ;;
  esac
}

# hg_finish RUN CODE MESSAGE [STATE]: end for good; STATE is why Slurm ends the job, if it does.
hg_finish() {
  [[ $2 != 0 ]] || echo "${hg_arguments[*]}" >"$1/finished"
  hg_say "exit code $2: $3"
  hg_journal "$1" end "\"code\": $2, \"requeued\": false${4:+, \"state\": \"$4\"}"
  exit "$2"
}

# Why Slurm ends the job, which does not run any more: REQUEUED (a lost node, scontrol requeue),
# TIMEOUT or CANCELLED. Slurm shows all of them as COMPLETING, but has counted the restart already.
hg_ending() {
  local restarts
  restarts=$(hg_field Restarts)
  if [[ -z $restarts ]]; then
    echo UNKNOWN # the controller does not answer
  elif ((restarts > ${SLURM_RESTART_COUNT:-0})); then
    echo REQUEUED
  elif [[ -n $HG_END_TIME ]] && (($(date +%s) >= HG_END_TIME)); then
    echo TIMEOUT
  else
    echo CANCELLED
  fi
}

# Restart from the last checkpoint, unless too many restarts brought no new checkpoint. Preemptions
# do not count.
hg_requeue() {
  local run=$1 code=$2 reason=$3 step last=none count=0 ending
  step=$(find "$run/checkpoints" -mindepth 2 -maxdepth 2 -path '*/step-*/manifest.json' 2>/dev/null |
    sort | tail -n 1)
  step=$(basename "$(dirname "${step:-none/none}")")
  [[ ! -e $run/restarts ]] || read -r last count <"$run/restarts"
  if [[ $(hg_field JobState) != RUNNING ]]; then
    ending=$(hg_ending)
    if [[ $ending == REQUEUED ]]; then
      hg_journal "$run" end "\"code\": $code, \"requeued\": true"
      hg_say "exit code $code: $reason; Slurm has requeued the job"
      exit "$code"
    fi
    hg_finish "$run" "$code" "${reason%, to be started again}; the job is $ending" "$ending"
  fi
  if [[ $(hg_field PreemptTime) != *:* ]]; then # no time of day: None, or missing
    if [[ $step == "$last" ]]; then count=$((count + 1)); else count=1; fi
    if ((count > ${HG_MAX_RESTARTS:-3})); then
      hg_finish "$run" 77 "$reason; started $count times without getting past checkpoint $step: gave up"
    fi
    echo "$step $count" >"$run/restarts"
  fi
  hg_journal "$run" end "\"code\": $code, \"requeued\": true"
  hg_say "exit code $code: $reason; requeued, resumes from checkpoint $step"
  scontrol requeue "$hg_job" ||
    hg_finish "$run" "$code" "this cluster does not requeue; resume with: sbatch slurm/$hg_launcher"
  exit "$code"
}

# hg_journal RUN EVENT FIELDS: append a line to the run folder's jobs.jsonl, for `hg-scale status`.
hg_journal() {
  local log
  log=$(hg_field StdOut '.*')
  printf '{"time": %s, "job": "%s", "start": %s, "event": "%s", "log": "%s", %s}\n' "$(date +%s)" \
    "$hg_job" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$2" "${log//[\"\\]/}" "$3" >>"$1/jobs.jsonl"
}

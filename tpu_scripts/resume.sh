#!/usr/bin/env bash
# Keeps a run going until it is done: asks for the slice, sets it up, launches, and after a preemption
# does the same again. The run goes on from its newest checkpoint.
#
#   HF_TOKEN=... tpu_scripts/resume.sh --name tune --zone us-west4-a --accelerator_type v5e-16 --spot \
#     --bucket my-bucket --copy train.jsonl --delete_when_done -- \
#     --config configs/llama-3.1-8b.yaml --dataset train.jsonl --output_dir /mnt/jaxtune/llama
#
# The flags of create.sh, setup.sh and launch.sh, and
# --max_hours N        delete the slice and stop after so many hours, counted from the start of this
#                      script, or from the request of the slice when it is there already; default 24
# --max_failures N     stop when the run has ended so often by something else than a preemption (exit
#                      codes other than 0, 2, 3, 75), when a request has failed so often, or setting
#                      up and launching so often in a row; default 3
# --delete_when_done   delete the slice when the run is over, however it ended; its last lines of log
#                      are printed first. Without it the slice stays, and costs
# --poll_seconds N     between two looks; default 60
# --dry_run            print every command of a run that is not disturbed, run none
#
# Leave it running where it is not closed with the lid: tmux on a small VM, for instance. It keeps
# nothing of its own: stopped and started again, it goes on with what it finds.
# Exit code: of the run (0 done, 2 bad input, 3 diverged); 75 after --max_hours; 2 when gcloud refuses;
# 1 after --max_failures.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= accelerator_type= runtime_version= node_count= spot reserved max_hours= \
valid_until_duration= service_account= network= subnetwork= internal_ips package= bucket= run= copy+ \
max_failures= delete_when_done poll_seconds=" "$@"
place
name=${flag_run:-train} seconds=${flag_poll_seconds:-60} most=${flag_max_failures:-3} hours=${flag_max_hours:-24}
run_name "$name"
whole poll_seconds "$seconds"
whole max_failures "$most"
whole max_hours "$hours"
((${#REST[@]})) || die "what to train is missing: -- --config FILE --dataset FILE --output_dir DIR."
if [[ $flag_accelerator_type ]]; then tpu_type "$flag_accelerator_type"; fi

# flags_for "name zone": those of the flags given that another script knows.
flags_for() {
  local flag name
  CHOSEN=()
  for flag in "${FLAGS_GIVEN[@]}"; do
    name=${flag#--}
    case " $1 dry_run " in *" ${name%%=*} "*) CHOSEN+=("$flag") ;; esac
  done
}

create() {
  [[ $flag_accelerator_type ]] || die "$NAME is gone, and without --accelerator_type it cannot be asked for again."
  flags_for "name zone project accelerator_type runtime_version node_count spot reserved max_hours \
valid_until_duration service_account network subnetwork internal_ips"
  "$HERE/create.sh" "${CHOSEN[@]}" "--poll_seconds=$seconds"
}

set_up_and_launch() {
  flags_for "name zone project package bucket"
  "$HERE/setup.sh" "${CHOSEN[@]}" || return
  launch
}

launch() {
  flags_for "name zone project run copy"
  "$HERE/launch.sh" "${CHOSEN[@]}" -- "${REST[@]}"
}

# over CODE MESSAGE: the last word.
over() {
  say "$NAME: $2"
  if [[ $1 != 0 && $1 != "$STOPPED" ]]; then
    NODES=("${NODES[0]}")
    on 0 "bash jaxtune-worker.sh log $name 50" >&2 || true
  fi
  if [[ $flag_delete_when_done ]]; then
    delete_slice
  else
    say "$NAME is still there and costs. Fetch what you want, then: tpu_scripts/delete.sh --name $NAME ${PLACE[*]}"
  fi
  exit "$1"
}

# try COMMAND: what has to work soon, for the slice costs meanwhile. A VM that is a minute old may
# still refuse.
try() {
  if "$@"; then
    misses=0
    return
  fi
  misses=$((misses + 1))
  if ((misses >= most)); then over 1 "it could not be set up or launched $misses times in a row."; fi
  say "$NAME: not launched; looking again ($misses of $most)."
}

began=$(now)
failures=0
misses=0
before=''
while true; do
  slice ABSENT
  if [[ $CREATED ]] && (($(epoch "$CREATED") < began)); then began=$(epoch "$CREATED"); fi
  if (($(now) - began > hours * 3600)) && [[ $STATE != ABSENT && $STATE != UNKNOWN ]]; then
    say "$NAME: --max_hours $hours are over; deleting it. The same command goes on from the last checkpoint."
    delete_slice
    exit "$STOPPED"
  fi
  what=$(meaning "$STATE")
  if [[ $STATE != "$before" ]]; then say "$(date '+%F %T') $NAME: $STATE ${WHY:-}"; fi
  before=$STATE
  case $what in
  absent)
    code=0
    create || code=$?
    # 75: taken away before it was used. The next look says so and begins anew.
    if ((code && code != STOPPED)); then exit "$code"; fi
    if [[ $DRY_RUN == yes ]]; then
      slice "ACTIVE||$ACCELERATOR|${flag_node_count:-1}||"
      set_up_and_launch
      pause "$seconds"
      reports "$name" >/dev/null
      echo "# and so on, until every worker has ended. After a preemption:" >&3
      delete_slice
      echo "# and from the beginning. At the end:" >&3
      over 0 "done."
    fi
    ;;
  failed | gone)
    if [[ $what == failed ]]; then
      failures=$((failures + 1))
      if ((failures >= most)); then
        delete_slice
        say "$NAME: $failures requests failed: ${WHY:-no reason given}. Another zone, or fewer chips?"
        exit 1
      fi
    fi
    # It does not come back: "You can't restart TPU Spot VMs, and you must recreate them after
    # preemption" (https://cloud.google.com/tpu/docs/spot). The name is free once it is deleted.
    if [[ $STATE != DELETING ]]; then delete_slice || say "$NAME: not deleted yet; trying again."; fi
    pause "$seconds"
    ;;
  ready)
    verdict=$(reports "$name" | verdict)
    case $verdict in
    bare | absent) try set_up_and_launch ;;
    'exit 0') over 0 "run '$name' is done." ;;
    "exit $BAD_INPUT") over "$BAD_INPUT" "run '$name' refuses its input (exit 2):" ;;
    "exit $DIVERGED") over "$DIVERGED" "run '$name' has diverged (exit 3); the last good checkpoint is kept:" ;;
    "exit $STOPPED")
      say "$NAME: run '$name' was stopped after saving; launching it again."
      try launch
      ;;
    exit*)
      # A host that goes takes the others down with it before the state of the slice says so.
      pause "$seconds"
      slice ABSENT
      if [[ $STATE == ACTIVE ]]; then
        failures=$((failures + 1))
        if ((failures >= most)); then over 1 "run '$name' has failed $failures times ($verdict):"; fi
        say "$NAME: run '$name' ended with $verdict; launching it again ($failures of $most)."
        try launch
      fi
      ;;
    *) ;; # running, or the workers do not answer: the next look says which
    esac
    pause "$seconds"
    ;;
  *) pause "$seconds" ;; # waiting, or gcloud does not answer
  esac
done

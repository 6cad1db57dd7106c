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
#                      script, or from the request of the slice when it is there already; default: what
#                      is written on the slice, else 24. A slice that is past them when this script
#                      begins is refused, not deleted
# --max_failures N     stop when the run has ended so often within two hours of its launch and was not
#                      preempted (exit codes other than 0, 2, 3), when so many requests failed in a row,
#                      or asking, setting up and launching did so often in a row; default 3
# --delete_when_done   delete the slice when the run is over: done, diverged or given up; its last lines
#                      of log are printed first. Not after bad input (2): a result may wait to be copied.
#                      Without it the slice stays, and costs
# --poll_seconds N     between two looks; default 60
# --dry_run            print every command of a run that is not disturbed, run none
#
# Only slices that were asked for through the queue are ever deleted. A VM of `tpu-vm create` is used as
# it is and left as it is; so is one that somebody stopped.
#
# Leave it running where it is not closed with the lid: tmux on a small VM, for instance. It keeps
# nothing of its own: stopped and started again, it goes on with what it finds. The commit is the one
# that was checked out when it began, also after a preemption; --commit keeps it over a new start.
# To stop the run, end this script first, then launch.sh --stop: it would launch it again.
#
# Exit code: of the run (0 done, 2 bad input, 3 diverged); 75 after --max_hours; 2 when gcloud refuses, or
# the slice is not one to go on with; 1 after --max_failures, or when the slice could not be deleted.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

QUIET_MINUTES=30 # of a slice on which nothing was launched yet: it will not answer any more
TRAINED_HOURS=2  # more than hang_timeout_seconds: a run that lasted so long has got somewhere
LOOKS=20         # at a slice that was deleted

parse "name= zone= project= accelerator_type= runtime_version= node_count= spot reserved max_hours= \
valid_until_duration= service_account= network= subnetwork= internal_ips package= commit= bucket= run= copy+ \
max_failures= delete_when_done poll_seconds=" "$@"
place
name=${flag_run:-train} seconds=${flag_poll_seconds:-60} most=${flag_max_failures:-3} hours=${flag_max_hours:-24}
run_name "$name"
whole poll_seconds "$seconds"
whole max_failures "$most"
whole max_hours "$hours"
((${#REST[@]})) || die "what to train is missing: -- --config FILE --dataset FILE --output_dir DIR."
no_secrets "${REST[@]}"
copies
if [[ $flag_accelerator_type ]]; then tpu_type "$flag_accelerator_type"; fi
# What goes on after a preemption is what was begun, whatever is committed meanwhile.
if [[ ! $flag_package && $DRY_RUN == no ]]; then
  commit=$(git -C "$HERE" rev-parse --verify --quiet "${flag_commit:-HEAD}^{commit}") ||
    die "no commit '${flag_commit:-HEAD}' here. Say what to install: --commit COMMIT, or --package 'jaxtune[tpu,gcs]'."
else
  commit=$flag_commit
fi

# flags_for "name zone": those of the flags given that another script knows.
flags_for() {
  local flag name
  CHOSEN=()
  for flag in "${FLAGS_GIVEN[@]}"; do
    name=${flag#--}
    case " $1 dry_run " in *" ${name%%=*} "*) CHOSEN+=("$flag") ;; esac
  done
}

# Not waited for: the loop below waits, and looks at the clock meanwhile.
create() {
  [[ $flag_accelerator_type ]] || die "$NAME is gone, and without --accelerator_type it cannot be asked for again."
  flags_for "name zone project accelerator_type runtime_version node_count spot reserved \
valid_until_duration service_account network subnetwork internal_ips"
  "$HERE/create.sh" "${CHOSEN[@]}" "--max_hours=$hours" --no_wait
}

set_up_and_launch() {
  flags_for "name zone project package bucket"
  if [[ $commit ]]; then CHOSEN+=("--commit=$commit"); fi
  "$HERE/setup.sh" "${CHOSEN[@]}" || return
  launch all
}

launch() { # launch all | missing: of the workers
  flags_for "name zone project run copy"
  if [[ $1 == missing ]]; then CHOSEN+=(--missing); fi
  fresh=no # from here on something may be running, also where a worker does not answer
  "$HERE/launch.sh" "${CHOSEN[@]}" -- "${REST[@]}" || return
  launched=$(now)
}

# What launching alone did not do, setting up may: a bucket that is not mounted, a worker that is bare.
launch_again() { if ((misses)); then set_up_and_launch; else launch all; fi; }

# over CODE MESSAGE: the last word.
over() {
  local code=$1 where="--name $NAME ${PLACE[*]}"
  say "$NAME: $2"
  if ((code != 0 && code != STOPPED)); then
    NODES=("${NODES[0]}")
    on 0 "bash jaxtune-worker.sh log $name 50" >&2 || true
  fi
  if [[ $flag_delete_when_done && $QUEUED == yes ]] && ((code != BAD_INPUT)); then
    remove "$LOOKS" "$seconds" || code=$((code ? code : 1))
  else
    if [[ $flag_delete_when_done ]]; then say "$NAME is not deleted after exit 2: a result may wait on it."; fi
    say "$NAME is still there and costs. Fetch what you want (tpu_scripts/fetch.sh $where --from DIR --to out)," \
      "then: tpu_scripts/delete.sh $where"
  fi
  exit "$code"
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

# The run has ended as $verdict says, and not for a preemption.
ended() {
  if [[ $verdict == "exit $BAD_INPUT" ]]; then over "$BAD_INPUT" "run '$name' refuses its input (exit 2):"; fi
  if (($(now) - launched > TRAINED_HOURS * 3600)); then failures=0; fi
  failures=$((failures + 1))
  if ((failures >= most)); then over 1 "run '$name' has failed $failures times ($verdict):"; fi
  say "$NAME: run '$name' ended with $verdict; launching it again ($failures of $most)."
  try launch_again
}

# What was there before this script, and is not one to go on with.
refuse_what_is_not_ours() {
  local delete="tpu_scripts/delete.sh --name $NAME ${PLACE[*]}"
  if [[ $STATE == ABSENT ]]; then return; fi
  if [[ $QUEUED == no && $flag_delete_when_done ]]; then
    die "--delete_when_done: $NAME was not asked for by these scripts, and is not theirs to delete." \
      "Leave the flag out, and delete it yourself: $delete"
  fi
  if past; then
    die "$NAME was asked for $(hours_since "$began") hours ago and is PAST ITS --max_hours $hours. It is left as it" \
      "is, AND COSTS. Give it more (--max_hours), or delete it: $delete"
  fi
}

past() { (($(now) - began > hours * 3600)); }

began=$(now)
launched=$began
first=yes # nothing is known yet
fresh=no  # yes: it was asked for here, and nothing was launched on it
quiet=''  # since when it does not answer
failures=0 refused=0 misses=0
asked=0 # how often in a row, without its having been seen
before='' said=''
while true; do
  slice ABSENT
  what=$(meaning "$STATE")
  if [[ $STATE != "$before" ]]; then say "$(date '+%F %T') $NAME: $STATE ${WHY:-}"; fi
  before=$STATE
  if [[ ! $flag_max_hours && $HOURS_LABEL =~ ^[1-9][0-9]*$ ]]; then hours=$HOURS_LABEL; fi
  # The age of a VM that was not queued is nothing to us.
  if [[ $CREATED && $QUEUED == yes ]] && (($(epoch "$CREATED") < began)); then began=$(epoch "$CREATED"); fi
  if [[ $what == unknown ]]; then # what cannot be seen may still be running
    pause "$seconds"
    continue
  fi
  if [[ $first == yes ]]; then
    first=no
    refuse_what_is_not_ours
  fi
  if past; then
    again="The same command goes on from the last checkpoint."
    if [[ $STATE == ABSENT ]]; then
      say "$NAME: --max_hours $hours are over; it is not asked for again. $again"
    elif [[ $QUEUED == no ]]; then
      say "$NAME: --max_hours $hours are over. It was not asked for by these scripts and is left as it is, AND COSTS;" \
        "run '$name' may be going on (tpu_scripts/launch.sh --stop)."
    else
      say "$NAME: --max_hours $hours are over; deleting it. $again"
      remove "$LOOKS" "$seconds" || exit 1
    fi
    exit "$STOPPED"
  fi
  if [[ $what != absent ]]; then asked=0; fi
  case $what in
  absent)
    if ((asked >= most)); then
      say "$NAME: it was asked for $asked times in a row and is not there."
      exit 1
    fi
    code=0
    create || code=$?
    if ((code == 0 || code == STOPPED)); then
      asked=$((asked + 1))
      if ((code)); then say "$NAME: not asked for; trying again ($asked of $most)."; fi
      misses=0 fresh=yes quiet=''
      pause "$seconds"
    else
      slice ABSENT # it may be there all the same, a little later than the look above
      if [[ $STATE == ABSENT || $STATE == UNKNOWN ]]; then exit "$code"; fi
    fi
    if [[ $DRY_RUN == yes ]]; then
      slice "ACTIVE||$ACCELERATOR|${flag_node_count:-1}||"
      set_up_and_launch
      pause "$seconds"
      reports "$name" >/dev/null
      echo "# and so on, until every worker has ended. After a preemption:" >&3
      remove "$LOOKS" "$seconds"
      echo "# and from the beginning. At the end:" >&3
      STATE=ACTIVE
      over 0 "done."
    fi
    ;;
  stopped)
    die "$NAME is $STATE: somebody stopped it. Start it yourself (gcloud compute tpus tpu-vm start NODE" \
      "${PLACE[*]}), then this command again. Nothing was deleted."
    ;;
  failed | gone)
    if [[ $STATE == DELETING ]]; then
      pause "$seconds"
      continue
    fi
    if [[ $QUEUED == no ]]; then
      die "$NAME is $STATE. It was not asked for by these scripts, and is not theirs to delete. Delete it" \
        "(tpu_scripts/delete.sh --name $NAME ${PLACE[*]}); with --accelerator_type this command then asks for a slice."
    fi
    why=$WHY
    if [[ $what == failed ]]; then refused=$((refused + 1)); fi
    # It does not come back: "You can't restart TPU Spot VMs, and you must recreate them after
    # preemption" (https://cloud.google.com/tpu/docs/spot). The name is free once it is deleted.
    remove "$LOOKS" "$seconds" || true # it has said so; the next look begins anew
    if ((refused >= most)); then
      say "$NAME: $refused requests failed: ${why:-no reason given}. Another zone, or fewer chips?"
      exit 1
    fi
    pause "$seconds"
    ;;
  ready)
    refused=0
    verdict=$(reports "$name" | verdict)
    if [[ $verdict != "$said" ]]; then say "$(date '+%F %T') $NAME: run '$name': $verdict"; fi
    said=$verdict
    if [[ $verdict != unreachable ]]; then quiet=''; fi
    case $verdict in
    bare | absent) try set_up_and_launch ;;
    partial) try launch missing ;; # those that run wait minutes for the others, and then end
    'exit 0') over 0 "run '$name' is done." ;;
    "exit $DIVERGED") over "$DIVERGED" "run '$name' has diverged (exit 3); the last good checkpoint is kept:" ;;
    exit*)
      # A host that goes takes the others down with it before the state of the slice says so: whatever
      # they say, 2 too, counts only where the slice is still there afterwards.
      pause "$seconds"
      slice ABSENT
      if [[ $STATE == ACTIVE ]]; then ended; fi
      ;;
    unreachable)
      quiet=${quiet:-$(now)}
      if [[ $fresh == yes ]] && (($(now) - quiet > QUIET_MINUTES * 60)); then
        over 1 "its workers have not answered for $QUIET_MINUTES minutes, and nothing was launched. Try by hand: gcloud \
compute tpus tpu-vm ssh ${NODES[0]} ${PLACE[*]}. A passphrase nobody typed (ssh-add)? A firewall without tcp:22? With \
--internal_ips this has to run inside the network."
      fi
      ;; # else it may be running: the next look says
    *) ;; # running
    esac
    pause "$seconds"
    ;;
  *) pause "$seconds" ;; # waiting
  esac
done

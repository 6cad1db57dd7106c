# shellcheck shell=bash disable=SC2034
# What the scripts beside this file share: flags, dry runs, and what gcloud is asked. Sourced.
#
# Written for bash 3.2 as well, which is what macOS has: no associative arrays, no ${x@Q}, and
# ${a[@]+"${a[@]}"} where an array may be empty. Of gcloud only commands of the GA track are used.

HERE=$(dirname "${BASH_SOURCE[0]}") # no script changes its directory
DRY_RUN=no
FLAGS_GIVEN=()
PLACE=()
REST=()
exec 3>&1 # commands are shown here, also from inside $(...)

BAD_INPUT=2
DIVERGED=3
STOPPED=75 # EX_TEMPFAIL: the same command goes on
SECRETS=(HF_TOKEN WANDB_API_KEY)
HOW_SECRETS_TRAVEL='setup.sh sends it by file.'

say() { printf '%s\n' "$*" >&2; }
die() {
  say "${0##*/}: $*"
  exit "$BAD_INPUT"
}

# -- flags ----------------------------------------------------------------------------------------

# The comment at the head of the script is its help.
help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# parse "name= spot copy+" "$@": --name VALUE into $flag_name, --spot into $flag_spot=yes, every
# --copy into the array flag_copy; what follows -- into REST. '-' and '_' are the same in a name.
parse() {
  local known=" $1 help dry_run " word flag value with
  shift
  for word in $known; do
    case $word in
    *+) eval "flag_${word%+}=()" ;; # a name of ours, from the line above
    *) printf -v "flag_${word%=}" '%s' '' ;;
    esac
  done
  while (($#)); do
    word=$1
    shift
    case $word in
    -h) word=--help ;;
    --)
      REST=("$@")
      break
      ;;
    --*) ;;
    *) die "'$word' belongs to no flag. Every value needs its --name; arguments of train follow --." ;;
    esac
    flag=${word#--} with=no value=
    if [[ $flag == *=* ]]; then value=${flag#*=} flag=${flag%%=*} with=yes; fi
    flag=${flag//-/_}
    if [[ $flag =~ ^[a-z_]+$ && $known == *" $flag "* ]]; then
      [[ $with == no ]] || die "--$flag takes no value; got '$value'."
      printf -v "flag_$flag" yes
      FLAGS_GIVEN+=("--$flag")
    elif [[ $flag =~ ^[a-z_]+$ && ($known == *" $flag= "* || $known == *" $flag+ "*) ]]; then
      if [[ $with == no ]]; then
        if (($# == 0)) || [[ $1 == --* ]]; then die "--$flag needs a value."; fi
        value=$1
        shift
      fi
      FLAGS_GIVEN+=("--$flag=$value")
      if [[ $known == *" $flag+ "* ]]; then
        eval "flag_$flag+=(\"\$value\")"
      else
        printf -v "flag_$flag" '%s' "$value"
      fi
    else
      die "unknown flag '$word'. --help lists the flags."
    fi
  done
  if [[ $flag_help == yes ]]; then
    help
    exit 0
  fi
  if [[ $flag_dry_run == yes ]]; then DRY_RUN=yes; fi
}

# Checks --name, --zone and --project and makes NAME and PLACE of them.
place() {
  NAME=$flag_name
  [[ $NAME ]] || die "--name is missing: the name of the slice."
  # The rule of the Cloud TPU API for ids; it also keeps the name harmless in a remote command.
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die "--name: lower-case letters, digits and '-', beginning with a letter; got '$NAME'."
  zone_and_project
}

zone_and_project() {
  [[ $flag_zone =~ ^[a-z0-9-]+$ ]] || die "--zone is missing, or no zone: '$flag_zone'. E.g. us-west4-a."
  PLACE=("--zone=$flag_zone")
  if [[ $flag_project ]]; then PLACE+=("--project=$flag_project"); fi
}

whole() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "--$1: a whole number above 0; got '$2'."; }
number() { [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--$1: a number; got '$2'."; }
# no_secrets WORD...: what stands among arguments ends in logs, in `ps` and in manifests.
no_secrets() {
  local secret value
  for secret in "${SECRETS[@]}"; do
    value=${!secret:-}
    if [[ $value && "$*" == *"$value"* ]]; then
      die "the value of $secret stands among the arguments, which end in logs. $HOW_SECRETS_TRAVEL"
    fi
  done
}

# Before a slice costs anything: is what --copy names there?
copies() {
  local file
  for file in ${flag_copy[@]+"${flag_copy[@]}"}; do
    [[ -f $file || $DRY_RUN == yes ]] || die "--copy: no such file: $file"
    [[ ${file##*/} =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
      die "--copy: a name of letters, digits, '.', '_' and '-'; got '${file##*/}'."
  done
}
run_name() { [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "--run: letters, digits, '.', '_', '-'; got '$1'."; }

# -- running and showing --------------------------------------------------------------------------

# The words as a line that could be pasted into a shell.
quoted() {
  local word line='' mark="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./~-]+$ ]]; then
      line+=" $word"
    else
      word=${word//\'/$mark}
      line+=" '$word'"
    fi
  done
  printf '%s' "${line# }"
}

run() { if [[ $DRY_RUN == yes ]]; then printf '+ %s\n' "$(quoted "$@")" >&3; else "$@"; fi; }

# ask ANSWER command...: a question to gcloud; a dry run shows it and takes ANSWER for the answer.
ask() {
  local answer=$1
  shift
  if [[ $DRY_RUN == yes ]]; then
    printf '+ %s\n' "$(quoted "$@")" >&3
    printf '%s\n' "$answer"
  else
    "$@"
  fi
}

pause() { if [[ $DRY_RUN == yes ]]; then printf '+ sleep %s\n' "$1" >&3; else sleep "$1"; fi; }

# A folder of our own for what is sent; only its owner can read it, and it goes with the script.
private_folder() {
  if [[ $DRY_RUN == yes ]]; then
    FOLDER=/tmp/jaxtune.XXXXXX
  else
    FOLDER=$(umask 077 && mktemp -d "${TMPDIR:-/tmp}/jaxtune.XXXXXX")
    trap 'rm -rf "$FOLDER"' EXIT
  fi
}

# -- types of TPU ---------------------------------------------------------------------------------

# tpu_type v5e-16: sets ACCELERATOR (gcloud's name), RUNTIME (the VM's image) and CHIPS of a slice.
# Images: https://cloud.google.com/tpu/docs/runtimes (PyTorch and JAX). The names of v4 and v5p count
# TensorCores, two to a chip; those of v5e and v6e count chips.
tpu_type() {
  local kind=${1%-*} size=${1##*-}
  [[ $1 == *-* && $size =~ ^[1-9][0-9]*$ ]] || die "--accelerator_type: e.g. v5e-16; got '$1'."
  case $kind in
  v5e | v5litepod) ACCELERATOR=v5litepod-$size RUNTIME=v2-alpha-tpuv5-lite CHIPS=$size ;;
  v6e) ACCELERATOR=v6e-$size RUNTIME=v2-alpha-tpuv6e CHIPS=$size ;;
  v5p) ACCELERATOR=v5p-$size RUNTIME=v2-alpha-tpuv5 CHIPS=$((size / 2)) ;;
  v4) ACCELERATOR=v4-$size RUNTIME=tpu-ubuntu2204-base CHIPS=$((size / 2)) ;;
  tpu7x | v7x)
    # "For Ironwood (TPU7x), you must use Google Kubernetes Engine":
    # https://cloud.google.com/tpu/docs/queued-resources
    die "--accelerator_type: the Cloud TPU API has no tpu7x; rent it through GKE: tpu_scripts/gke.sh."
    ;;
  *) die "--accelerator_type: v4-N, v5e-N (v5litepod-N), v5p-N or v6e-N; got '$1'." ;;
  esac
}

# chips_of TYPE: of any slice that there is, also of one that these scripts do not make; or nothing.
chips_of() {
  local size=${1##*-}
  [[ $size =~ ^[1-9][0-9]*$ ]] || return 0
  case ${1%-*} in
  v5litepod | v5e | v6e) echo "$size" ;;
  v2 | v3 | v4 | v5p) echo $((size / 2)) ;;
  esac
}

# -- the slice ------------------------------------------------------------------------------------

# slice ASSUMED: sets STATE, CREATED, TYPE, NODES (array), HOURS_LABEL, WHY, QUEUED from what gcloud
# says. STATE is a state of the queued resource; when that is ACTIVE, the worst state of its VMs;
# ABSENT when there is neither; UNKNOWN when gcloud does not answer (WHY has its words). QUEUED=no: a
# VM that somebody made with `tpu-vm create`.
# States: https://cloud.google.com/tpu/docs/queued-resources, and TPU nodes' own (READY, PREEMPTED).
slice() {
  local answer count node i errors worst=0
  STATE=UNKNOWN CREATED='' TYPE='' NODES=("$NAME") HOURS_LABEL='' WHY='' QUEUED=yes
  errors=$(mktemp "${TMPDIR:-/tmp}/jaxtune.XXXXXX")
  if answer=$(ask "$1" gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
    "--format=value[separator=|](state.state,createTime,tpu.nodeSpec[0].node.acceleratorType.basename(),tpu.nodeSpec[0].multisliceParams.nodeCount,tpu.nodeSpec[0].node.labels.jaxtune_max_hours,state.failedData.error.message)" \
    2>"$errors"); then
    IFS='|' read -r STATE CREATED TYPE count HOURS_LABEL WHY <<<"$answer"
    if [[ $STATE == ABSENT ]]; then # only ever assumed, in a dry run
      rm -f "$errors"
      return
    fi
    if [[ $count =~ ^[0-9]+$ ]] && ((count > 1)); then
      NODES=()
      for ((i = 0; i < count; i++)); do NODES+=("$NAME-$i"); done
    fi
    if [[ $STATE == ACTIVE ]]; then
      for node in "${NODES[@]}"; do
        answer=$(ask READY gcloud compute tpus tpu-vm describe "$node" "${PLACE[@]}" \
          '--format=value(state)' 2>"$errors") || answer=$(missing_or_unknown "$errors" VANISHED)
        if [[ $answer != READY ]] && (($(badness "$answer") > worst)); then
          STATE=$answer worst=$(badness "$answer")
          if [[ $STATE == UNKNOWN ]]; then WHY=$(tail -n 3 "$errors"); fi
        fi
      done
    fi
  elif [[ $(missing_or_unknown "$errors" ABSENT) == ABSENT ]]; then
    # Not queued: a VM that somebody made with `tpu-vm create` will do as well.
    QUEUED=no
    if answer=$(gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" \
      "--format=value[separator=|](state,createTime,acceleratorType.basename())" 2>"$errors"); then
      IFS='|' read -r STATE CREATED TYPE <<<"$answer"
      if [[ $STATE == READY ]]; then STATE=ACTIVE; fi
    else
      STATE=$(missing_or_unknown "$errors" ABSENT)
    fi
  fi
  if [[ $STATE == UNKNOWN && ! $WHY ]]; then WHY=$(tail -n 3 "$errors"); fi
  rm -f "$errors"
}

missing_or_unknown() { if grep -qiE 'NOT_FOUND|was not found|could not find' "$1"; then echo "$2"; else echo UNKNOWN; fi; }

# What a state means for whoever waits: ready, wait, gone, stopped, failed, absent or unknown.
meaning() {
  case $1 in
  ACTIVE) echo ready ;;
  CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | STARTING | RESTARTING | REPAIRING | REIMAGING) echo wait ;;
  STOPPING | STOPPED) echo stopped ;; # by a person: `tpu-vm stop`
  FAILED) echo failed ;;
  ABSENT) echo absent ;;
  UNKNOWN | '') echo unknown ;;
  *) echo gone ;; # SUSPENDING, SUSPENDED, PREEMPTED, TERMINATED, DELETING, VANISHED
  esac
}

# badness STATE: of several VMs the worst one decides. What is gone does not come back, whatever the
# others do; what is not known may be either.
badness() {
  case $(meaning "$1") in
  gone) echo 5 ;;
  failed) echo 4 ;;
  stopped) echo 3 ;;
  unknown) echo 2 ;;
  *) echo 1 ;;
  esac
}

needs_active() {
  slice ACTIVE
  [[ $STATE != ABSENT ]] || die "$NAME: no such slice in $flag_zone. Make it: tpu_scripts/create.sh."
  [[ $STATE == ACTIVE ]] || die "$NAME is $STATE, not ACTIVE. ${WHY:-tpu_scripts/status.sh says more.}"
}

# delete_slice: the request with its VMs (--force), or a VM that was not queued.
delete_slice() {
  if [[ $QUEUED == yes ]]; then
    run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$NAME" "${PLACE[@]}" --quiet
  fi
}

# remove LOOKS SECONDS: deletes the slice and looks until it is gone, for a request to delete can fail
# as any other. Says so, and returns 1, when it is there after so many looks.
remove() {
  local look
  for ((look = 1; look <= $1; look++)); do
    if [[ $STATE != DELETING ]]; then delete_slice || say "$NAME: gcloud has not deleted it."; fi
    slice ABSENT
    if [[ $STATE == ABSENT ]]; then return; fi
    if ((look < $1)); then pause "$2"; fi
  done
  say "$NAME: NOT DELETED, it is still there ($STATE) AND MAY COST. ${WHY:-Look with tpu_scripts/status.sh.}"
  return 1
}

# -- its VMs --------------------------------------------------------------------------------------

# A VM that goes away in the middle of a connection says nothing: without these a script waits for it
# for ever, and one that guards --max_hours guards nothing meanwhile.
SSH_FLAGS=(--ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30)
SCP_FLAGS=(--scp-flag=-oConnectTimeout=30 --scp-flag=-oServerAliveInterval=30)

# on WORKER command: on every slice; WORKER is `all` or a number. gcloud runs the workers of a slice
# at once and gives back the first exit code that is not 0.
on() {
  local node
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" "--worker=$1" --quiet "${SSH_FLAGS[@]}" "--command=$2"
  done
}

send() { # send FILE...: to the home of every worker
  local node
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm scp "$@" "$node:" "${PLACE[@]}" --worker=all --quiet "${SCP_FLAGS[@]}"
  done
}

# reports RUN: one line "jaxtune-status HOST STATE..." of each worker that answers.
reports() {
  local node
  for node in "${NODES[@]}"; do
    ask 'jaxtune-status worker-0 exit 0' \
      gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --worker=all --quiet "${SSH_FLAGS[@]}" \
      "--command=test -f jaxtune-worker.sh && bash jaxtune-worker.sh status $1 || echo jaxtune-status \$(hostname) bare" \
      2>/dev/null || echo "jaxtune-status $node unreachable"
  done | grep '^jaxtune-status ' || true
}

# verdict: of such lines, what holds for all: unreachable, bare, absent, partial (some were never
# started, and the others wait for them), running, or exit CODE. A worker that failed decides over one
# that saved; nobody has finished while one runs; where one was not started, the exit code of another
# says only that it was alone.
verdict() {
  awk '
    $3 == "unreachable" { lost = 1 } $3 == "bare" { bare = 1 } $3 == "absent" { absent = 1 }
    $3 == "running" { running = 1 }
    $3 == "lost" { other = 137 }
    $3 == "exit" { if ($4 == 3) three = 1; else if ($4 == 2) two = 1
                   else if ($4 == 75) stopped = 1; else if ($4 != 0) other = $4 }
    END {
      if (NR == 0 || lost) print "unreachable"
      else if (running && absent) print "partial"
      else if (running) print "running"
      else if (three) print "exit 3"
      else if (bare) print "bare"
      else if (absent) print "absent"
      else if (two) print "exit 2"
      else if (other) print "exit " other
      else if (stopped) print "exit 75"
      else print "exit 0"
    }'
}

# -- time and money -------------------------------------------------------------------------------

now() { date +%s; }

# epoch 2026-11-24T01:00:00.123Z: seconds, with GNU's date or BSD's.
epoch() {
  local plain=${1%%.*}
  plain=${plain%Z}
  date -u -d "${plain}Z" +%s 2>/dev/null || date -u -j -f %Y-%m-%dT%H:%M:%S "$plain" +%s
}

hours_since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", (b - a) / 3600 }'; }

# cost PRICE: one line of what the slice is, for how long it has been asked for, and its price.
cost() {
  local hours=0 chips size="${#NODES[@]} x $TYPE"
  if [[ $CREATED ]]; then hours=$(hours_since "$(epoch "$CREATED")"); fi
  if [[ ! $TYPE ]]; then
    say "$NAME: $STATE, requested $hours hours ago"
    return
  fi
  chips=$(chips_of "$TYPE") # nothing for a type that is not in our table: what there is is said all the same
  if [[ $chips ]]; then
    chips=$((chips * ${#NODES[@]}))
    size+=" = $chips chips"
  fi
  if [[ $1 && $chips ]]; then
    say "$NAME: $STATE, $size, requested $hours hours ago, $(awk -v c="$chips" \
      -v p="$1" -v h="$hours" 'BEGIN { printf "%.2f an hour, at most %.2f so far", c * p, c * p * h }')"
  elif [[ $1 ]]; then
    say "$NAME: $STATE, $size, requested $hours hours ago (how many chips that is, and so its price, is not known here)"
  else
    say "$NAME: $STATE, $size, requested $hours hours ago (--price_per_chip_hour says what that costs)"
  fi
  if [[ $HOURS_LABEL =~ ^[0-9]+$ ]] && awk -v h="$hours" -v m="$HOURS_LABEL" 'BEGIN { exit !(h > m) }'; then
    say "$NAME: PAST ITS --max_hours $HOURS_LABEL. Delete it: tpu_scripts/delete.sh."
  fi
}

#!/usr/bin/env bash
# Deletes a slice, so that it costs nothing any more; first says what runs on it and what it has cost.
#
#   tpu_scripts/delete.sh --name tune --zone us-west4-a --price_per_chip_hour 1.2
#
# --name NAME --zone ZONE --project PROJECT    the slice, or a TPU VM made without these scripts
# --run RUN      the run to look for; default: train
# --price_per_chip_hour P   of your contract, in your currency
# --yes          do not ask
# --dry_run      print every command, run none
#
# What lies on the VMs goes with them. Fetch first, or have written to a bucket.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= run= price_per_chip_hour= yes" "$@"
place
name=${flag_run:-train}
run_name "$name"
if [[ $flag_price_per_chip_hour ]]; then number price_per_chip_hour "$flag_price_per_chip_hour"; fi
slice ACTIVE
case $STATE in
ABSENT)
  say "$NAME: there is none in $flag_zone. Nothing to delete."
  exit 0
  ;;
UNKNOWN) die "$NAME: gcloud does not say what it is: $WHY. Nothing was deleted; it may still cost." ;;
esac
if [[ $DRY_RUN == no ]]; then cost "$flag_price_per_chip_hour"; fi
if [[ $STATE == ACTIVE ]]; then
  verdict=$(reports "$name" | verdict)
  case $verdict in
  running | partial) say "$NAME: run '$name' IS STILL RUNNING. launch.sh --stop lets it save first." ;;
  unreachable) say "$NAME: its workers do not answer; whether something runs is not known." ;;
  exit*) say "$NAME: run '$name' has ended, $verdict." ;;
  *) say "$NAME: no run '$name' on it." ;;
  esac
fi
if [[ ! $flag_yes && $DRY_RUN == no ]]; then
  [[ -t 0 ]] || die "nobody to ask whether to delete $NAME; --yes deletes without asking."
  read -r -p "Delete $NAME and everything on its VMs? Type its name: " answer
  [[ $answer == "$NAME" ]] || die "not deleted: '$answer' is not its name. It goes on costing."
fi
remove 5 15 || exit "$BAD_INPUT"
if [[ $DRY_RUN == no ]]; then say "$NAME: deleted."; fi

#!/usr/bin/env bash
# Says what a slice is doing, for how long, and at what price; without --name, what there is in a zone.
#
#   tpu_scripts/status.sh --zone us-west4-a --name tune --price_per_chip_hour 1.2
#   tpu_scripts/status.sh --zone us-west4-a
#
# --zone ZONE --project PROJECT
# --name NAME    the slice; without it all queued resources and TPU VMs of the zone are listed
# --run RUN      default: train
# --price_per_chip_hour P   of your contract, in your currency
# --dry_run      print every command, run none
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= run= price_per_chip_hour=" "$@"
if [[ ! $flag_name ]]; then
  zone_and_project
  run gcloud compute tpus queued-resources list "${PLACE[@]}"
  run gcloud compute tpus tpu-vm list "${PLACE[@]}"
  exit 0
fi
place
name=${flag_run:-train}
run_name "$name"
if [[ $flag_price_per_chip_hour ]]; then number price_per_chip_hour "$flag_price_per_chip_hour"; fi
slice ACTIVE
if [[ $STATE == ABSENT || $STATE == UNKNOWN ]]; then
  say "$NAME: $STATE $WHY"
  exit 0
fi
cost "$flag_price_per_chip_hour"
if [[ $WHY ]]; then say "$NAME: $WHY"; fi
if [[ $STATE == ACTIVE ]]; then reports "$name"; fi

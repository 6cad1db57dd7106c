#!/usr/bin/env bash
# Asks for a TPU slice through a queued resource and waits until it is there.
#
#   tpu_scripts/create.sh --name tune --zone us-west4-a --accelerator_type v5e-16 --spot
#
# --name NAME              of the queued resource; its VM is NAME, with --node_count NAME-0, NAME-1...
# --zone ZONE              where the type is offered: gcloud compute tpus accelerator-types list
# --project PROJECT        default: gcloud's
# --accelerator_type TYPE  v4-N, v5e-N (v5litepod-N), v5p-N, v6e-N. tpu7x: gke.sh
# --runtime_version IMAGE  default: by the type
# --node_count N           so many slices of that type, one run over all of them (multi-slice); default 1
# --spot                   cheaper, and can be taken away at any time: resume.sh goes on by itself
# --reserved               from a reservation of the project. Without either: on demand
# --max_hours N            written on the slice (label jaxtune_max_hours): resume.sh deletes it after
#                          that, status.sh and delete.sh say when it is past; default 24
# --valid_until_duration D the request lapses when it is not filled by then; default 6h. Without it a
#                          forgotten request is filled, and paid for, days later
# --service_account EMAIL  of the VMs: what may read and write the bucket
# --network NAME --subnetwork NAME
# --internal_ips           VMs without an outer address. The scripts then have to run inside that network (gcloud
#                          takes the inner address by itself), and the network needs Cloud NAT: setup.sh installs
#                          from PyPI, GitHub and apt
# --poll_seconds N         between two looks; default 30
# --no_wait                come back as soon as the request is queued
# --dry_run                print every command, run none
#
# Exit code 0: ACTIVE (or queued, with --no_wait). 2: refused (quota, rights, a wrong value), or failed.
# 75: taken away again, or gcloud did not answer: the same command again.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= accelerator_type= runtime_version= node_count= spot reserved max_hours= \
valid_until_duration= service_account= network= subnetwork= internal_ips poll_seconds= no_wait" "$@"
place
[[ $flag_accelerator_type ]] || die "--accelerator_type is missing, e.g. v5e-16."
[[ ! $flag_spot || ! $flag_reserved ]] || die "--spot and --reserved: choose one."
tpu_type "$flag_accelerator_type"
count=${flag_node_count:-1} hours=${flag_max_hours:-24} seconds=${flag_poll_seconds:-30}
whole node_count "$count"
whole max_hours "$hours"
whole poll_seconds "$seconds"

slice ABSENT
case $STATE in
ABSENT) ;;
UNKNOWN)
  say "$NAME: gcloud does not say whether it exists: $WHY"
  exit "$STOPPED"
  ;;
DELETING)
  say "$NAME is still being deleted. The same command again in a minute."
  exit "$STOPPED"
  ;;
*) die "$NAME exists already and is $STATE. Use it, delete it (tpu_scripts/delete.sh), or take another name." ;;
esac

words=("--accelerator-type=$ACCELERATOR" "--runtime-version=${flag_runtime_version:-$RUNTIME}")
if ((count > 1)); then
  words+=("--node-count=$count" "--node-prefix=$NAME")
else
  words+=("--node-id=$NAME")
fi
if [[ $flag_spot ]]; then words+=(--spot); fi
if [[ $flag_reserved ]]; then words+=(--reserved); fi
words+=("--labels=jaxtune_max_hours=$hours" "--valid-until-duration=${flag_valid_until_duration:-6h}")
if [[ $flag_service_account ]]; then words+=("--service-account=$flag_service_account"); fi
if [[ $flag_network ]]; then words+=("--network=$flag_network"); fi
if [[ $flag_subnetwork ]]; then words+=("--subnetwork=$flag_subnetwork"); fi
if [[ $flag_internal_ips ]]; then words+=(--internal-ips); fi

errors=$(mktemp "${TMPDIR:-/tmp}/jaxtune.XXXXXX")
trap 'rm -f "$errors"' EXIT
if ! run gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "${words[@]}" --quiet 2>"$errors"; then
  # Too many requests in a minute are called a quota as well, and pass by themselves.
  if grep -qiE 'quota|RESOURCE_EXHAUSTED' "$errors" && ! grep -qiE 'RATE_LIMIT|per minute' "$errors"; then
    die "$NAME: the quota of this project has no room for $((CHIPS * count)) chips of $ACCELERATOR in" \
      "$flag_zone. Ask for more (console, IAM & Admin, Quotas), or try --spot (a quota of its own), fewer" \
      "chips, another zone. gcloud says: $(tail -n 3 "$errors")"
  fi
  say "$NAME: not created. gcloud says: $(tail -n 5 "$errors")"
  if grep -qE 'PERMISSION_DENIED|INVALID_ARGUMENT' "$errors"; then exit "$BAD_INPUT"; fi
  exit "$STOPPED"
fi
if [[ $flag_no_wait ]]; then exit 0; fi

before=''
while true; do
  slice "ACTIVE||$ACCELERATOR|$count||"
  if [[ $STATE != "$before" ]]; then say "$NAME: $STATE"; fi
  before=$STATE
  case $(meaning "$STATE") in
  ready) exit 0 ;;
  failed) die "$NAME: the request failed: ${WHY:-no reason given}. Delete it (tpu_scripts/delete.sh --name" \
    "$NAME ${PLACE[*]}), then ask again, in another zone or for fewer chips." ;;
  gone | stopped)
    say "$NAME was taken away before it was used ($STATE)."
    exit "$STOPPED"
    ;;
  absent) die "$NAME: the request is gone; somebody deleted it." ;;
  *) pause "$seconds" ;;
  esac
done

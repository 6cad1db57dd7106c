#!/usr/bin/env bash
# Brings results of a run to this machine.
#
#   tpu_scripts/fetch.sh --from gs://my-bucket/llama --to out
#   tpu_scripts/fetch.sh --name tune --zone us-west4-a --from /home/me/out --to out
#
# --from DIR     the run's --output_dir: gs://..., or a folder of worker 0. What lies under /mnt/jaxtune
#                is gs://BUCKET/..., and is there still when the slice is gone
# --to DIR       made if missing
# --what NAMES   of what the folder holds, with commas; default hf,config.yaml,metrics.jsonl. `all`
#                brings everything, checkpoints too
# --name NAME --zone ZONE --project PROJECT    the slice, for a folder of worker 0
# --dry_run      print every command, run none
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= from= to= what=" "$@"
[[ $flag_from ]] || die "--from is missing: the run's --output_dir."
[[ $flag_to ]] || die "--to is missing: a folder of this machine."
from=${flag_from%/}
if [[ $from != gs://* ]]; then
  [[ $from =~ ^[A-Za-z0-9_/.~-]+$ ]] || die "--from: letters, digits, '/', '.', '_', '-'; got '$from'."
  place
  needs_active
fi
run mkdir -p "$flag_to"
IFS=, read -r -a items <<<"${flag_what:-hf,config.yaml,metrics.jsonl}"
for item in "${items[@]}"; do
  path=$from/$item
  if [[ $item == all ]]; then path=$from; fi
  if [[ $from == gs://* ]]; then
    run gcloud storage cp --recursive "$path" "$flag_to/"
  else
    run gcloud compute tpus tpu-vm scp --recurse "${NODES[0]}:$path" "$flag_to/" "${PLACE[@]}" --worker=0 --quiet "${SCP_FLAGS[@]}"
  fi
done

#!/usr/bin/env bash
# Starts one run on every worker of a slice, in the background; the same command goes on after a stop.
#
#   tpu_scripts/launch.sh --name tune --zone us-west4-a --copy train.jsonl -- \
#     --config configs/llama-3.1-8b.yaml --dataset train.jsonl --output_dir /mnt/jaxtune/llama
#
# --name NAME --zone ZONE --project PROJECT    the slice, set up by setup.sh
# --run RUN        a name for the log and the exit code on the workers; default: train
# --copy FILE      send FILE to the working directory of every worker; may be given several times
# --missing        start it where it does not run; without this a worker on which it runs is an error
# --stop           instead: SIGTERM to the run; it saves and ends with exit code 75. A resume.sh that
#                  watches it starts it again: end that first
# --dry_run        print every command, run none
# -- ARGUMENTS     of python -m jaxtune.train; paths are relative to ~/jaxtune on the worker
#
# The workers find each other: JAX reads the slice's addresses from the VM's metadata.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= run= copy+ missing stop" "$@"
place
name=${flag_run:-train} verb=start
run_name "$name"
if [[ ! $flag_stop ]]; then
  ((${#REST[@]})) || die "what to train is missing: -- --config FILE --dataset FILE --output_dir DIR."
  no_secrets "${REST[@]}"
  copies
fi
needs_active
if [[ $flag_stop ]]; then
  on all "bash jaxtune-worker.sh stop $name"
  exit 0
fi
if ((${#flag_copy[@]})); then
  send "${flag_copy[@]}"
  on all "mv -f $(for file in "${flag_copy[@]}"; do printf '%s ' "${file##*/}"; done)jaxtune/"
fi
if [[ $flag_missing ]]; then verb=ensure; fi
on all "bash jaxtune-worker.sh $verb $name $(quoted "${REST[@]}")"

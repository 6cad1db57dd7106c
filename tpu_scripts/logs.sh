#!/usr/bin/env bash
# Follows the log of a run.
#
#   tpu_scripts/logs.sh --name tune --zone us-west4-a
#
# --name NAME --zone ZONE --project PROJECT    the slice
# --run RUN      default: train
# --worker N     whose log: 0, 1, ... or all; default 0, which prints the losses
# --lines N      how many of the last lines first; default 100
# --once         do not follow
# --dry_run      print every command, run none
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= run= worker= lines= once" "$@"
place
name=${flag_run:-train} worker=${flag_worker:-0} lines=${flag_lines:-100} follow=follow
run_name "$name"
whole lines "$lines"
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker: a number or all; got '$worker'."
if [[ $flag_once ]]; then follow=''; fi
needs_active
if [[ $worker != all ]]; then NODES=("${NODES[0]}"); fi # slice 0 holds the process that prints
on "$worker" "bash jaxtune-worker.sh log $name $lines $follow"

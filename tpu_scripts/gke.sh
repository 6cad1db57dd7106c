#!/usr/bin/env bash
# Starts a run on TPU slices of a GKE cluster: fills jobset.yaml and gives it to kubectl.
#
#   tpu_scripts/gke.sh --name tune --accelerator_type v5e-16 --spot --image REGISTRY/jaxtune:tpu \
#     --bucket my-bucket -- \
#     --config configs/llama-3.1-8b.yaml --dataset /mnt/jaxtune/train.jsonl --output_dir /mnt/jaxtune/llama
#
# --name NAME              of the JobSet
# --accelerator_type TYPE  v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N: the slice, as node pool or autopilot has it
# --topology AxBxC         needed for v4, v5p and tpu7x, where a size has several shapes
# --chips_per_node N       default: 4, or all of a v5e or v6e slice of up to 8 chips
# --node_count N           so many slices of several VMs each, one run over all of them; default 1
# --spot                   on nodes that can be taken away
# --reservation NAME       on nodes of a reservation. Without either: on demand
# --image IMAGE            built from the Dockerfile
# --bucket BUCKET          seen by every pod at /mnt/jaxtune (the cluster needs the Cloud Storage FUSE driver)
# --service_account NAME   of Kubernetes, allowed to use the bucket; default: default
# --secret NAME            a Secret with the keys HF_TOKEN and WANDB_API_KEY, either may be missing; default jaxtune
# --disk_gib N             of a node's disk that a pod must find: models from the hub, and what goes to or comes
#                          from a store; default 60, for which the node pool needs --disk-size 200. 0: any
# --max_restarts N         after preemptions and failures; default 20 for each slice, any of which restarts all
# --print                  print the manifest, apply nothing
# --dry_run                print the manifest and the command, run nothing
#
# The same command again goes on from the newest checkpoint: a JobSet of that name that has ended is
# deleted and made anew; one that has not is left alone (exit code 2).
# Watch: kubectl logs -f -c train -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
# Stop: kubectl delete jobset NAME.
#
# The manifest is filled by bash: a dozen values, all checked here, need neither Helm nor kustomize, and
# envsubst is missing on many machines.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"
HOW_SECRETS_TRAVEL='--secret names the Secret of the cluster that brings it.'

parse "name= accelerator_type= topology= chips_per_node= node_count= spot reservation= image= bucket= \
service_account= secret= disk_gib= max_restarts= print" "$@"

# plain FLAG VALUE: what may stand between quotes in YAML
plain() { [[ $2 =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || die "--$1: missing, or with unusual characters: '$2'."; }

# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: labels and topologies
shape() { # of v5e and v6e, by chips
  case $1 in
  1) echo 1x1 ;; 4) echo 2x2 ;; 8) echo 2x4 ;; 16) echo 4x4 ;; 32) echo 4x8 ;;
  64) echo 8x8 ;; 128) echo 8x16 ;; 256) echo 16x16 ;;
  esac
}
type=$flag_accelerator_type
kind=${type%-*} size=${type##*-}
[[ $type == *-* && $size =~ ^[1-9][0-9]*$ ]] || die "--accelerator_type: e.g. v5e-16; got '$type'."
case $kind in
v5e | v5litepod) accelerator=tpu-v5-lite-podslice chips=$size ;;
v6e) accelerator=tpu-v6e-slice chips=$size ;;
v5p) accelerator=tpu-v5p-slice chips=$((size / 2)) ;;
v4) accelerator=tpu-v4-podslice chips=$((size / 2)) ;;
tpu7x) accelerator=tpu7x chips=$((size / 2)) ;;
*) die "--accelerator_type: v4-N, v5e-N, v5p-N, v6e-N or tpu7x-N; got '$type'." ;;
esac
topology=$flag_topology per_node=${flag_chips_per_node:-4}
whole chips_per_node "$per_node"
case $kind in
v5e | v5litepod | v6e)
  topology=${topology:-$(shape "$size")}
  [[ $topology ]] || die "--accelerator_type: $kind has 1, 4, 8, 16, 32, 64, 128 or 256 chips; got $size."
  if [[ ! $flag_chips_per_node ]] && ((chips <= 8)); then per_node=$chips; fi
  ;;
*) [[ $topology ]] || die "--topology is missing: $type has several shapes, e.g. 2x2x1 for 4 chips." ;;
esac
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "--topology: e.g. 4x4 or 2x2x1; got '$topology'."
((${topology//x/*} == chips)) || die "--topology $topology has $((${topology//x/*})) chips; $type has $chips."
((chips % per_node == 0)) || die "--chips_per_node $per_node does not divide the $chips chips of $type."

[[ $flag_name =~ ^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$ ]] || die "--name: lower-case letters, digits and '-'; got '$flag_name'."
plain image "$flag_image"
plain bucket "$flag_bucket"
service_account=${flag_service_account:-default} secret=${flag_secret:-jaxtune}
plain service_account "$service_account"
plain secret "$secret"
slices=${flag_node_count:-1} disk=${flag_disk_gib:-60}
whole node_count "$slices"
restarts=${flag_max_restarts:-$((20 * slices))}
whole max_restarts "$restarts"
[[ $disk == 0 ]] || whole disk_gib "$disk"
# A node pool of single VMs is many slices, and "one Job on one node pool" would leave all but one idle.
((slices == 1 || chips > per_node)) ||
  die "--node_count $slices: $type is a single VM, and slices of one run must be of several. Take one larger slice."
[[ ! $flag_spot || ! $flag_reservation ]] || die "--spot and --reservation: choose one."
capacity=''
if [[ $flag_spot ]]; then
  capacity='cloud.google.com/gke-spot: "true"'
elif [[ $flag_reservation ]]; then
  plain reservation "$flag_reservation"
  capacity="cloud.google.com/reservation-name: \"$flag_reservation\""
fi
((${#REST[@]})) || die "what to train is missing: -- --config FILE --dataset FILE --output_dir DIR."

no_secrets "${REST[@]}"

arguments='' # a list of JSON strings, which YAML reads as they are
for word in "${REST[@]}"; do
  [[ $word != *[[:cntrl:]]* ]] || die "an argument has a control character (a line's end?): '$word'."
  word=${word//\\/\\\\}
  arguments+=", \"${word//\"/\\\"}\""
done

manifest=$(<"$HERE/jobset.yaml")
fill() { manifest=${manifest//"@$1@"/"$2"}; }
if [[ $capacity ]]; then
  fill CAPACITY "$capacity"
else
  manifest=$(sed '/@CAPACITY@/d' <<<"$manifest")
fi
if [[ $disk == 0 ]]; then
  manifest=$(sed '/requests:/,/@DISK_GIB@/d' <<<"$manifest")
else
  fill DISK_GIB "$disk"
fi
fill NAME "$flag_name"
fill MAX_RESTARTS "$restarts"
fill SLICES "$slices"
fill HOSTS "$((chips / per_node))"
fill CHIPS_A_HOST "$per_node"
fill SERVICE_ACCOUNT "$service_account"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill IMAGE "$flag_image"
fill SECRET "$secret"
fill BUCKET "$flag_bucket"
manifest=${manifest//@ARGUMENTS@/"[${arguments#, }]"} # last: an argument may look like a placeholder
manifest=$(sed '1,/^[^#]/{/^#/d;}' <<<"$manifest")

if [[ $flag_print ]]; then
  printf '%s\n' "$manifest"
  exit 0
fi
unready="kubectl did not do it. Is JobSet installed (kubectl get crd jobsets.jobset.x-k8s.io)? --print shows the manifest."
# Applied to a JobSet that has ended, the same manifest changes nothing, and a changed one is refused.
found=$(ask '' kubectl get jobset "$flag_name" --ignore-not-found \
  "-o=jsonpath={.metadata.name} {range .status.conditions[?(@.status=='True')]}{.type} {end}") || die "$unready"
case " $found " in
*' Completed '* | *' Failed '*)
  say "$flag_name has ended and is made anew; the run goes on from its newest checkpoint."
  run kubectl delete jobset "$flag_name" --wait
  ;;
*[a-z]*) die "$flag_name is there and has not ended. Wait for it, or: kubectl delete jobset $flag_name" ;;
esac
if [[ $DRY_RUN == yes ]]; then
  run kubectl apply -f -
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<<"$manifest" || die "$unready"
fi

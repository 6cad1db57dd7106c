#!/usr/bin/env bash
# Installs jaxtune on every worker of a slice: uv, Python 3.12, jaxtune[tpu]. Can be run again.
#
#   HF_TOKEN=... tpu_scripts/setup.sh --name tune --zone us-west4-a --bucket my-bucket
#
# --name NAME --zone ZONE --project PROJECT    the slice, or a TPU VM made without these scripts
# --package SPEC   what uv installs, e.g. 'jaxtune[tpu,gcs]==0.1'; default: this checkout, as it is committed
# --commit COMMIT  of this checkout, instead of the newest
# --bucket BUCKET  mount gs://BUCKET at /mnt/jaxtune with Cloud Storage FUSE. What is to outlive a
#                  preemption cannot lie on a VM, and several workers need one place for --output_dir:
#                  a folder of the mount, or gs://BUCKET/... without one. Another bucket takes the place of
#                  the one before, unless a run is using that
# --dry_run        print every command, run none
#
# HF_TOKEN and WANDB_API_KEY, where they are set in the environment, travel in a file that only its
# owner can read (~/.jaxtune/secrets.env on each worker), never on a command line. One that is not set
# this time stays there as it was.
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "$0")/lib.sh"

parse "name= zone= project= package= commit= bucket=" "$@"
place
[[ $flag_bucket =~ ^([a-z0-9][a-z0-9._-]+)?$ ]] || die "--bucket: a name without gs://; got '$flag_bucket'."
[[ ! $flag_package || ! $flag_commit ]] || die "--package and --commit: choose one."
[[ $flag_commit =~ ^[A-Za-z0-9._/-]*$ && $flag_commit != -* ]] || die "--commit: a commit, a tag or a branch; got '$flag_commit'."
needs_active
private_folder

files=("$HERE/worker.sh") package=$flag_package
run cp "${files[0]}" "$FOLDER/jaxtune-worker.sh"
files=("$FOLDER/jaxtune-worker.sh")
if [[ ! $package ]]; then
  git -C "$HERE" rev-parse HEAD >/dev/null 2>&1 ||
    die "this is not a git checkout. Say what to install: --package 'jaxtune[tpu]'."
  git -C "$HERE" rev-parse --verify --quiet "${flag_commit:-HEAD}^{commit}" >/dev/null ||
    die "--commit: this checkout has no '$flag_commit'."
  if [[ $(git -C "$HERE" status --porcelain --untracked-files=no) ]]; then
    say "setup.sh: what is not committed is not sent."
  fi
  run git -C "$HERE/.." archive --format=tar.gz "--output=$FOLDER/jaxtune-source.tar.gz" "${flag_commit:-HEAD}"
  files+=("$FOLDER/jaxtune-source.tar.gz")
  package='.[tpu,gcs]'
fi
names=()
for name in "${SECRETS[@]}"; do
  value=${!name:-}
  if [[ $value ]]; then
    names+=("$name")
    if [[ $DRY_RUN == no ]]; then
      (umask 077 && printf '%s=%q\n' "$name" "$value" >>"$FOLDER/jaxtune-secrets.env")
    fi
  fi
done
if ((${#names[@]})); then
  say "setup.sh: ${names[*]} will be sent in a private file."
  files+=("$FOLDER/jaxtune-secrets.env")
fi
send "${files[@]}"
on all "bash jaxtune-worker.sh setup $(quoted "$package") $flag_bucket"

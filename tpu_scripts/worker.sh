#!/usr/bin/env bash
# Runs on a worker of a TPU slice; setup.sh brings it there as ~/jaxtune-worker.sh.
#
#   bash jaxtune-worker.sh setup PACKAGE [BUCKET]   uv, Python 3.12, PACKAGE; gs://BUCKET at /mnt/jaxtune
#   bash jaxtune-worker.sh start RUN ARGUMENTS...   train in the background; a closed ssh does not end it
#   bash jaxtune-worker.sh ensure RUN ARGUMENTS...  start, where it does not run already
#   bash jaxtune-worker.sh status RUN               one line: absent, running, exit CODE, or lost
#   bash jaxtune-worker.sh log RUN LINES [follow]
#   bash jaxtune-worker.sh stop RUN                 SIGTERM: train saves and ends with exit code 75
#
# ~/jaxtune is the working directory of a run (.venv lies there, and configs of the source), ~/.jaxtune/runs/RUN
# holds its log, its pid and at the end its exit code, ~/.jaxtune/secrets.env what may not be seen,
# ~/.jaxtune/bucket the name of the bucket, which a VM that was started anew has to mount again.
set -euo pipefail

work=$HOME/jaxtune
own=$HOME/.jaxtune
mount=/mnt/jaxtune

setup() {
  local package=$1 bucket=${2:-}
  mkdir -p "$work" "$own/runs"
  chmod 700 "$own"
  if [[ -f jaxtune-secrets.env ]]; then keep_secrets jaxtune-secrets.env; fi
  # Not into the working directory: what lies there is imported before what is installed, and would
  # still be after a setup with another package. Emptied, for a file that the new source lacks is a file.
  if [[ -f jaxtune-source.tar.gz ]]; then
    rm -rf "$own/source"
    mkdir "$own/source"
    tar -xzf jaxtune-source.tar.gz -C "$own/source"
    rm jaxtune-source.tar.gz
    ln -sfn "$own/source/configs" "$work/configs"
  fi
  export PATH=$HOME/.local/bin:$PATH
  # https://docs.astral.sh/uv/getting-started/installation/
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd "$work"
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
  # Again whatever is installed: the same version may be of another commit.
  if [[ $package == .\[* ]]; then package=$own/source${package#.}; fi
  uv pip install --quiet --python .venv/bin/python --reinstall-package jaxtune "$package"
  .venv/bin/python -c 'import jax, jaxtune; print("jaxtune", jaxtune.__version__, "jax", jax.__version__)'
  if [[ $bucket ]]; then mount_bucket "$bucket"; fi
}

# keep_secrets FILE: lines NAME=VALUE; a name that the file lacks keeps the value it had.
keep_secrets() {
  local old=$own/secrets.env
  (
    umask 077
    cat "$1" >"$old.new"
    if [[ -f $old ]]; then
      grep -vE "^($(cut -d= -f1 "$1" | paste -sd '|' -))=" "$old" >>"$old.new" || true
    fi
  )
  mv "$old.new" "$old"
  rm "$1"
}

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
mount_bucket() {
  local bucket=$1 mounted=''
  if [[ -f $own/bucket ]]; then mounted=$(cat "$own/bucket"); fi
  if mountpoint -q $mount; then
    if [[ $mounted == "$bucket" ]]; then return; fi
    fusermount -u $mount || {
      echo "$(hostname): $mount is gs://${mounted:-another bucket} and in use; stop the run that uses it before gs://$bucket takes its place" >&2
      exit 2
    }
  else
    # Of a gcsfuse that died the mount is left, and answers "Transport endpoint is not connected".
    fusermount -u $mount 2>/dev/null || true
  fi
  if ! command -v gcsfuse >/dev/null; then install_gcsfuse; fi
  sudo mkdir -p $mount
  sudo chown "$(id -u):$(id -g)" $mount
  # A checkpoint is finished by renaming its folder. A bucket with a hierarchical namespace does that
  # at once; any other copies the files one by one, and only with this limit raised.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" $mount
  echo "$bucket" >"$own/bucket"
}

install_gcsfuse() {
  local look
  curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A fresh VM updates itself first and holds apt's locks meanwhile. DPkg::Lock::Timeout waits for the
  # one of dpkg only, and `update` takes that of the lists.
  for ((look = 0; look < 60; look++)); do
    if sudo apt-get -qq update; then break; fi
    sleep 10
  done
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse
}

# What is written under /mnt/jaxtune with nothing mounted there is on the disk of this VM alone, and is
# lost with it; and a run that looks there for its checkpoints finds none and begins anew.
needs_mount() {
  local word
  if [[ -f $own/bucket ]]; then mount_bucket "$(cat "$own/bucket")" >&2; fi
  for word in "$@"; do
    case $word in
    "$mount" | "$mount"/* | *="$mount" | *="$mount"/*) ;;
    *) continue ;;
    esac
    if ! mountpoint -q $mount; then
      echo "$(hostname): nothing is mounted at $mount, but '$word' is to be there. First: tpu_scripts/setup.sh --bucket BUCKET" >&2
      exit 2
    fi
  done
}

start() {
  local folder=$own/runs/$1
  if [[ $(state "$1") == running ]]; then
    echo "$(hostname): $1 is running already" >&2
    exit 2
  fi
  needs_mount "${@:2}"
  mkdir -p "$folder"
  rm -f "$folder/exit" "$folder/pid"
  # A session of its own: nothing that happens to the ssh connection reaches it.
  setsid nohup bash "$0" run "$@" >>"$folder/log" 2>&1 </dev/null &
  echo $! >"$folder/pid"
  echo "$(hostname): $1 started"
}

ensure() {
  if [[ $(state "$1") == running ]]; then
    echo "$(hostname): $1 is running already"
  else
    start "$@"
  fi
}

# `run` is what `start` leaves behind: it waits for train and writes down how it ended.
run() {
  local folder=$own/runs/$1 code=0
  shift
  # A VM that goes down sends SIGTERM to everybody: train has to save, so this must outlive it. A
  # handler, unlike '', is not inherited.
  trap : TERM INT HUP
  cd "$work"
  if [[ -f $own/secrets.env ]]; then
    set -a
    # shellcheck disable=SC1091
    . "$own/secrets.env"
    set +a
  fi
  .venv/bin/python -m jaxtune.train "$@" || code=$?
  echo "$code" >"$folder/exit.new"
  mv "$folder/exit.new" "$folder/exit"
}

state() {
  local folder=$own/runs/$1
  if [[ -f $folder/exit ]]; then
    echo "exit $(cat "$folder/exit")"
  elif [[ ! -f $folder/pid ]]; then
    echo absent
  elif kill -0 "$(cat "$folder/pid")" 2>/dev/null; then
    echo running
  else
    echo lost # killed, or the VM was started anew
  fi
}

log() {
  if [[ ${3:-} == follow ]]; then
    exec tail -n "$2" -F "$own/runs/$1/log"
  fi
  tail -n "$2" "$own/runs/$1/log"
}

stop() {
  [[ $(state "$1") == running ]] || return 0
  kill -TERM -- "-$(cat "$own/runs/$1/pid")" # the session: train and whoever waits for it
}

case ${1:-} in
# exit: bash reads a script as it goes, and by the end of a run setup.sh may have put another one here.
setup | start | ensure | run | log | stop)
  "$@"
  exit
  ;;
status) echo "jaxtune-status $(hostname) $(state "$2")" ;;
*)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  [[ ${1:-} == --help ]] || exit 2
  ;;
esac

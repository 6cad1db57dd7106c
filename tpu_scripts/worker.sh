#!/usr/bin/env bash
# Runs on a worker of a TPU slice; setup.sh brings it there as ~/jaxtune-worker.sh.
#
#   bash jaxtune-worker.sh setup PACKAGE [BUCKET]   uv, Python 3.12, PACKAGE; gs://BUCKET at /mnt/jaxtune
#   bash jaxtune-worker.sh start RUN ARGUMENTS...   train in the background; a closed ssh does not end it
#   bash jaxtune-worker.sh status RUN               one line: absent, running, exit CODE, or lost
#   bash jaxtune-worker.sh log RUN LINES [follow]
#   bash jaxtune-worker.sh stop RUN                 SIGTERM: train saves and ends with exit code 75
#
# ~/jaxtune is the working directory of a run (.venv lies there), ~/.jaxtune/runs/RUN holds its log, its
# pid and at the end its exit code, ~/.jaxtune/secrets.env what may not be seen.
set -euo pipefail

work=$HOME/jaxtune
own=$HOME/.jaxtune

setup() {
  local package=$1 bucket=${2:-}
  mkdir -p "$work" "$own/runs"
  chmod 700 "$own"
  if [[ -f jaxtune-secrets.env ]]; then
    chmod 600 jaxtune-secrets.env
    mv jaxtune-secrets.env "$own/secrets.env"
  fi
  if [[ -f jaxtune-source.tar.gz ]]; then
    tar -xzf jaxtune-source.tar.gz -C "$work"
    rm jaxtune-source.tar.gz
  fi
  export PATH=$HOME/.local/bin:$PATH
  # https://docs.astral.sh/uv/getting-started/installation/
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd "$work"
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python "$package"
  .venv/bin/python -c 'import jax, jaxtune; print("jaxtune", jaxtune.__version__, "jax", jax.__version__)'
  if [[ $bucket ]]; then mount_bucket "$bucket"; fi
}

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
mount_bucket() {
  mountpoint -q /mnt/jaxtune && return
  if ! command -v gcsfuse >/dev/null; then
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A fresh VM updates itself first and holds apt's lock meanwhile.
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse
  fi
  sudo mkdir -p /mnt/jaxtune
  sudo chown "$(id -u):$(id -g)" /mnt/jaxtune
  # A checkpoint is finished by renaming its folder. A bucket with a hierarchical namespace does that
  # at once; any other copies the files one by one, and only with this limit raised.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" /mnt/jaxtune
}

start() {
  local folder=$own/runs/$1
  if [[ $(state "$1") == running ]]; then
    echo "$(hostname): $1 is running already" >&2
    exit 2
  fi
  mkdir -p "$folder"
  rm -f "$folder/exit" "$folder/pid"
  # A session of its own: nothing that happens to the ssh connection reaches it.
  setsid nohup bash "$0" run "$@" >>"$folder/log" 2>&1 </dev/null &
  echo $! >"$folder/pid"
  echo "$(hostname): $1 started"
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
setup | start | run | log | stop) "$@" ;;
status) echo "jaxtune-status $(hostname) $(state "$2")" ;;
*)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  [[ ${1:-} == --help ]] || exit 2
  ;;
esac

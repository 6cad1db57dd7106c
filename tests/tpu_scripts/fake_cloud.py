"""A cloud made of files: `gcloud`, `kubectl`, `sleep` on PATH record calls and answer by script.

What is asked of it is a file of answers, one a line; each call takes the first, and the last stays,
of a slice until it is deleted. `sleep` returns at once, and `date +%s` is later by what was slept.

`lives` says more with less than `states` and `vms`: each line is the states of one slice from its
creation on, with ';' between them; its VMs are READY when it is ACTIVE. A report `gone:STATE` takes
it away.
"""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu_scripts"
ABSENT = "!NOT_FOUND: Resource 'tune' was not found"

# An answer that begins with '!' is an error: the rest goes to stderr, the exit code is 1. What
# kubectl reads from stdin is kept too. Files sent by scp are copied with their permissions, for the
# temporary folder is gone when the script ends.
_CLOUD = r"""#!/bin/bash
cd "$CLOUD" || exit 99
none='!NOT_FOUND: was not found'
if [[ ${0##*/} == date ]]; then
  if [[ $* == +%s ]]; then echo $(($(/bin/date +%s) + $(cat slept 2>/dev/null || echo 0))); exit; fi
  exec /bin/date "$@"
fi
printf '%s\n' "${0##*/} $*" >>calls
answer() {
  [[ -f $1 ]] || { echo "$2"; return; }
  local line
  line=$(head -n 1 "$1")
  if (($(wc -l <"$1") > 1)); then tail -n +2 "$1" >"$1.rest"; mv "$1.rest" "$1"; fi
  echo "$line"
}
deleted() { # an answer that would stay is gone with the slice; what is scripted to follow follows
  local file
  if [[ -f lives ]]; then rm -f states vms; fi
  for file in states vms; do
    if [[ -f $file ]] && (($(wc -l <"$file") == 1)); then echo "$none" >"$file"; fi
  done
}
ready() { if [[ $(cat last) == ACTIVE* ]]; then echo READY; else echo "$none"; fi; }
reply() {
  if [[ $1 == !* ]]; then echo "ERROR: ${1#!}" >&2; exit 1; fi
  if [[ $1 ]]; then printf '%s\n' "$1" | tr ';' '\n'; fi
}
case "${0##*/} $*" in
  sleep*) echo $(($(cat slept 2>/dev/null || echo 0) + $1)) >slept.new; mv slept.new slept ;;
  'kubectl get'*) reply "$(answer jobsets '')" ;;
  'kubectl delete'*) ;;
  kubectl*) cat >stdin; reply "$(answer kubectl '')" ;;
  *'queued-resources describe'*)
    answer states "$none" >last
    reply "$(cat last)" ;;
  *'queued-resources create'*)
    said=$(answer creates '')
    if [[ $said != !* && -f lives ]]; then answer lives '' | tr ';' '\n' >states; fi
    reply "$said" ;;
  *'queued-resources delete'* | *'tpu-vm delete'*) said=$(answer deletes '')
    if [[ $said != !* && $said != kept ]]; then deleted; fi
    reply "${said#kept}" ;;
  *'tpu-vm describe'*) reply "$(answer vms "$(ready)")" ;;
  *'worker.sh status'*)
    said=$(answer reports 'jaxtune-status w-0 running')
    if [[ $said == gone:* ]]; then
      echo "${said#gone:}" >states
      said='!ssh: connect: timed out'
    fi
    reply "$said" ;;
  *'worker.sh start'* | *'worker.sh ensure'*) reply "$(answer starts "$(answer ssh '')")" ;;
  *'tpu-vm ssh'*) reply "$(answer ssh '')" ;;
  *'tpu-vm scp'*) mkdir -p sent
    for word in "$@"; do if [[ -f $word ]]; then cp -p "$word" sent/; fi; done ;;
esac
"""


class Cloud:
    """The fake cloud in `folder`, and the scripts run against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        for name in ("gcloud", "kubectl", "sleep", "date"):
            (self.path / name).write_text(_CLOUD)
            (self.path / name).chmod(0o755)

    def answers(self, question: str, *lines: str) -> None:
        (self.folder / question).write_text("".join(f"{line}\n" for line in lines))

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def verbs(self) -> list[str]:
        """What changed something, in order: create, delete, and what the workers were told."""
        found = []
        for call in self.calls:
            for mark, verb in _VERBS.items():
                if mark in call:
                    found.append(verb)
        return found

    def run(
        self, script: str, *words: str, stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "WANDB_API_KEY")}
        return subprocess.run(
            [str(SCRIPTS / script), *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            cwd=ROOT,
            input=stdin or "",
            env={
                **clean,
                "CLOUD": str(self.folder),
                "PATH": f"{self.path}:{os.environ['PATH']}",
                "TMPDIR": str(self.folder),
                **environment,
            },
        )


_VERBS = {
    "queued-resources create": "create",
    "queued-resources delete": "delete",
    "tpu-vm delete": "delete vm",
    "worker.sh setup": "setup",
    "worker.sh start": "start",
    "worker.sh ensure": "ensure",
    "worker.sh stop": "stop",
}


def hours_ago(hours: float) -> str:
    """As gcloud writes times."""
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)
    return then.strftime("%Y-%m-%dT%H:%M:%S.123456789Z")

"""A cloud made of files: `gcloud`, `kubectl`, `sleep` on PATH record calls and answer by script.

What is asked of it is a file of answers, one a line; each call takes the first and the last stays.
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
printf '%s\n' "${0##*/} $*" >>calls
answer() {
  [[ -f $1 ]] || { echo "$2"; return; }
  local line rest
  line=$(head -n 1 "$1")
  if (($(wc -l <"$1") > 1)); then rest=$(tail -n +2 "$1"); printf '%s\n' "$rest" >"$1"; fi
  echo "$line"
}
reply() {
  if [[ $1 == !* ]]; then echo "ERROR: ${1#!}" >&2; exit 1; fi
  if [[ $1 ]]; then printf '%s\n' "$1" | tr ';' '\n'; fi
}
case "${0##*/} $*" in
  sleep*) ;;
  kubectl*) cat >stdin; reply "$(answer kubectl '')" ;;
  *'queued-resources describe'*) reply "$(answer states '!NOT_FOUND: was not found')" ;;
  *'queued-resources create'*) reply "$(answer creates '')" ;;
  *'queued-resources delete'* | *'tpu-vm delete'*) reply "$(answer deletes '')" ;;
  *'tpu-vm describe'*) reply "$(answer vms '!NOT_FOUND: was not found')" ;;
  *'worker.sh status'*) reply "$(answer reports 'jaxtune-status w-0 running')" ;;
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
        for name in ("gcloud", "kubectl", "sleep"):
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
    "worker.sh stop": "stop",
}


def hours_ago(hours: float) -> str:
    """As gcloud writes times."""
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)
    return then.strftime("%Y-%m-%dT%H:%M:%S.123456789Z")

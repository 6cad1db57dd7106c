"""A conversation at the terminal that it was started on, with one who repeats, slowly.

python slow.py [HISTORY_FILE]
"""

from __future__ import annotations

import fcntl
import sys
import termios
import time
from collections.abc import Generator, Sequence

from jaxtune.cli import ThisProcess
from jaxtune.data.schema import Message
from jaxtune.inference.generate import Generation
from jaxtune.repl.models import ChatModel, ChatSettings
from jaxtune.repl.repl import run_conversation


def say(messages: Sequence[Message], settings: ChatSettings) -> Generator[str, None, Generation]:
    text = messages[-1].content
    if text == "steer":
        text = "\x1b[2J\x1b]0;mine\x07\rgone\u202e\x9b31m"
    for word in text.split("_"):
        yield word
        time.sleep(0.05 if len(text) < 100 else 0.02)
    yield f" ({len(messages)} messages)"
    return Generation(text, True, 1)


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C on it is a signal here
    ThisProcess.is_command = True
    history = sys.argv[1] if len(sys.argv) > 1 else None
    run_conversation([ChatModel("model", say)], ChatSettings(), history=history)
    print("left")

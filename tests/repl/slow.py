"""A conversation at the terminal that it was started on, with one who repeats, slowly.

python slow.py [HISTORY_FILE]
"""

from __future__ import annotations

import fcntl
import sys
import termios
import time
from collections.abc import Generator, Sequence

from jaxtune.data.schema import Message
from jaxtune.repl.models import Ended, Settings, Voice
from jaxtune.repl.repl import converse


def say(messages: Sequence[Message], settings: Settings) -> Generator[str, None, Ended]:
    text = messages[-1].content
    if text == "steer":
        text = "\x1b[2J\x1b]0;mine\x07\rgone\u202e\x9b31m"
    for word in text.split("_"):
        yield word
        time.sleep(0.05 if len(text) < 100 else 0.02)
    yield f" ({len(messages)} messages)"
    return Ended(True, False)


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C on it is a signal here
    history = sys.argv[1] if len(sys.argv) > 1 else None
    converse([Voice("model", say)], Settings(), history=history)
    print("left")

"""`jaxtune COMMAND ...` and `python -m jaxtune COMMAND ...` are `python -m jaxtune.COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

from jaxtune import __version__
from jaxtune.config import nearest

# command -> what it does, in the order a newcomer meets them
COMMANDS = {
    "preview": "show exactly what would be trained, then the data report",
    "plan": "does it fit, and what it costs, compiled for hardware that is not here",
    "train": "Hugging Face model in, fine-tuned Hugging Face model out",
    "evaluate": "loss, perplexity, token accuracy, generations; base and tuned side by side",
    "chat": "talk to a model in the terminal, or answer a file of prompts",
    "report": "one page for a run directory: curves, data, examples, answers",
    "convert": "a checkpoint or a run -> Hugging Face format",
}


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print("usage: jaxtune COMMAND [--help] ...\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:9} {purpose}")
        return 0
    if words[0] == "--version":
        print(f"jaxtune {__version__}")
        return 0
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = nearest(words[0], COMMANDS)
        print(f"jaxtune: no command '{words[0]}'.{hint} There are: {known}.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"jaxtune.{words[0]}")
    return int(module.main(words[1:]))


if __name__ == "__main__":
    sys.exit(main())

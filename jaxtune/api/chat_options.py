"""The flags of `chat`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from jaxtune import cli
from jaxtune.config import ConfigError


class ChatOptions(cli.Options):
    prompt: str | None = Field(None, description="ask this and leave")
    prompts: str | None = Field(
        None, description='.jsonl file, each line with "prompt" or "messages"'
    )
    output: str | None = Field(None, description="where the answers to --prompts go, not stdout")
    max_new_tokens: int = Field(512, ge=1, description="longest answer, in tokens")
    base: str | None = Field(None, description="a second model, asked the same")
    temperature: float = Field(
        0.0, ge=0, description="0 is greedy; 1 draws as the model says; above, more widely"
    )
    top_k: int = Field(0, ge=0, description="draws among the N likeliest tokens; 0 is all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draws among the likeliest tokens that make up this share"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1 makes tokens that were said less likely; 1 is off"
    )
    sample_seed: int = Field(
        0,
        ge=0,
        description="the same seed draws the same answers, however many are made at once; a server "
        "that is given none draws one for each request",
    )
    history: str | None = Field(
        None, description="file of the lines typed, read and written; none is kept otherwise"
    )
    serve: str | None = Field(
        None,
        description="[HOST]:PORT of an OpenAI-compatible server and a page to talk to; without a "
        "host only this machine reaches it; needs pip install 'jaxtune[serve]'",
    )
    serve_slots: int = Field(
        8, ge=1, description="answers that each model makes at a time; each takes memory"
    )
    serve_queue: int = Field(
        64, ge=1, description="requests that may wait for one; more are refused with 429"
    )
    serve_length: int | None = Field(
        None,
        ge=2,
        description="longest prompt and answer together, in tokens; as long as the "
        "model takes and memory allows unless given",
    )
    serve_seconds: float = Field(
        300.0, gt=0, description="longest time from a request to the end of its answer"
    )

    def check(self) -> None:
        """Refuse options that exclude each other. Raises: ConfigError."""
        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("prompt and prompts exclude each other; give one.")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("prompt: is empty; there is nothing to answer.")
        for name in ("prompt", "prompts", "history"):
            if self.serve is not None and getattr(self, name) is not None:
                raise ConfigError(f"serve and {name} exclude each other; give one.")
        if self.output is None:
            return
        if self.prompts is None:
            raise ConfigError("output: is for the answers to --prompts FILE.jsonl. Give that, too.")
        folder = Path(self.output).parent
        if not folder.is_dir():
            raise ConfigError(f"output {self.output}: there is no folder {folder}. Make it.")
        if Path(self.output).is_dir():
            raise ConfigError(f"output {self.output}: is a folder; expected a file to write.")

"""The model card of an export: what it was made from, on what data, with what result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from jaxtune import __version__


def model_card(
    *,
    base: str,
    random_start: bool,
    template: str,
    metrics: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any],
    config: str,
) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads.

    `metrics` holds the last "train" and "eval" rows; `data` is the data report; `config` the
    resolved config as YAML, which repeats the run.
    """
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["jaxtune", "sft"]}
    if not random_start and not PurePath(base).is_absolute() and base.count("/") == 1:
        header["base_model"] = base
    start = "random weights of the architecture" if random_start else "the weights"
    rows = "\n".join(
        f"| {name} | {value:.6g} |"
        for kind in ("train", "eval")
        for name, value in metrics.get(kind, {}).items()
        if isinstance(value, int | float) and name != "step"
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {PurePath(base).name}, instruction-tuned

Trained with [jaxtune](https://pypi.org/project/jaxtune/) {__version__} from {start} of `{base}`,
with the prompt template `{template}` (saved as `chat_template.jinja`). The loss was taken on the
answers only, their end of turn included.

## Result

| | |
|---|---|
{rows}

## Data

```json
{json.dumps(data, indent=1, ensure_ascii=False)}
```

## Config

```yaml
{config.strip()}
```
"""

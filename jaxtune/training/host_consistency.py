"""Check that the hosts of a run, or of an evaluation, are about to do the same.

Each host reads its own config, data and model, and makes its own rows of a batch: where one of them
has others, the run trains on what nobody asked for, or waits for ever. So all is compared, part by
part, before anything is built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import __version__
from jaxtune.config import Config, ConfigError, field_names
from jaxtune.data.dataset import Batches, Dataset
from jaxtune.data.progress import fingerprint
from jaxtune.hf.folders import is_adapter
from jaxtune.hf.load import HfModel, open_model
from jaxtune.hf.peft.base_identity import digests
from jaxtune.hf.peft.read import on_model, open_adapter
from jaxtune.parallel import processes
from jaxtune.training.initial_weights import Adapters
from jaxtune.training.run_dir import checkpoint_of, is_checkpoint
from jaxtune.training.subject import Subject
from jaxtune.tree import named

# Fields that each host may have its own of: where it writes, and how it works.
_OWN = ("output_dir", "dataset_num_proc", "compilation_cache_dir", "hang_timeout_seconds")
# And where something lies that is compared by what it holds.
_PLACES = ("dataset", "model_name_or_path", "tokenizer_name", "adapter_name_or_path")
_SHOWN = 60  # characters of a value
_NAMED = 3  # hosts that are alike
_PARTS = "parts"


def check_same(parts: Mapping[str, str]) -> None:
    """`parts` are this host's: name -> value or digest. All hosts call. Raises `ConfigError` on
    every one where they are not alike."""
    own = json.dumps(parts, sort_keys=True)
    if len(set(processes.gather_texts(_digest(own)))) == 1:
        return
    processes.publish(_PARTS, own)
    everyones = [json.loads(processes.receive(_PARTS, host)) for host in range(processes.count())]
    raise ConfigError(
        f"hosts: they are not about to run the same: {'; '.join(differences(everyones))}. Start "
        "the same command on all of them, with the same files and the same versions."
    )


def differences(everyones: Sequence[Mapping[str, str]]) -> list[str]:
    """A text for each part that is not alike on all hosts.

    >>> differences([{"seed": "1"}, {"seed": "2"}])
    ['seed is 2 on host 1 and 1 on host 0']
    """
    names = dict.fromkeys(name for parts in everyones for name in parts)
    values = {
        name: _by_value([parts.get(name, "unknown") for parts in everyones]) for name in names
    }
    return [f"{name} is {_listed(who)}" for name, who in values.items() if len(who) > 1]


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for host, value in enumerate(values):
        hosts.setdefault(value, []).append(host)
    return hosts


def _listed(who: Mapping[str, Sequence[int]]) -> str:
    """Describe the values, that of the fewest hosts first: of many it is theirs that is wrong."""
    texts = []
    for value, alike in sorted(who.items(), key=lambda item: (len(item[1]), -item[1][0])):
        shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
        named = ", ".join(map(str, alike[:_NAMED]))
        more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
        texts.append(f"{shown} on host {named}{more}")
    return " and ".join(texts)


def run_fingerprints(
    config: Config,
    subject: Subject,
    batches: Batches,
    held_out: Dataset | None,
    total_steps: int,
) -> dict[str, str]:
    """Collect the values that decide a run's numbers and its hosts' work together."""
    evaluated = held_out and _short([held_out.names, held_out.fingerprint])
    return {
        "jaxtune": __version__,
        "jax": jax.__version__,
        **_fields_of(config),
        "what is trained on (data, tokenizer, template, seed, rows)": fingerprint(batches)[:12],
        "what is evaluated on": evaluated or "nothing",
        "the number of steps": str(total_steps),
        "the base model": _base(subject.model),
        "the adapter it goes on from": _adapter(subject.adapters),
    }


def evaluation_fingerprints(
    config: Config,
    options: Mapping[str, Any],
    models: Sequence[str],
    datasets: Sequence[Dataset],
    prompts: Sequence[Sequence[int]],
) -> dict[str, str]:
    """Collect the values that decide an evaluation's numbers; `options` are its command's."""
    return {
        "jaxtune": __version__,
        "jax": jax.__version__,
        **_fields_of(config),
        **{name: json.dumps(value) for name, value in options.items()},
        "what is evaluated on": _short([[data.names, data.fingerprint] for data in datasets]),
        "what is asked": _short([list(map(int, ids)) for ids in prompts]),
        **{f"model {i}": _model(name, config) for i, name in enumerate(models)},
    }


def _model(name: str, config: Config) -> str:
    """A model folder or an adapter by samples of its weights, a checkpoint by its step."""
    if is_checkpoint(name):
        return f"step {checkpoint_of(Path(name))[1]}"
    if is_adapter(name):
        adapter = open_adapter(name)
        model, lora, leaves = on_model(adapter, open_model(adapter.base, revision=adapter.revision))
        return _short([_base(model), repr(lora), _digest_of(named(leaves))])
    return _base(open_model(name, revision=config.revision, weights=config.init == "pretrained"))


def _fields_of(config: Config) -> dict[str, str]:
    values = config.model_dump(mode="json")
    for entries in ("datasets", "eval_datasets"):
        for entry in values[entries]:
            del entry["path"]
    fields = {}
    for name in field_names(Config):
        group, _, leaf = name.partition(".")
        if group not in (*_OWN, *_PLACES, "hosts"):
            fields[name] = json.dumps(values[group][leaf] if leaf else values[group])
    return fields


def _base(model: HfModel) -> str:
    """By its shape and samples of its weights."""
    return _short([repr(model.spec), digests(model)])


def _adapter(adapters: Adapters | None) -> str:
    if adapters is None or adapters.start is None:
        return "none"
    return _digest_of(named(adapters.start))


def _digest_of(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()[:12]


def _short(value: Any) -> str:
    return _digest(json.dumps(value))[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""A config from YAML and from flags: the only way in.

`load` accepts the names people already type (`aliases`), refuses what it does not know with the
nearest name, and returns a frozen `Config` (`fields`). A message never grows with the data.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic_core import ErrorDetails

from jaxtune.config import fields
from jaxtune.config.aliases import ALIASES
from jaxtune.config.errors import ConfigError, JaxtuneError
from jaxtune.config.fields import DatasetConfig, ProportionsConfig, method_defaults

M = TypeVar("M", bound=pydantic.BaseModel)
_SHOWN = 200  # characters of a value in a message
_MISTAKES = 10  # lines of one message


class Config(fields.ConfigFields):
    """A run's whole config; it understands what `load` does: `dataset`, aliases, dotted names.

    Raises `ConfigError`.

    >>> Config(dataset="examples.jsonl", cutoff_len=512).max_length
    512
    """

    def __init__(self, /, **values: Any) -> None:
        merged: dict[str, Any] = {}
        _merge(merged, _flat(values, "Config"), "Config", note=lambda message: None)
        _fill(self, _nested(merged), "Config")


ConfigSource = str | Path | Mapping[str, Any] | Config


def load(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    note: Callable[[str], None] = lambda message: None,
) -> Config:
    """Read the config of a YAML file, or of a mapping in its place, with overrides on top.

    `overrides` maps names to values; dots reach into groups (`{"lora.r": 16}`), nested mappings
    work too. `note` receives one line for each alias used. Raises `ConfigError`.

    >>> load(overrides={"cutoff_len": "512", "mesh.fsdp": 8}).max_length
    512
    """
    values: dict[str, Any] = {}
    where = "config"
    if isinstance(source, Mapping):
        _merge(values, _flat(source, where), where, note)
    elif source is not None:
        if not isinstance(source, str | Path):
            raise ConfigError(
                f"config: expected a mapping, a Config or a YAML file; got {_cut(repr(source))}."
            )
        where = str(source)
        _merge(values, _flat(_read_yaml(Path(source)), where), where, note)
    _merge(values, _flat(overrides or {}, "flags"), "flags", note)
    nested = _nested(values)
    config = parse_model(Config, nested, where=where)
    for name, value in method_defaults(nested).items():
        text = value if isinstance(value, str) else f"{value:g}"
        lora = " and LoRA" if name == "learning_rate" and config.has_adapters else ""
        note(f"{name}: {text}, the default with {config.optim}{lora}")
    return config


def load_config(source: ConfigSource | None = None, **overrides: Any) -> Config:
    """Make a config of a YAML file, a mapping or another config, with keyword arguments on top.

    A group is a mapping (`lora={"r": 16}`). Raises `ConfigError`.

    >>> load_config({"cutoff_len": 512}, learning_rate=1e-4).learning_rate
    0.0001
    """
    if isinstance(source, Config):
        if not overrides:
            return source
        source = source.model_dump(exclude_unset=True)
    return load(source, overrides)


def dump(config: Config) -> str:
    """Write YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude={"dataset"}), sort_keys=False)


def field_names(model: type[pydantic.BaseModel]) -> dict[str, pydantic.fields.FieldInfo]:
    """Map dotted names to fields, groups (nested models) opened; lists of models stay a field."""
    names: dict[str, pydantic.fields.FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            inner = field_names(field.annotation)
            names.update({f"{name}.{key}": value for key, value in inner.items()})
        else:
            names[name] = field
    return names


def field_name(text: str) -> str:
    """Write a typed name as fields are called, with `_`; the keys of a mapping stay as they are.

    >>> [field_name(text) for text in ("lora-r", "mesh.fsdp", "columns.in-put")]
    ['lora_r', 'mesh.fsdp', 'columns.in-put']
    """
    name, dot, key = text.partition(".")
    name = name.replace("-", "_")
    whole = f"{name}{dot}{key}"
    return whole if entry_type(whole) else whole.replace("-", "_")


def entry_type(name: str) -> Any:
    """Return the type of one entry of a field that is a mapping; None if `name` is no such entry.

    >>> [entry_type(name) for name in ("columns.output", "columns", "mesh.fsdp")]
    [<class 'str'>, None, None]
    """
    field, _, key = name.partition(".")
    annotation = Config.model_fields[field].annotation if field in Config.model_fields else None
    is_entry = bool(key) and typing.get_origin(annotation) is dict
    return typing.get_args(annotation)[1] if is_entry else None


def nearest(name: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """Return ` Did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def parse_model(
    model: type[M],
    values: Mapping[str, Any],
    *,
    where: str,
    raises: type[JaxtuneError] = ConfigError,
) -> M:
    """Validates, turning pydantic's report into one error with a line per mistake."""
    made = model.__new__(model)
    _fill(made, values, where, raises)
    return made


def _fill(
    made: pydantic.BaseModel,
    values: Mapping[str, Any],
    where: str,
    raises: type[JaxtuneError] = ConfigError,
) -> None:
    model = type(made)
    try:
        pydantic.BaseModel.__init__(made, **values)
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        lines = [_mistake(model, detail, where) for detail in details[:_MISTAKES]]
        if len(details) > _MISTAKES:
            lines.append(f"{where}: and {len(details) - _MISTAKES:,} more like these.")
        raise raises("\n".join(lines)) from None


def _mistake(model: type[pydantic.BaseModel], detail: ErrorDetails, where: str) -> str:
    name = _cut(".".join(str(part) for part in detail["loc"]))
    reason = _cut(detail["msg"].removeprefix("Value error, "), 1000)
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key '{name}'.{_nearest_in(model, detail['loc'])}"
    if not name or detail["type"] == "missing":
        return f"{where}: {name + ': ' if name else ''}{reason}."
    return f"{where}: {name}: {reason}; got {_cut(repr(detail['input']))}."


def _cut(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _nearest_in(model: type[pydantic.BaseModel], loc: tuple[int | str, ...]) -> str:
    """The nearest known sibling of an unknown key inside a list entry or a group."""
    groups = {"datasets": DatasetConfig, "eval_datasets": DatasetConfig}
    owner = groups.get(str(loc[0]), model) if len(loc) > 1 else model
    owner = ProportionsConfig if "proportions" in loc[:-1] else owner
    return nearest(str(loc[-1]), list(owner.model_fields))


# What its reader raises besides its own errors: of depth, dates, numbers and tags that do not fit.
YAML_FAILS = (RecursionError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


class _SafeLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"'{key.value}' is there twice; keep one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = _SafeLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not text"
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}.") from None
    except YAML_FAILS as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path}: not valid YAML: {problem}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'name: value' lines; got a {type(values).__name__}.")
    return values


GROUPS = ("lora", "mesh", "hosts", "lr_scheduler_kwargs")


def _flat(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Open the groups of the model (not free dicts such as `columns`) into dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name not in GROUPS:
            flat[name] = value
            continue
        if isinstance(value, pydantic.BaseModel):
            value = value.model_dump(exclude_unset=True)
        if not isinstance(value, Mapping | None):
            raise ConfigError(f"{where}: {name}: expected fields by name; got {_cut(repr(value))}.")
        flat.update({f"{name}.{key}": inner for key, inner in (value or {}).items()})
    return flat


def _merge(
    values: dict[str, Any], new: Mapping[str, Any], where: str, note: Callable[[str], None]
) -> None:
    known = field_names(Config)
    seen: dict[str, str] = {}
    for key, value in new.items():
        name = field_name(str(key))
        alias = ALIASES.get(name)
        if alias:
            value = alias.convert(value)
            if alias.name != name:
                note(f"{name}: read as {alias.name}")
            if name == "warmup_ratio" and _number(value) >= 1:
                raise ConfigError(f"{where}: warmup_ratio is below 1; got {_cut(str(value))}.")
            name = alias.name
        if name not in known and not entry_type(name):
            suggestion = nearest(name, [*known, *ALIASES])
            raise ConfigError(f"{where}: unknown key '{_cut(str(key))}'.{suggestion}")
        if name in seen:
            raise ConfigError(f"{where}: '{key}' and '{seen[name]}' both set {name}; keep one.")
        seen[name] = str(key)
        _refuse_records(name, value, where)
        if name in ("dataset", "datasets"):  # the later source of either replaces both
            values.pop("dataset" if name == "datasets" else "datasets", None)
        values[name] = value


def _refuse_records(name: str, value: Any, where: str) -> None:
    """Refuse rows of data where a path belongs."""
    known = DatasetConfig.model_fields
    if name not in ("dataset", "datasets", "eval_datasets") or not isinstance(value, list | tuple):
        return
    first = value[0] if value else None
    if isinstance(first, Mapping) and (
        name == "dataset" or not any(key in known or nearest(str(key), ["path"]) for key in first)
    ):
        rows = "eval_data=rows" if name == "eval_datasets" else "data=rows"
        raise ConfigError(
            f"{where}: {name}: expected a path; got {len(value):,} records. Pass rows as "
            f"jt.train(config, {rows})."
        )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Groups as dictionaries again, and `dataset` as what it is short for."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if name == "dataset":
            nested.update({} if value is None else {"datasets": [{"path": value}]})
            continue
        group, dot, leaf = name.partition(".")
        if not dot:
            nested[name] = value
            continue
        before = nested.get(group) or {}
        if not isinstance(before, Mapping):
            raise ConfigError(f"{group}: expected entries by name; got {_cut(repr(before))}.")
        nested[group] = {**before, leaf: value}
    return nested

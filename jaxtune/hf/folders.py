"""What a local folder is, by the files in it: a model, or an adapter to one. No jax."""

from pathlib import Path

from jaxtune.config import ConfigError
from jaxtune.untrusted import plain, read_object

MODEL = "config.json"
ADAPTER = "adapter_config.json"


def is_adapter(name: str) -> bool:
    """Whether a local folder is an adapter and not a model."""
    folder = Path(name).expanduser()
    return (folder / ADAPTER).is_file() and not (folder / MODEL).exists()


def refuse_adapter(name: str) -> None:
    """Raises `ConfigError` for an adapter where a model is to be trained: it goes elsewhere."""
    if not is_adapter(name):
        return
    folder = Path(name).expanduser()
    base = read_object(folder / ADAPTER, folder).get("base_model_name_or_path")
    raise ConfigError(
        f"model_name_or_path {name}: is an adapter, not a model. To go on from it set "
        f"adapter_name_or_path to it and model_name_or_path to its base, "
        f"{plain(str(base)) if base else 'which its config does not name'}."
    )


def check_replaceable(out: Path, *, marker: str, kind: str, export: str) -> None:
    """Refuses, before any work, to replace what is not an earlier `kind`, known by its `marker`."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; {export} is a folder. Choose another place.")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise ConfigError(
            f"{out}: holds files that are no {kind} (no {marker}), and an export replaces the "
            "whole folder. Choose another folder, or empty this one."
        )

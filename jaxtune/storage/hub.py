"""The Hugging Face hub: the files of a model, by its id, in the local cache.

The one place that downloads models and tokenizers; those at a URL of a store through `stores`.
huggingface_hub keeps the cache, resumes a
connection that was cut and knows the token; what is added here is that an answer comes in seconds
when there is no network, and that what went wrong is said to a person. Never a pickle, never code:
the caller names the files it reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jaxtune.config import ConfigError, ModelError
from jaxtune.storage import object_store
from jaxtune.storage.safe_read import reason

ANSWER_SECONDS = 5.0  # the hub's first answer; a route that drops packets would hang for minutes


def is_id(name: str) -> bool:
    """Test if `name` has the form of a hub id: NAME or OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", name) is not None


def _elsewhere(patterns: Sequence[str]) -> list[str]:
    """Name the files of subfolders other than those that `patterns` name: a star takes slashes too.

    >>> _elsewhere(["*.json", "more/*.jinja"])
    ['[!m]*/*']
    """
    folders = [pattern for pattern in patterns if "/" in pattern]
    return [f"[!{''.join(sorted({folder[0] for folder in folders}))}]*/*" if folders else "*/*"]


def download(name: str, *, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files that match `patterns` of hub model `name`, or of the folder at that URL.

    From subfolders only what a pattern with a slash names.

    What lies in the cache is not fetched again, and serves alone when the hub does not answer.
    Raises `ModelError` for what is no id, unknown, gated, without `revision`, or not reachable.
    """
    if object_store.is_url(name):
        if revision is not None:
            raise ConfigError(f"revision: {name} is not on the hub. Unset it.")
        return object_store.download(name, patterns)
    absent = f"{name}: no such folder"
    if not is_id(name):
        raise ModelError(f"{absent}, and not a hub id (owner/name).")
    import huggingface_hub  # here: only a hub id needs it
    from huggingface_hub import constants, errors

    unanswered = silent()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=_elsewhere(patterns),
                local_files_only=unanswered,
            )
        )
    except errors.HFValidationError:
        raise ModelError(f"{absent}, and not a hub id (owner/name).") from None
    except errors.GatedRepoError:
        raise ModelError(
            f"{name}: a gated model. Accept its terms at https://huggingface.co/{name} and set "
            "HF_TOKEN."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{absent}, nor is it on the hub (if private, set HF_TOKEN).") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name}: the hub has no revision '{revision}' of it.") from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = "cannot be asked (HF_HUB_OFFLINE is set)"
        elif unanswered or error.__cause__ is None:
            why = "cannot be reached"
        else:
            why = f"cannot be read ({reason(error.__cause__)})"
        raise ModelError(
            f"{absent}, and the hub {why} nor is the model in the local cache. "
            "Give the path of a folder, or try again online."
        ) from None
    except Exception as error:  # each transport has its own kinds; what came stays in the cache
        raise ModelError(
            f"{absent}, and downloading it from the hub failed: {reason(error)}. "
            "Files that have come whole are kept: run the same command again.",
            passes=True,
        ) from None


def silent() -> bool:
    """Test if the hub was asked for anything and did not answer in `ANSWER_SECONDS`.

    False when HF_HUB_OFFLINE is set: then it is not asked, and huggingface_hub uses its cache.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # each transport has its own kinds, and any means no answer
        return True
    return False

"""A folder with tokenizer.json, or a SentencePiece model -> text to ids and back.

Knows no template and no weights.

The tokenizers library is used directly: what transformers would add on top (which token is bos,
whether plain text gets one, the chat template) is read from tokenizer_config.json, and the tests
hold the ids against transformers' own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from jaxtune.config import TOKEN_NAMES, ConfigError, ModelError
from jaxtune.data import sentencepiece
from jaxtune.storage import hub
from jaxtune.storage.safe_read import MAX_TABLE, read_bytes, read_object, read_text, reason

CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # the folder of named chat templates
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*.jinja",
    f"{MORE_TEMPLATES}/*.jinja",
    "*.model",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A map text -> ids without anything added, and ids -> text without anything left out.

    `named`: bos_token, eos_token, ... as chat templates know them. `special_tokens`: text -> id
    of the tokens that steer the model; they are found in any text that contains them.
    `begins_with_bos`: whether the tokenizer itself puts bos before plain text.
    """

    backend: tokenizers.Tokenizer
    folder: Path
    named: Mapping[str, str]
    special_tokens: Mapping[str, int]
    chat_templates: Mapping[str, str]  # by name; a lone one is "default"
    begins_with_bos: bool
    size: int  # largest id + 1
    fingerprint: str
    added: Mapping[str, int]  # tokens that the folder's own tokenizer does not have, and their ids
    changed_files: Mapping[str, bytes]  # what an export writes in place of the folder's files

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        return self.backend.decode_batch(batch, skip_special_tokens=False)

    def decode_each(self, ids: Sequence[int]) -> str:
        """Join what each id writes behind another token.

        That is `decode` if no token changes its neighbours and no letter is spread over several.
        """
        return "".join(map(self._texts.__getitem__, ids))

    @functools.cached_property
    def _texts(self) -> _TokenTexts:
        return _TokenTexts(self.decode)

    @property
    def bos_token(self) -> str | None:
        return self.named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named.get("eos_token")

    @property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def unk_id(self) -> int | None:
        return self._id("unk_token")

    def _id(self, name: str) -> int | None:
        token = self.named.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Match any special token, the longest first; never matches when there is none."""
        tokens = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def from_last_special(self, text: str) -> str:
        """Cut `text` to what begins with its last special token; all of it if it has none."""
        start = 0
        for found in self.special_pattern.finditer(text):
            start = found.start()
        return text[start:]


class _TokenTexts(dict[int, str]):
    """A table id -> the text it adds behind another token; computed once for each."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token: int) -> str:
        text = self._decode([token, token]).removeprefix(self._decode([token]))
        self[token] = text
        return text


def load_tokenizer(
    path_or_name: str, *, revision: str | None = None, add: Sequence[str] = ()
) -> Tokenizer:
    """Open a folder (also a run directory), or download the tokenizer files of a hub id.

    `add` are special tokens it shall have; those it lacks get the ids behind all others. Raises
    `ConfigError` for what is no tokenizer, `ModelError` for files that cannot be read or fetched.
    """
    file = _file(path_or_name, revision)
    folder = file.parent
    definition = read_bytes(file, folder)
    bare = file.suffix == ".model"
    if bare:
        backend, settings = _sentencepiece(file, _settings(folder))
    else:
        backend, settings = _backend(file, definition), _settings(folder)
    backend.no_padding()
    backend.no_truncation()
    try:
        _add_tokens(backend, settings)
        _declare_special(backend, settings)
        chat_templates = _chat_templates(folder, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: malformed: {error!r}.") from None
    try:
        named = _named(backend, settings, folder)
        _set_plain_text_processor(backend, settings, named)
    except (ValueError, TypeError) as error:  # half a surrogate pair is no text
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: malformed: {error!r}.") from None
    lacking = [token for token in dict.fromkeys(add) if token not in _special(backend)]
    new = _add_special(backend, lacking)
    special = _special(backend)
    bos = named.get("bos_token")
    begins_with_bos = bos is not None and backend.encode("a").tokens[:1] == [bos]
    identity = json.dumps([named, begins_with_bos, sorted(special.items())]).encode()
    if bare:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    changed = _files(backend, settings, special, lacking) if lacking or bare else {}
    return Tokenizer(
        backend=backend,
        folder=folder,
        named=named,
        special_tokens=special,
        chat_templates=chat_templates,
        begins_with_bos=begins_with_bos,
        size=max(backend.get_vocab().values(), default=-1) + 1,
        fingerprint=hashlib.sha256(definition + identity).hexdigest(),
        added=new,
        changed_files=changed,
    )


def _backend(file: Path, definition: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file}: not a tokenizer: {error}.") from None


def _sentencepiece(
    file: Path, settings: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Convert a bare model; its folder's settings come back with what such models mean unsaid."""
    model = sentencepiece.read(file)
    try:
        backend = sentencepiece.convert(model)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file}: not a SentencePiece model: {reason(error)}.") from None
    named = sentencepiece.named(model)
    stated = {key: value for key, value in settings.items() if key != "added_tokens_decoder"}
    return backend, {"add_bos_token": "bos_token" in named, **named, **stated}


def _file(path_or_name: str, revision: str | None) -> Path:
    """Find the tokenizer.json of a folder, else its SentencePiece model; or that model itself."""
    path = Path(path_or_name).expanduser()
    if path.is_file() and path.suffix == ".model":
        return path
    folder = _folder(path, path_or_name, revision)
    for place in (folder, folder / "hf"):
        if (place / "tokenizer.json").exists():
            return place / "tokenizer.json"
    found = sorted(folder.glob("*.model"), key=lambda file: (file.stem != "tokenizer", file.name))
    if not found and (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{folder}: is a run without an exported model (no {folder / 'hf'}). Make one with "
            f"jaxtune convert {folder} {folder / 'hf'}, or name one of its checkpoints."
        )
    if not found:
        raise ConfigError(
            f"{folder}: no tokenizer.json, and no SentencePiece tokenizer.model; expected the "
            "Hugging Face fast format, which "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes. "
            "Set tokenizer_name to a folder that has it."
        )
    return found[0]


def _folder(folder: Path, path_or_name: str, revision: str | None) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(
            f"{path_or_name}: expected a folder with tokenizer.json, or a SentencePiece .model; "
            "got a file."
        )
    return hub.download(path_or_name, revision=revision, patterns=_FILES)


def _settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, completed from special_tokens_map.json of older versions."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            values = read_object(file, folder, limit=MAX_TABLE)
            merged.update({key: value for key, value in values.items() if value is not None})
    return merged


def _add_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add tokens that tokenizer_config.json declares and tokenizer.json lacks, by their ids."""
    declared = settings.get("added_tokens_decoder") or {}
    present = backend.get_added_tokens_decoder()
    for number, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if int(number) not in present:
            keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
            flags = {key: token[key] for key in keys if key in token}
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])


def _declare_special(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Make special tokens of those that tokenizer_config.json alone calls special."""
    texts: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(name) or ()
        values = listed.values() if isinstance(listed, dict) else listed
        texts += [value.get("content") if isinstance(value, dict) else value for value in values]
    known = [t for t in texts if isinstance(t, str) and backend.token_to_id(t) is not None]
    backend.add_special_tokens([t for t in known if t not in _special(backend)])


def _special(backend: tokenizers.Tokenizer) -> dict[str, int]:
    added = backend.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> dict[str, int]:
    """Make `tokens` special tokens; return the ids of those that were not there at all."""
    lacking = [token for token in tokens if backend.token_to_id(token) is None]
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens]
    )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return {token: vocabulary[token] for token in lacking}


def _files(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    special: Mapping[str, int],
    add: Sequence[str],
) -> dict[str, bytes]:
    """Write tokenizer.json and tokenizer_config.json in which `add` are special tokens."""
    settings = dict(settings)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(name)
        if isinstance(listed, list) or (listed is None and name == "additional_special_tokens"):
            contents = [t.get("content") if isinstance(t, dict) else t for t in listed or ()]
            settings[name] = [*(listed or ()), *(t for t in add if t not in contents)]
            break
    if isinstance(declared := settings.get("added_tokens_decoder"), dict):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        new = {str(special[t]): {"content": t, **flags, "special": True} for t in add}
        settings["added_tokens_decoder"] = {**declared, **new}
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": text.encode(),
    }


def _named(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in TOKEN_NAMES:
        value = settings.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str):
            continue
        if backend.token_to_id(token) is None:
            if name == "pad_token":  # some name one that no model has; padding needs none here
                continue
            raise ConfigError(
                f"{folder}/tokenizer_config.json: {name} is {token!r}, "
                "which tokenizer.json does not have."
            )
        named[name] = token
    steering = [named[name] for name in ("bos_token", "eos_token") if name in named]
    backend.add_special_tokens(steering)  # so that they are found in text, as transformers does
    return named


def _set_plain_text_processor(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Honour an explicit add_bos_token as transformers does; else tokenizer.json decides."""
    wanted = settings.get("add_bos_token")
    if wanted is None:
        return
    bos = named.get("bos_token")
    if not wanted or bos is None:
        backend.post_processor = TemplateProcessing(single=["$A"], special_tokens=[])
        return
    number = backend.token_to_id(bos)
    backend.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, number)])


def chat_template_files(folder: Path) -> dict[str, Path]:
    """List the files of a folder's chat templates by name, the "default" first."""
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    files = {"default": folder / CHAT_TEMPLATE, **{file.stem: file for file in more}}
    return {name: file for name, file in files.items() if file.exists()}


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates by name, from files or else from tokenizer_config.json."""
    files = chat_template_files(folder)
    if files:
        return {name: read_text(file, folder) for name, file in files.items()}
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        by_name = {entry.get("name"): entry.get("template") for entry in stated}
    else:
        by_name = {"default": stated}
    return {
        name: template
        for name, template in by_name.items()
        # A name becomes that of a file.
        if isinstance(template, str) and re.fullmatch(r"\w[\w.-]*", str(name))
    }

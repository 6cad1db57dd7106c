"""Valid inputs, spoilt with some sense for what they are: bytes, JSON, YAML, safetensors."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import struct
from typing import Any

NUMBERS = (0, -1, 1, 2, 0.5, -0.0, 1e-320, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308)
ODD = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", " ", "\0", "\n", "\ud800", "\udcff", "a" * 70_000, "../../etc/passwd", "/dev/zero",
    "{{ x", "{% for i in range(9) %}x", "{{ 7 / 0 }}", "é\u202e\u2028", "none", "null", "true", "-",
    "1e999",
    "&a *a", "!!python/object:os.system", "\x1b[2J", "%s%n", "<s>", "0x10", "NaN", "💥" * 50,
)  # fmt: skip


def deep(dice: random.Random, depth: int = 3000) -> Any:
    found: Any = dice.choice([1, "x", None])
    for _ in range(dice.choice([20, 200, depth])):
        found = [found] if dice.random() < 0.5 else {"a": found}
    return found


YAML_ALONE = (
    "&a [*a]", "!!binary x", "!!python/name:os.system", "2026-99-99", "1_0", "0o17", "!!set {a}",
    "? x", "- -", "@", "%", "{a: b", "|", ">-", "12:30", "!!timestamp x", "!!int ''", "!!float _",
)  # fmt: skip


def dumped(value: Any) -> str:
    """Also what is nested more deeply than the json module writes."""
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):  # too deep, or within itself
        return "[" * 100_000 + "]" * 100_000


def odd_value(dice: random.Random) -> Any:
    kind = dice.randrange(8)
    if kind == 0:
        return dice.choice(NUMBERS)
    if kind == 1:
        return dice.choice(ODD)
    if kind == 2:
        return dice.choice(TEXTS)
    if kind == 3:
        return dice.choice([None, True, False])
    if kind == 4:
        return dice.choice([[], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}}])
    if kind == 5:
        return deep(dice)
    if kind == 6:
        return [dice.choice(TEXTS) for _ in range(dice.randrange(1, 5))]
    return {dice.choice(TEXTS): dice.choice(NUMBERS) for _ in range(dice.randrange(1, 4))}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict | list) and len(path) < 30:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in list(items)[:40]:
            found += _places(below, (*path, key))
    return found


def spoilt_value(value: Any, dice: random.Random) -> Any:
    """A JSON value with one to three of its parts changed, dropped, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.randint(1, 3)):
        places = [place for place in _places(value) if place]
        if not places:
            return odd_value(dice)
        *above, key = dice.choice(places)
        holder = value
        for step in above:
            holder = holder[step]
        kind = dice.randrange(7)
        if kind <= 2:
            holder[key] = odd_value(dice)
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[dice.choice(TEXTS)] = holder.pop(key)
        elif kind == 5:
            other = dice.choice(places)
            target: Any = value
            for step in other:
                try:
                    target = target[step]
                except (KeyError, IndexError, TypeError):
                    break
            with contextlib.suppress(RecursionError):
                holder[key] = json.loads(json.dumps(target))
        elif isinstance(holder, list):
            holder.extend([holder[key]] * dice.choice([1, 100]))
        else:
            holder[key] = [holder[key]]
    return value


def as_json(value: Any, dice: random.Random) -> bytes:
    text = dumped(value)
    if dice.random() < 0.1 and text.startswith("{"):  # a key that stands there twice
        text = '{"a": 1, "a": 2, ' + text[1:] if len(text) > 2 else text
    return text.encode()


def spoilt_json(text: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.3:
        return spoilt_bytes(text, dice)
    return as_json(spoilt_value(json.loads(text), dice), dice)


def spoilt_bytes(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = dice.randrange(len(found) + 1)
        kind = dice.randrange(9)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found[at:at] = dice.randbytes(dice.choice([1, 8, 300]))
        elif kind == 3:
            del found[at : at + dice.choice([1, 8, 300])]
        elif kind == 4:
            found[at:at] = found[at : at + dice.choice([1, 50, 4000])]
        elif kind == 5:
            found[at : at + 2] = dice.choice([b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\0\0"])
        elif kind == 6:
            found[at:at] = dice.choice([b"9" * 5000, b"-", b"[" * 50_000, b'"', b"}", b"\r", b",,"])
        elif kind == 7:
            found[:] = dice.choice([b"", b"\xef\xbb\xbf" + found, b"\n" * 50, found * 2, b"null"])
        elif at < len(found):
            found[at] = dice.randrange(256)
    return bytes(found)


def spoilt_lines(data: bytes, dice: random.Random) -> bytes:
    """JSON lines: one of them as JSON, or the bytes."""
    if dice.random() < 0.4:
        return spoilt_bytes(data, dice)
    lines = data.splitlines()
    at = dice.randrange(len(lines))
    lines[at] = spoilt_json(lines[at], dice)
    return b"\n".join(lines)


def spoilt_gz(data: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.5:
        return gzip.compress(spoilt_lines(data, dice), 1)
    return spoilt_bytes(gzip.compress(data, 1), dice)


def spoilt_safetensors(data: bytes, dice: random.Random) -> bytes:
    """The header as JSON, its length true or not; or the bytes."""
    if dice.random() < 0.3:
        return spoilt_bytes(data, dice)
    (length,) = struct.unpack("<Q", data[:8])
    header = spoilt_json(data[8 : 8 + length], dice)
    said = len(header) if dice.random() < 0.8 else dice.choice([0, 1, 2**40, 2**64 - 1, length])
    return struct.pack("<Q", said) + header + data[8 + length :]


def spoilt_yaml(values: dict[str, Any], dice: random.Random) -> bytes:
    """A config: JSON is YAML, and so are the things that YAML alone has."""
    kind = dice.randrange(6)
    if kind == 0:
        return spoilt_bytes(dumped(values).encode(), dice)
    if kind == 1:
        text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
        for above, here in zip("abcdefgh", "bcdefghi", strict=True):
            text += f"{here}: &{here} [{', '.join([f'*{above}'] * 9)}]\n"
        key = dice.choice([*values, "datasets", "lora"])
        return f"{text}{key}: *{dice.choice('abcdefghi')}\n".encode()
    if kind == 2:
        key = dice.choice([*values])
        return f"{key}: {dice.choice(YAML_ALONE)}\n".encode()
    return as_json(spoilt_value(values, dice), dice)

"""Answers of models on a page: samples step by step, base beside tuned with the words that differ.

Takes plain values only. Prompts and answers are hostile: they pass through `escaped`.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.draw.curves import written
from jaxtune.draw.markup import Markup, Number, escaped, table

_ANSWERS = 50  # of an evaluation file that are shown
_PROMPTS, _STEPS = 20, 8  # of samples.jsonl
_LONGEST = 4000  # letters of a text; a difference takes time quadratic in its words
_ALIKE = 0.3  # below this share of common words two answers are shown as they are

# key of `evaluate --json` -> (name, how it is written); other numbers follow under their own names
_SCORES: Mapping[str, tuple[str, str]] = {
    "eval_loss": ("loss", ".4f"),
    "eval_perplexity": ("perplexity", ".4g"),
    "eval_token_accuracy": ("token accuracy", ".1%"),
    "exact_match": ("exact match", ".1%"),
    "rougeL": ("ROUGE-L", ".3f"),
    "stop_rate": ("stop rate", ".1%"),
    "eval_tokens_trained": ("tokens of answers", ","),
    "examples": ("examples", ","),
}


def difference(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts as HTML: what only the first has in `<del>`, what only the second has in `<ins>`.

    Words and the blanks between them are compared. Texts with little in common stay plain: marks
    everywhere would show nothing.

    >>> difference("a red fox", "a blue fox")[1]
    'a <ins>blue</ins> fox'
    """
    before, after = _cut(before), _cut(after)
    old, new = _words(before), _words(after)
    found = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if found.ratio() < _ALIKE:
        return Markup(escaped(before)), Markup(escaped(after))
    left, right = "", ""
    for what, a, b, c, d in found.get_opcodes():
        gone, come = escaped("".join(old[a:b])), escaped("".join(new[c:d]))
        left += gone if what == "equal" or not gone else f"<del>{gone}</del>"
        right += come if what == "equal" or not come else f"<ins>{come}</ins>"
    return Markup(left), Markup(right)


def evaluation(name: str, found: Mapping[str, Any]) -> str:
    """What `evaluate --json` printed: its scores, with `base` side by side, and its answers."""
    base = found.get("base")
    columns = {"base": base, "tuned": found} if base else {"model": found}
    parts = [_scores(f"{name}: all", columns)]
    several = found.get("by_dataset", {})
    if len(several) > 1:
        for dataset, scores in several.items():
            with_base = {"base": base["by_dataset"].get(dataset, {})} if base else {}
            parts.append(_scores(f"{name}: {dataset}", {**with_base, [*columns][-1]: scores}))
    parts.append(_answers(found.get("generations", []), base and base.get("generations", [])))
    return "\n".join(parts)


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of samples.jsonl, by prompt: how the answer changed from step to step."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    cards = []
    for prompt, answers in itertools.islice(by_prompt.items(), _PROMPTS):
        lines, before = [], None
        for row in _spread(answers, _STEPS):
            text = Markup(escaped(_cut(row["response"])))
            if before is not None:
                text = difference(before, row["response"])[1]
            before = row["response"]
            lines.append(
                f"<dt>step {row['step']:,}</dt><dd>{_said(text)}{_ending(row.get('stopped'))}</dd>"
            )
        cards.append(f"<article>{_prompt(prompt)}<dl>{''.join(lines)}</dl></article>")
    return "".join(cards) + _more(len(by_prompt), _PROMPTS, "prompts", "samples.jsonl")


def _scores(caption: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    there = [scores for scores in columns.values() if scores]
    keys = [key for key in _SCORES if any(key in scores for scores in there)]
    keys += dict.fromkeys(
        key
        for scores in there
        for key, value in scores.items()
        if key not in _SCORES and isinstance(value, int | float) and not isinstance(value, bool)
    )
    rows = []
    for key in keys:
        title, how = _SCORES.get(key, (key.replace("_", " "), ".4g"))
        values = [scores.get(key) for scores in columns.values()]
        cells: list[object] = [written(value, how) for value in values]
        if len(values) == 2:
            cells.append(_change(values, how) if key not in ("examples",) else Number(""))
        rows.append((title, *cells))
    header = ("", *columns, *(("change",) if len(columns) == 2 else ()))
    return table(caption, header, rows)


def _change(values: Sequence[Any], how: str) -> Number:
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values) or how == ",":
        return Number("")
    return Number(format(values[1] - values[0], f"+{how}").replace("-", "\u2212"))


def _answers(tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]] | None) -> str:
    """A card per question; with a base that answered the same questions both, else one."""
    paired = base is not None and [r["prompt"] for r in base] == [r["prompt"] for r in tuned]
    cards = []
    for i, row in enumerate(tuned[:_ANSWERS]):
        wanted = row["reference"]
        if paired and base is not None:
            left, right = difference(base[i]["response"], row["response"])
            columns = [("base", left, base[i]), ("tuned", right, row)]
        else:
            columns = [("answer", difference(wanted, row["response"])[1], row)]
        said = "".join(
            f"<div><dt>{name}{_mark(answer, wanted)}</dt>"
            f"<dd>{_said(text)}{_ending(answer.get('stopped'))}</dd></div>"
            for name, text, answer in columns
        )
        cards.append(
            f'<article>{_prompt(row["prompt"])}<dl class="beside"><div><dt>expected</dt>'
            f"<dd>{_said(Markup(escaped(_cut(wanted))))}</dd></div>{said}</dl></article>"
        )
    return "".join(cards) + _more(len(tuned), _ANSWERS, "answers", "the file")


def _prompt(prompt: str) -> str:
    return (
        f'<h4 class="unseen">A question</h4><p class="asked" dir="auto">{escaped(_cut(prompt))}</p>'
    )


def _said(text: Markup) -> str:
    return (
        f'<span class="said" dir="auto">{text}</span>' if text else '<i class="empty">nothing</i>'
    )


def _mark(answer: Mapping[str, Any], wanted: str) -> str:
    same = answer["response"].strip() == wanted.strip()
    return ' <b class="right">exact</b>' if same else ""


def _ending(stopped: Any) -> str:
    return "" if stopped is not False else ' <i class="wrong">did not stop</i>'


def _more(there: int, shown: int, what: str, where: str) -> str:
    if there <= shown:
        return ""
    return f'<p class="empty">The first {shown} of {there:,} {what}; {where} has all.</p>'


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]

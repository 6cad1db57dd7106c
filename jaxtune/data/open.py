"""A run's tokenizer, template and data, opened from its config in one way by every command.

Knows the fields of a config that decide data; knows no command and no model.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxtune.data.dataset import Dataset, open_dataset, split
from jaxtune.data.preprocess import Entry, PreprocessConfig, Progress, Truncation
from jaxtune.data.templating.format_string import preamble
from jaxtune.data.templating.masking import TrainOn
from jaxtune.data.templating.template import Template, resolve, tokens_to_add, variant
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer

Note = Callable[[str], None]


class DataConfig(Protocol):
    """A run's fields that decide its data; `config.Config` is one."""

    @property
    def revision(self) -> str | None: ...
    @property
    def template(self) -> str: ...
    @property
    def template_no_input(self) -> str | None: ...
    @property
    def template_date(self) -> datetime.date: ...
    @property
    def system_prompt(self) -> str | None: ...
    @property
    def stop(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def add_tokens(self) -> bool | tuple[str, ...]: ...
    @property
    def datasets(self) -> Sequence[Entry]: ...
    @property
    def eval_datasets(self) -> Sequence[Entry]: ...
    @property
    def eval_split(self) -> float: ...
    @property
    def train_on(self) -> TrainOn: ...
    @property
    def prompt_loss_weight(self) -> float: ...
    @property
    def max_length(self) -> int: ...
    @property
    def truncation(self) -> Truncation: ...
    @property
    def max_dropped(self) -> float: ...
    @property
    def dataset_num_proc(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


def open_tokenizer(config: DataConfig, name: str, *, note: Note) -> Tokenizer:
    """Open the tokenizer `name`, with the special tokens that `add_tokens` asks for."""
    own = [entry.template for entry in (*config.datasets, *config.eval_datasets)]
    templates = [config.template, *filter(None, own)]
    add = tokens_to_add(config.add_tokens, templates, stop=config.stop)
    tokenizer = load_tokenizer(name, revision=config.revision, add=add)
    if tokenizer.added:
        note(f"add_tokens: {', '.join(f'{t} = {i}' for t, i in tokenizer.added.items())}")
    return tokenizer


def open_template(config: DataConfig, tokenizer: Tokenizer, *, note: Note) -> Template:
    """Resolve the run's template for the tokenizer; note which date it will write, and arguments
    that it does not read.
    """
    template = resolve(
        config.template,
        tokenizer,
        system_prompt=config.system_prompt,
        stop=config.stop,
        no_input=config.template_no_input,
        date=config.template_date,
        kwargs=config.chat_template_kwargs,
    )
    if template.ours and template.name == "custom" and (once := preamble(config.template)):
        note(f"template: {once!r} is said once; later questions of a conversation go without it")
    if "strftime_now" in template.jinja:
        note(f"template '{template.name}' writes today's date: {template.date} (template_date)")
    if unread := template.unread([config.chat_template_kwargs]):
        note(template.unread_text(unread))
    return template


def stop_ids(config: DataConfig, tokenizer: Tokenizer, template: Template) -> list[int]:
    """List the ends of turn that were trained: the run's, and those of datasets with a template.

    The first is that of a plain answer.
    """
    own = [entry.template for entry in config.datasets if entry.template]
    others = [variant(template, tokenizer, template=name, system_prompt=None) for name in own]
    return list(dict.fromkeys(number for t in (template, *others) for number in t.stop_ids))


def preprocess_config(
    config: DataConfig, tokenizer: Tokenizer, template: Template
) -> PreprocessConfig:
    """Take from the run's config what preprocessing needs."""
    return PreprocessConfig(
        tokenizer,
        template,
        config.train_on,
        config.max_length,
        config.truncation,
        config.prompt_loss_weight,
    )


def open_entries(
    config: DataConfig,
    entries: Sequence[Entry],
    tokenizer: Tokenizer,
    template: Template,
    *,
    progress: Progress,
    refuse: bool = True,
) -> Dataset:
    """Open `entries` for an evaluation, which is of answers alone whatever a prompt weighs.

    Raises what `open_dataset` raises; with `refuse`, above the config's `max_dropped`.
    """
    settings = preprocess_config(config, tokenizer, template)._replace(prompt_loss_weight=0.0)
    return _opened(config, entries, settings, progress=progress, refuse=refuse)


def _opened(
    config: DataConfig,
    entries: Sequence[Entry],
    settings: PreprocessConfig,
    *,
    progress: Progress,
    refuse: bool,
) -> Dataset:
    return open_dataset(
        entries,
        settings,
        processes=config.dataset_num_proc,
        progress=progress,
        max_dropped=config.max_dropped if refuse else None,
    )


def open_sides(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: Template,
    *,
    progress: Progress,
    refuse: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """Open (train, held out): `eval_datasets`, or `eval_split` of the rest.

    Raises what `open_dataset` raises; with `refuse`, above the config's `max_dropped`.
    """
    settings = preprocess_config(config, tokenizer, template)
    answers = functools.partial(
        open_entries,
        config,
        tokenizer=tokenizer,
        template=template,
        progress=progress,
        refuse=refuse,
    )
    train = _opened(config, config.datasets, settings, progress=progress, refuse=refuse)
    if config.eval_datasets:
        return train, answers(config.eval_datasets)
    if not config.eval_split or not len(train):
        return train, None
    train, held_out = split(train, config.eval_split, seed=config.seed)
    if config.prompt_loss_weight:
        held_out = answers(config.datasets).of_records(held_out)
    return train, held_out

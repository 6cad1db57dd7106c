"""Every config field: its name, default, unit and consequence, and which of them go together.

Strict and frozen: an unknown key is an error, and what can be decided without looking at devices is
decided here. `load` reads a config; `aliases` has the names that fields have elsewhere.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jaxtune.config import defaults
from jaxtune.config.conversations import ROLES, kwargs_mistake

_MOST_STEPS = 2**31  # steps are counted in int32


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @pydantic.model_validator(mode="after")
    def _countable(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) > 2**53:
                raise ValueError(f"{name}: whole numbers go up to 2**53, as a float64 holds them")
        return self


def label(value: Any) -> str:
    """Name a value of a column as data and configuration do: text, else JSON.

    >>> [label("a"), label(7), label(True), label(None)]
    ['a', '7', 'true', 'null']
    """
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def shard_bytes(size: str) -> int:
    """`max_shard_size` in bytes; a unit is a power of ten, or with an i of two.

    >>> [shard_bytes(size) for size in ("5GB", "1.5 MiB", "300")]
    [5000000000, 1572864, 300]
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?\s*", size, re.IGNORECASE)
    if match is None:
        raise ValueError("expected a number of bytes, with a unit such as 5GB, 500MB or 2GiB")
    number, unit, binary = match.groups()
    scale = (1024 if binary else 1000) ** " KMGT".index((unit or " ").upper())
    count = int(float(number) * scale)
    if count < 1:
        raise ValueError("expected at least one byte")
    return count


def known_roles(roles: dict[str, str]) -> dict[str, str]:
    """Check what `roles` maps to; its names are small letters, as those of data are read."""
    for role, known in roles.items():
        if known not in ROLES:
            close = difflib.get_close_matches(known, ROLES, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(
                f"{role} is mapped to {known!r}, which is no known role.{hint} Known are "
                f"{', '.join(ROLES)}"
            )
    return {role.strip().lower(): known for role, known in roles.items()}


Roles = Annotated[dict[str, str], pydantic.AfterValidator(known_roles)]


class ProportionsConfig(_Strict):
    """A share of a dataset's examples for each value of a column, by drawing anew."""

    column: str = Field(description="of the data, by its own name")
    target: dict[str, PositiveFloat] = Field(
        description="value -> share; other values are left out"
    )

    @pydantic.field_validator("target", mode="before")
    @classmethod
    def _named(cls, target: Any) -> Any:
        return {label(k): v for k, v in target.items()} if isinstance(target, dict) else target

    @pydantic.model_validator(mode="after")
    def _whole(self) -> ProportionsConfig:
        if abs(sum(self.target.values()) - 1) > 1e-6:
            raise ValueError(f"target: shares add up to 1; these to {sum(self.target.values()):g}")
        return self


class DatasetConfig(_Strict):
    """A source of examples."""

    path: str = Field(
        min_length=1,
        description="file (.json .jsonl .csv .tsv .txt .parquet, also .gz), glob, folder or hub id",
    )
    name: str | None = Field(
        None,
        description="label in reports, default: the file's name; of a hub dataset with several "
        "configurations the one to read",
    )
    split: str | None = Field(
        None, description="split of a folder or hub dataset; default: train, or the only one"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    format: Literal[
        "auto", "alpaca", "prompt_completion", "messages", "sharegpt", "tokens", "text"
    ] = Field("auto", description="auto decides by the columns found and says what it decided")
    columns: dict[str, str] = Field(
        {}, description="standard name -> your column, e.g. {output: answer}"
    )
    roles: Roles = Field({}, description="other role of a message -> a known one; above the run's")
    template: str | None = Field(None, description="for this dataset alone; default: the run's")
    system_prompt: str | None = Field(
        None, description="for rows of this dataset that bring none; default: the run's"
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1_000_000,
        description="how often its examples are drawn, against those of weight 1",
    )
    limit: PositiveInt | None = Field(None, description="use the first N rows only")
    proportions: ProportionsConfig | None = Field(
        None, description="{column: category, target: {shipping: 0.8, returns: 0.2}}"
    )


class LoraConfig(_Strict):
    """Low-rank adapters beside frozen weights; r = 0 trains all parameters."""

    r: NonNegativeInt = Field(
        0, description="rank; 0 = full fine-tuning; adapters are float32 whatever the base is"
    )
    alpha: PositiveFloat | None = Field(None, description="scale is alpha / r; default 2 r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input, while training")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear = every projection but the head and experts | names of modules, "
        "q_proj,v_proj | a regex of whole module names",
    )
    rslora: bool = Field(False, description="scale alpha / sqrt(r): steady at high ranks")
    dora: bool = Field(
        False, description="learns the length of each output's weights apart; slower, more memory"
    )
    base: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="bits of the frozen kernels: none = those of dtype, int8 = 8, nf4 = 4.5 "
        "(QLoRA); merging goes into the unquantised weights",
    )
    double_quant: bool = Field(
        False, description="nf4's scales in 8 bits too: 4.13 bits a weight instead of 4.5"
    )

    @pydantic.model_validator(mode="after")
    def _base(self) -> LoraConfig:
        if self.double_quant and self.base != "nf4":
            raise ValueError("double_quant is of base nf4")
        return self


class MeshConfig(_Strict):
    """Devices along each mesh axis; at most one -1, which takes what is left."""

    data: int = Field(1, description="replicas of the parameters")
    fsdp: int = Field(-1, description="shards of parameters, gradients and moments; also of rows")
    expert: int = Field(
        1, description="shards of a mixture's experts; tokens travel to them; also of rows"
    )
    tensor: int = Field(1, description="shards of heads, mlp and vocabulary")
    context: int = Field(
        1, description="shards of the sequence, for rows too long for one device; and of parameters"
    )

    @pydantic.model_validator(mode="after")
    def _sizes(self) -> MeshConfig:
        sizes = [self.data, self.fsdp, self.expert, self.tensor, self.context]
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("axes are positive, or -1 for one of them")
        return self


class HostsConfig(_Strict):
    """The processes of a run on many hosts; on TPU pods, GKE and SLURM they find each other."""

    coordinator_address: str | None = Field(
        None, description="HOST:PORT of process 0, alike for all; default: what the cluster says"
    )
    num_processes: PositiveInt | None = Field(None, description="processes of the run, in all")
    process_id: NonNegativeInt | None = Field(
        None, description="of this process, from 0; process 0 writes and speaks"
    )
    heartbeat_timeout_seconds: int = Field(
        20,
        ge=5,
        description="without a sign of life, after which a host counts as lost and the others end",
    )

    @pydantic.field_validator("coordinator_address")
    @classmethod
    def _with_port(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r".+:\d+", address):
            raise ValueError("expected HOST:PORT, as in 10.0.0.2:8476")
        return address


class SchedulerConfig(_Strict):
    """Options of a schedule under their Hugging Face names; `defaults.SCHEDULES` says whose."""

    num_cycles: PositiveFloat | None = Field(
        None, description="waves of a cosine (default 0.5); restarts (default 1)"
    )
    min_lr: NonNegativeFloat | None = Field(
        None, description="cosine_with_min_lr: the learning rate it ends at"
    )
    min_lr_rate: float | None = Field(
        None, ge=0, le=1, description="cosine_with_min_lr: the same as a share of learning_rate"
    )
    lr_end: NonNegativeFloat | None = Field(
        None, description="polynomial: the learning rate it ends at (default 1e-7)"
    )
    power: PositiveFloat | None = Field(None, description="polynomial: default 1")
    timescale: PositiveInt | None = Field(
        None, description="inverse_sqrt: steps; default: the warmup's, else 10000"
    )
    num_decay_steps: float | None = Field(
        None,
        gt=0,
        lt=_MOST_STEPS,
        description="warmup_stable_decay: the last steps; below 1 a share of all",
    )
    num_stable_steps: float | None = Field(
        None,
        gt=0,
        lt=_MOST_STEPS,
        description="warmup_stable_decay: default: all between warmup and decay",
    )
    decay_type: Literal["linear", "cosine", "1-sqrt"] | None = Field(
        None, description="warmup_stable_decay: default cosine"
    )
    warmup_type: Literal["linear", "cosine", "1-sqrt"] | None = Field(
        None, description="warmup_stable_decay: default linear"
    )
    min_lr_ratio: float | None = Field(
        None, ge=0, le=1,
        description="warmup_stable_decay: share of learning_rate at both ends; default 0",
    )  # fmt: skip


class ConfigFields(_Strict):
    """All of a run. Names and defaults are those Hugging Face users know."""

    model_name_or_path: str | None = Field(
        None, description="hub id, Hugging Face folder, or a jaxtune run directory"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    adapter_name_or_path: str | None = Field(
        None,
        description="adapter in PEFT's format (folder or hub id) to go on training from; brings "
        "its r, alpha, targets and kind",
    )
    tokenizer_name: str | None = Field(None, description="folder or hub id; default: the model's")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random needs only config.json and trains from scratch"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the computation; auto = bfloat16 on TPU and GPU, float32 on CPU"
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of stored parameters; bfloat16 loses most updates below lr 1e-4"
    )
    save_dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="of the exported model; source = as the model came"
    )
    max_shard_size: str = Field(
        "5GB",
        description="of a file of the exported model, as Hugging Face writes it: 5GB, 500MB, 2GiB; "
        "a tensor larger than that has a file of its own",
    )

    dataset: str | None = Field(None, description="short for one entry of datasets")
    columns: dict[str, str] = Field(
        {},
        description="short for columns of every dataset: standard name -> your column, e.g. "
        "{output: answer}",
    )
    roles: Roles = Field(
        {},
        description="other role of a message -> a known one, e.g. {narrator: system}; known: "
        f"{', '.join(ROLES)}",
    )
    datasets: tuple[DatasetConfig, ...] = Field((), description="what to train on; YAML list")
    eval_datasets: tuple[DatasetConfig, ...] = Field((), description="what to evaluate on")
    eval_split: float = Field(
        0.0, ge=0, lt=1, description="share of the training rows held out, chosen by the seed"
    )
    template: str = Field(
        "auto",
        description="auto | chat | alpaca | alpaca_original | dolly | chatml | llama2 | llama3 | "
        "mistral | gemma | phi3 | qwen | zephyr | vicuna | plain | "
        "'USER: {instruction}\\n{input}\\nASSISTANT: {output}' | FILE.jinja; auto = the "
        "tokenizer's own chat template if it has one, else alpaca",
    )
    template_no_input: str | None = Field(
        None, description="what a template string with {input} becomes for rows without one"
    )
    template_date: datetime.date = Field(
        datetime.date(2024, 7, 26),
        description="the date that templates write as today's; keeps tokens the same",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="arguments of the chat template, as apply_chat_template takes them, e.g. "
        "{enable_thinking: false}; a row's column of that name wins",
    )
    add_tokens: bool | tuple[str, ...] = Field(
        False,
        description="special tokens for the tokenizer: true = those the template needs, or a list; "
        "new rows of embedding and head begin as the mean of the others",
    )
    system_prompt: str | None = Field(None, description="for rows that bring none")
    stop: str | None = Field(
        None, description="end of turn; default: the template's, else the tokenizer's eos"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="every answer, the last answer, or every token"
    )
    prompt_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="of a prompt's token in the loss, where one of a trained answer weighs 1; "
        "evaluations are of answers alone",
    )
    max_length: int = Field(2048, ge=2, description="tokens in a row of the batch")
    truncation: Literal["drop", "truncate", "error"] = Field(
        "drop", description="rows longer than max_length; drop counts and shows them"
    )
    max_dropped: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a dataset's rows, for training or evaluation, that may be dropped; "
        "with more the run ends and says what would keep them",
    )
    packing: bool = Field(True, description="several examples in a row, isolated; less padding")
    dataset_num_proc: PositiveInt | None = Field(
        None, description="processes that tokenise; default: one a core; never changes results"
    )

    learning_rate: NonNegativeFloat = Field(
        2e-5,
        description="peak; the default goes by optim and is another with lora.r: adamw, adafactor, "
        "muon, schedule_free 2e-5 and 2e-4, lion 4e-6 and 4e-5, sgd 0.03",
    )
    num_train_epochs: float = Field(
        3, gt=0, le=1_000_000, description="passes over the data, may be 0.5"
    )
    max_steps: int = Field(-1, description="optimiser steps; overrides num_train_epochs when > 0")
    per_device_train_batch_size: PositiveInt = Field(
        8, description="rows per device and microbatch, over the data, fsdp and expert axes"
    )
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="microbatches in a step; same gradient, less memory, more time"
    )
    global_batch_size: PositiveInt | None = Field(
        None, description="rows in a step; sets gradient_accumulation_steps"
    )
    per_device_eval_batch_size: PositiveInt = Field(8, description="rows; never changes results")
    optim: Literal["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free"] = Field(
        "adamw",
        description="bytes of state a trained parameter: adamw, schedule_free 8, muon 4.5, "
        "lion 4, "
        "sgd 0 (4 with momentum), adafactor near 0",
    )
    optim_state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of first moments; bfloat16 saves 2 bytes a trained parameter and rounds the "
        "momentum to 3 digits; second moments stay float32",
    )
    optim_offload: bool = Field(
        False,
        description="the optimiser's moments in the host's memory, moved to the device and back in "
        "every step: less device memory (adamw: 8 bytes a trained parameter), slower steps",
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="of sgd (default 0) and muon (default 0.95)"
    )
    muon_adjust_lr: Literal["match_rms_adamw", "original"] | None = Field(
        None,
        description="length of muon's steps: match_rms_adamw (default) takes AdamW's learning "
        "rates; original takes about 0.02 for the matrices, and AdamW's rest gets that too",
    )
    weight_decay: NonNegativeFloat = Field(
        0.0, description="decoupled (sgd: through its momentum); skips norms and biases"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="decay of the second moment; of lion's momentum 0.99"
    )
    adam_epsilon: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="clips the global norm; 0 = off")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
        "inverse_sqrt", "warmup_stable_decay", "constant", "constant_with_warmup",
    ] = Field(
        "linear",
        description="after the warmup; linear and cosine end at 0; with schedule_free "
        "constant_with_warmup",
    )  # fmt: skip
    lr_scheduler_kwargs: SchedulerConfig = SchedulerConfig()
    warmup_steps: float = Field(
        0.03,
        ge=0,
        lt=_MOST_STEPS,
        description="below 1 a share of all steps, else a number of steps",
    )
    trainable: str | None = Field(
        None,
        description="regex searched in parameter names; only what matches is trained, e.g. "
        "'/mlp/|final_norm'; a name that does not exist shows those that do",
    )
    train_last_layers: PositiveInt | None = Field(
        None, description="train the last n layers only, and what trainable adds to them"
    )
    neftune_noise_alpha: PositiveFloat | None = Field(
        None,
        description="NEFTune: uniform noise of alpha / sqrt(length x width) on the embeddings of "
        "each example, while training; its authors use 5 to 15",
    )
    gradient_checkpointing: Literal[
        "none", "full", "attention", "projections", "dots", "offload"
    ] = Field(
        "full",
        description="what the backward pass recomputes: full = all of a layer but its input (~1/3 "
        "slower), attention = all but attention's result, projections = no product with weights, "
        "none = nothing; offload = as full, with the inputs in the host's memory",
    )
    loss_block: PositiveInt | None = Field(
        None,
        description="entries of the vocabulary whose logits exist at a time; fewer = less memory; "
        "default: all for a small head, else 256 MiB of logits a device; never changes results",
    )
    loss_type: Literal["nll", "dft"] = Field(
        "nll",
        description="of a token: nll = -log p, dft = -p log p with p as a constant (dynamic "
        "fine-tuning): unlikely tokens move the model less; evaluations are nll always",
    )
    z_loss: NonNegativeFloat = Field(
        0.0,
        description="times the squared log of the softmax's normaliser, added to what is minimised "
        "(not to the loss shown): keeps logits from drifting; 1e-4 is usual",
    )
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = Field(
        "auto",
        description="how it is computed while training: splash on TPU, cudnn on GPU, blocked or "
        "reference elsewhere; a name is run or refused, never replaced",
    )
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()

    seed: NonNegativeInt = Field(42, description="of data order and random weights")
    logging_steps: PositiveInt = Field(10, description="steps between rows of metrics.jsonl")
    eval_steps: PositiveInt | None = Field(
        None, description="steps between evaluations; default: at every epoch's end"
    )
    save_steps: PositiveInt = Field(500, description="steps between checkpoints; also at the end")
    save_total_limit: PositiveInt | None = Field(
        2, description="checkpoints kept, newest first; the best is kept besides; none = all"
    )
    load_best_model_at_end: bool = Field(
        False,
        description="save whenever eval_loss is the lowest so far, and export that step instead of "
        "the last",
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="evaluations without a lower eval_loss after which training ends"
    )
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="from the newest undamaged checkpoint in output_dir"
    )
    max_skipped_steps: NonNegativeInt = Field(
        0,
        description="steps with a non-finite loss or gradient that may pass, changing nothing; one "
        "more ends the run with exit 3",
    )
    hang_timeout_seconds: NonNegativeInt = Field(
        3600,
        description="without progress while training, after which every thread's stack is written "
        "and the run ends with exit 75; longer than the slowest step and its compilation; 0 = off",
    )
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="first and last step traced by jax.profiler into OUT/profile; slows them"
    )
    compilation_cache_dir: str | None = Field(
        "auto",
        description="where compiled programs are kept for the next run; auto = "
        "JAX_COMPILATION_CACHE_DIR, else ~/.cache/jaxtune/compiled; none = nowhere",
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="besides metrics.jsonl, which is always written"
    )
    sample_prompts: tuple[str, ...] = Field(
        (), description="answered greedily at every evaluation, into OUT/samples.jsonl"
    )
    export: bool = Field(True, description="write OUT/hf when training ends")
    output_dir: str | None = Field(
        None,
        description="the run directory, made if missing; of several hosts one that all see; "
        "also a gs:// or s3:// URL",
    )

    @property
    def has_adapters(self) -> bool:
        """Tell whether adapters are trained: new ones, or those of a folder."""
        return self.lora.r > 0 or self.adapter_name_or_path is not None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _by_method(cls, values: Any) -> Any:
        return {**method_defaults(values), **values} if isinstance(values, dict) else values

    @pydantic.field_validator("datasets", "eval_datasets", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        """Accept an entry alone, and a path for an entry."""
        entries = [value] if isinstance(value, str | Mapping | DatasetConfig) else value
        if not isinstance(entries, list | tuple):
            return entries
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]

    @pydantic.field_validator("datasets", "eval_datasets")
    @classmethod
    def _with_columns_and_roles(
        cls, entries: tuple[DatasetConfig, ...], info: pydantic.ValidationInfo
    ) -> tuple[DatasetConfig, ...]:
        """Give every entry the columns and roles of the run; refuse columns it maps otherwise."""
        columns, roles = info.data.get("columns") or {}, info.data.get("roles") or {}
        for entry in entries:
            for name, column in columns.items():
                if entry.columns.get(name, column) != column:
                    raise ValueError(
                        f"columns maps {name} to {column!r}, and for {entry.path} to "
                        f"{entry.columns[name]!r}; keep one"
                    )
        return tuple(
            entry.model_copy(
                update={
                    **({"columns": {**entry.columns, **columns}} if columns else {}),
                    **({"roles": {**roles, **entry.roles}} if roles else {}),
                }
            )
            for entry in entries
        )

    @pydantic.field_validator("report_to", "sample_prompts", mode="before")
    @classmethod
    def _words(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Accept a word alone; `report_to: none` is Hugging Face's word for nowhere."""
        words = [value] if isinstance(value, str) else value
        nowhere = info.field_name == "report_to" and words in (["none"], ("none",))
        return () if nowhere or words is None else words

    @pydantic.field_validator("chat_template_kwargs")
    @classmethod
    def _of_templates(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        if mistake := kwargs_mistake(kwargs):
            raise ValueError(mistake)
        return kwargs

    @pydantic.field_validator("add_tokens", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        """Accept true and false as the words that a flag gives."""
        word = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        return {"true": True, "false": False}.get(str(word).lower(), value)

    @pydantic.field_validator("max_shard_size", mode="before")
    @classmethod
    def _of_bytes(cls, size: Any) -> str:
        shard_bytes(str(size))
        return str(size)

    @pydantic.field_validator("optim", mode="before")
    @classmethod
    def _known(cls, name: Any) -> Any:
        if reason := defaults.advice(str(name)):
            raise ValueError(reason)
        return name

    @pydantic.model_validator(mode="after")
    def _agree(self) -> ConfigFields:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps is positive, or -1 for num_train_epochs")
        if self.has_adapters and self.init == "random":
            raise ValueError("lora.r and adapters need a trained base; set init: pretrained")
        if self.lora.base != "none" and not self.has_adapters:
            raise ValueError("lora.base is frozen and needs adapters; set lora.r")
        if self.eval_split and self.eval_datasets:
            raise ValueError("eval_split and eval_datasets exclude each other; set one")
        if any(entry.weight != 1 or entry.proportions for entry in self.eval_datasets):
            raise ValueError(
                "eval_datasets have no weight and no proportions: each example counts once"
            )
        if self.prompt_loss_weight and self.train_on == "all":
            raise ValueError(
                "prompt_loss_weight is of train_on assistant or last; with all, prompts weigh 1. "
                "Unset one"
            )
        self._watching_agrees()
        self._part_agrees()
        self._optimiser_agrees()
        self._schedule_agrees()
        return self

    def _watching_agrees(self) -> None:
        for name in ("load_best_model_at_end", "early_stopping_patience", "sample_prompts"):
            if getattr(self, name) and not (self.eval_split or self.eval_datasets):
                raise ValueError(f"{name} needs evaluations; set eval_split or eval_datasets")
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps: first and last step; got {first} and {last}")

    def _part_agrees(self) -> None:
        try:
            re.compile(self.trainable or "")
        except re.error as error:
            raise ValueError(
                f"trainable: '{self.trainable}' is no regular expression: {error}"
            ) from None
        for name in ("trainable", "train_last_layers"):
            if getattr(self, name) is None:
                continue
            if self.has_adapters:
                raise ValueError(f"adapters are trained beside frozen weights; unset {name}")
            if self.init == "random":
                raise ValueError(f"{name}: frozen weights need init: pretrained")

    def _optimiser_agrees(self) -> None:
        for name, owners in defaults.ONLY_OF.items():
            if getattr(self, name) is not None and self.optim not in owners:
                raise ValueError(f"{name} is of optim {' and '.join(owners)}, not {self.optim}")
        keeps = defaults.METHODS[self.optim].first_moment and self.momentum != 0
        if self.optim_state_dtype != "float32" and not keeps:
            raise ValueError(
                f"optim_state_dtype is of first moments, and {self.optim} keeps none"
                + (" without momentum" if self.optim == "sgd" else "; leave it at float32")
            )
        if self.optim == "schedule_free" and self.lr_scheduler_type not in defaults.STEADY:
            raise ValueError(
                "optim schedule_free averages in place of a falling learning rate; "
                f"lr_scheduler_type is {' or '.join(defaults.STEADY)}, not {self.lr_scheduler_type}"
            )

    def _schedule_agrees(self) -> None:
        kind, options = self.lr_scheduler_type, self.lr_scheduler_kwargs
        names = [name for name, value in options.model_dump().items() if value is not None]
        for name in names:
            if name not in defaults.SCHEDULES[kind]:
                known = ", ".join(defaults.SCHEDULES[kind]) or "none"
                raise ValueError(
                    f"lr_scheduler_kwargs.{name} is no option of {kind}; it has: {known}"
                )
        ends = [value for value in (options.min_lr, options.min_lr_rate) if value is not None]
        if kind == "cosine_with_min_lr" and len(ends) != 1:
            raise ValueError(
                "cosine_with_min_lr needs one of lr_scheduler_kwargs.min_lr and min_lr_rate"
            )
        if kind == "warmup_stable_decay" and options.num_decay_steps is None:
            raise ValueError(
                "warmup_stable_decay needs lr_scheduler_kwargs.num_decay_steps, a number of steps "
                "or a share below 1"
            )
        lowest = options.min_lr if kind == "cosine_with_min_lr" else options.lr_end
        if lowest is not None and lowest > self.learning_rate:
            raise ValueError(
                f"lr_scheduler_kwargs: ends at {lowest:g}, above learning_rate "
                f"{self.learning_rate:g}"
            )


def method_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that go by optimiser, and with adapters, of what `values` leave unset."""
    lora = values.get("lora")
    rank = lora.get("r", 0) if isinstance(lora, Mapping) else getattr(lora, "r", 0)
    adapted = str(rank) not in ("0", "None") or values.get("adapter_name_or_path") is not None
    preset = defaults.defaults(str(values.get("optim", "adamw")), lora=adapted)
    fields = ConfigFields.model_fields
    return {n: v for n, v in preset.items() if n not in values and v != fields[n].default}

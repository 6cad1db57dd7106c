"""Knobs: names people know, strictness, nearest names, the round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest

from jaxtune import cli
from jaxtune.config import (
    ALIASES,
    Config,
    ConfigError,
    DataError,
    DatasetConfig,
    Diverged,
    ModelError,
    ProportionsConfig,
    dump,
    field_names,
    load,
    load_config,
    shard_bytes,
)
from jaxtune.config.fields import LoraConfig

# Names, defaults: the contract's table.
CONTRACT = {
    "max_length": 2048, "truncation": "drop", "packing": True, "learning_rate": 2e-5,
    "num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "global_batch_size": None, "per_device_eval_batch_size": 8,
    "optim": "adamw", "max_grad_norm": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 0.03,
    "logging_steps": 10, "resume": "auto", "export": True, "template": "auto",
    "train_on": "assistant", "param_dtype": "float32", "dtype": "auto", "save_dtype": "source",
}  # fmt: skip


def test_defaults_are_the_contract() -> None:
    config = load()
    assert {name: getattr(config, name) for name in CONTRACT} == CONTRACT
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context) == (
        1, -1, 1, 1,
    )  # fmt: skip


def test_dataset_is_short_for_one_entry_and_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("datasets: [{path: a.json}, {path: b.json}]\nlearning_rate: 1e-4\n")
    assert [d.path for d in load(file).datasets] == ["a.json", "b.json"]
    assert load(file).learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as text; it is a number here
    assert [d.path for d in load(file, {"dataset": "c.json"}).datasets] == ["c.json"]


def test_every_alias_names_a_field_and_is_announced() -> None:
    known = field_names(Config)
    for alias, target in ALIASES.items():
        assert target.name in known, alias
    said: list[str] = []
    config = load(overrides={"cutoff_len": "512", "warmup_ratio": "0.1"}, note=said.append)
    assert (config.max_length, config.warmup_steps) == (512, 0.1)
    assert said == ["cutoff_len: read as max_length", "warmup_ratio: read as warmup_steps"]


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing", "full"),
        ({"activation_checkpointing": "false"}, "gradient_checkpointing", "none"),
        ({"train_on_inputs": True}, "train_on", "all"),
        ({"optim": "adamw_torch"}, "optim", "adamw"),
        ({"optimizer": "paged_adamw_32bit"}, "optim", "adamw"),
        ({"optim": "lion_32bit"}, "optim", "lion"),
        ({"optim": "schedule_free_adamw"}, "optim", "schedule_free"),
        (
            {"lr_scheduler": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
            "lr_scheduler_type",
            "warmup_stable_decay",
        ),
        ({"neftune_alpha": 5}, "neftune_noise_alpha", 5),
        ({"resume_from_checkpoint": True}, "resume", "must"),
    ],
)
def test_values_people_type_are_translated(given: dict, field: str, value: object) -> None:
    assert getattr(load(overrides=given), field) == value


def test_the_size_of_a_shard_is_written_as_hugging_face_does() -> None:
    sizes = {"5GB": 5 * 10**9, "200mb": 2 * 10**8, "1.5GiB": 3 * 2**29, "77": 77, "8 KB": 8000}
    for text, expected in sizes.items():
        assert shard_bytes(load(overrides={"max_shard_size": text}).max_shard_size) == expected
    assert load(overrides={"max_shard_size": 1000}).max_shard_size == "1000"  # a number of a YAML


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"max_seq_lenght": 1}, "Did you mean 'max_seq_length'?"),
        ({"datasets": [{"path": "a", "fromat": "alpaca"}]}, "Did you mean 'format'?"),
        ({"learning_rate": "fast"}, "learning_rate: Input should be a valid number"),
        ({"learning_rate": -1}, "got -1"),
        ({"max_length": 1}, "max_length"),
        ({"truncation": "wrap"}, "'drop', 'truncate' or 'error'; got 'wrap'"),
        ({"z_loss": -1e-4}, "greater than or equal to 0; got -0.0001"),
        ({"loss_block": 0}, "loss_block: Input should be greater than 0; got 0"),
        ({"max_steps": 0}, "max_steps is positive, or -1"),
        ({"max_shard_size": "5 gigs"}, "with a unit such as 5GB, 500MB or 2GiB; got '5 gigs'"),
        ({"max_shard_size": "-1GB"}, "max_shard_size: expected a number of bytes"),
        ({"max_shard_size": "9" * 400 + "GB"}, "max_shard_size: expected a number of bytes"),
        ({"datasets": [{"path": "a", "weight": 1e308}]}, "equal to 1000000; got 1e+308"),
        ({"num_train_epochs": 1e308}, "less than or equal to 1000000; got 1e+308"),
        ({"warmup_steps": 1e308}, "less than 2147483648; got 1e+308"),
        ({"max_shard_size": 0}, "max_shard_size: expected at least one byte"),
        ({"mesh.fsdp": 0}, "axes are positive, or -1 for one of them"),
        ({"mesh": {"fsdp": -1, "data": -1}}, "axes are positive, or -1 for one of them"),
        ({"warmup_ratio": 20}, "warmup_ratio is below 1; got 20"),
        ({"max_length": 9, "cutoff_len": 8}, "both set max_length"),
        ({"eval_split": 0.1, "eval_datasets": [{"path": "a"}]}, "exclude each other"),
        ({"lora.r": 8, "init": "random"}, "need a trained base; set init: pretrained"),
        ({"lora.r": 8, "lora.dropout": 1}, "lora.dropout: Input should be less than 1"),
        ({"lora.rank": 8}, "unknown key 'lora.rank'"),
        ({"lora.r": 8, "lora.base": "nf3"}, "'none', 'int8' or 'nf4'; got 'nf3'"),
        ({"lora.base": "nf4"}, "lora.base is frozen and needs adapters; set lora.r"),
        ({"lora.r": 8, "lora.double_quant": True}, "double_quant is of base nf4"),
    ],
)
def test_mistakes_are_named(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(overrides=given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"optim": "paged_adamw_8bit"},
            "moments of 8 or 4 bits are not built. Nearest: adamw with",
        ),
        ({"optim": "lion_8bit"}, "Nearest: lion with optim_state_dtype bfloat16"),
        ({"optim": "galore_adamw"}, "Nearest in memory: adafactor, or adamw with lora.r"),
        ({"optim": "schedule_free_sgd"}, "schedule_free is the one of AdamW"),
        ({"optim": "adamax"}, "'muon' or 'schedule_free'; got 'adamax'"),
        ({"momentum": 0.5}, "momentum is of optim sgd and muon, not adamw"),
        ({"optim": "sgd", "momentum": 1.0}, "momentum: Input should be less than 1"),
        (
            {"optim": "sgd", "muon_adjust_lr": "original"},
            "muon_adjust_lr is of optim muon, not sgd",
        ),
        ({"optim": "muon", "muon_adjust_lr": "none!"}, "'match_rms_adamw' or 'original'"),
        ({"optim_state_dtype": "int8"}, "'float32' or 'bfloat16'; got 'int8'"),
        ({"optim": "adafactor", "optim_state_dtype": "bfloat16"}, "adafactor keeps none"),
        ({"optim": "sgd", "optim_state_dtype": "bfloat16"}, "sgd keeps none without momentum"),
        (
            {"optim": "schedule_free", "lr_scheduler_type": "linear"},
            "lr_scheduler_type is constant or constant_with_warmup, not linear",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: Input should be"),
        (
            {"lr_scheduler_kwargs.min_lr": 1e-6},
            "lr_scheduler_kwargs.min_lr is no option of linear; it has: none",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of lr_scheduler_kwargs.min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs lr_scheduler_kwargs.num_decay_steps"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs.lr_end": 1},
            "ends at 1, above learning_rate 2e-05",
        ),
        ({"lr_scheduler_kwargs.minlr": 1}, "Did you mean 'lr_scheduler_kwargs.min_lr'?"),
        ({"neftune_noise_alpha": 0}, "neftune_noise_alpha: Input should be greater than 0"),
        ({"learning_rate": "inf"}, "learning_rate: Input should be a finite number; got 'inf'"),
        ({"warmup_steps": float("nan")}, "warmup_steps: Input should be a finite number"),
        ({"lora.alpha": "inf"}, "lora.alpha: Input should be a finite number"),
        ({"max_steps": 10**400}, "max_steps: whole numbers go up to 2**53"),
        ({"trainable": "mlp("}, "trainable: 'mlp(' is no regular expression: missing )"),
        ({"train_last_layers": 0}, "train_last_layers: Input should be greater than 0"),
        ({"train_last_layers": 2, "lora": {"r": 4}}, "unset train_last_layers"),
        ({"trainable": "norm", "adapter_name_or_path": "a"}, "weights; unset trainable"),
        ({"trainable": "norm", "init": "random"}, "trainable: frozen weights need init"),
        ({"trainable": "norm", "lora.r": 4}, "beside frozen weights; unset trainable"),
    ],
)
def test_what_an_optimiser_or_a_schedule_cannot_be_is_named(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(overrides=given)
    assert message in str(error.value)


def test_defaults_go_by_method_are_announced_and_yield_to_what_is_set() -> None:
    said: list[str] = []
    lion = load(overrides={"optim": "lion"}, note=said.append)
    assert (lion.learning_rate, lion.adam_beta2) == (4e-6, 0.99)
    assert said == [
        "learning_rate: 4e-06, the default with lion", "adam_beta2: 0.99, the default with lion",
    ]  # fmt: skip
    said.clear()
    given = {"optim": "lion", "learning_rate": 2e-5, "adam_beta2": 0.999}
    chosen = load(overrides=given, note=said.append)
    assert (chosen.learning_rate, chosen.adam_beta2, said) == (2e-5, 0.999, [])
    muon = load(overrides={"optim": "muon"})
    assert (muon.momentum, muon.muon_adjust_lr) == (0.95, "match_rms_adamw")
    assert load(overrides={"optim": "schedule_free"}).lr_scheduler_type == "constant_with_warmup"
    assert load(overrides={"optim": "sgd"}).learning_rate == 0.03
    assert Config(optim="lion") == lion  # from Python too
    assert load(overrides={}, note=said.append) == Config()
    assert said == []


def test_from_python_a_config_is_read_as_from_a_file() -> None:
    given = {"dataset": "a.json", "max_seq_length": 64, "lora_r": 4, "mesh.fsdp": 2}
    assert Config(**given) == load(overrides=given)
    assert Config(dataset="a.json").datasets[0].path == "a.json"
    grouped = Config(lora=LoraConfig(r=4, alpha=2.0), mesh={"fsdp": 2})
    assert grouped == load(overrides={"lora": {"r": 4, "alpha": 2.0}, "mesh.fsdp": 2})
    assert grouped.learning_rate == 2e-4
    for wrong, message in (
        ({"max_lenght": 3}, "Config: unknown key 'max_lenght'. Did you mean 'max_length'?"),
        ({"max_length": "abc"}, "Config: max_length: .* got 'abc'"),
        ({"lora": 8}, "Config: lora: expected fields by name; got 8"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message).replace(r"\.\*", ".*")):
            Config(**wrong)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("report_to: tensorboard", "report_to", ("tensorboard",)),
        ("report_to: none", "report_to", ()),
        ("report_to: [none]", "report_to", ()),
        ("sample_prompts: Hi there", "sample_prompts", ("Hi there",)),
        ("datasets: a.json", "datasets", (DatasetConfig(path="a.json"),)),
        ("datasets: {path: a.json, limit: 1}", "datasets",
         (DatasetConfig(path="a.json", limit=1),)),
        ("datasets: [a.json, {path: b.json}]", "datasets",
         (DatasetConfig(path="a.json"), DatasetConfig(path="b.json"))),
        ("lora:", "lora", LoraConfig()),
    ],
)  # fmt: skip
def test_one_of_a_list_may_stand_alone(
    tmp_path: Path, text: str, field: str, value: object
) -> None:
    file = tmp_path / "c.yaml"
    more = "\neval_split: 0.1" if field == "sample_prompts" else ""
    file.write_text(text + more + "\n")
    assert getattr(load(file), field) == value


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nmax_steps: 2\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: not valid YAML: 'seed' is there twice"):
        load(file)
    file.write_text("lora:\n  r: 2\n  r: 4\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:3: .*'r' is there twice"):
        load(file)


ROWS = [{"prompt": f"question {i}", "completion": "x" * 1000} for i in range(10_000)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dataset", ROWS, "dataset: expected a path; got 10,000 records. Pass rows as jt.train("),
        ("datasets", ROWS, "got 10,000 records. Pass rows as jt.train(config, data=rows)"),
        ("eval_datasets", ROWS, "Pass rows as jt.train(config, eval_data=rows)"),
        ("datasets", [{**row, "path": "a"} for row in ROWS], "and 19,990 more like these."),
        ("max_length", ROWS, "valid integer; got [{'prompt': 'question 0', 'completion': 'xxx"),
        ("lora", ROWS, "expected fields by name; got [{'prompt'"),
        ("template", {"x" * 9999: 1}, "valid string; got {'xxx"),
        ("x" * 9999, 1, "unknown key 'xxx"),
    ],
)
def test_a_message_is_short_however_large_the_data(name: str, value: Any, message: str) -> None:
    for make in (lambda: load(overrides={name: value}), lambda: Config(**{name: value})):
        with pytest.raises(ConfigError) as caught:
            make()
        assert message in str(caught.value)
        assert len(str(caught.value)) < 2000


def test_no_path_is_no_dataset() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.0\.path: .*at least 1 character"):
        load(overrides={"dataset": ""})


def test_broken_files_are_named_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(ConfigError, match=r"broken.yaml:3: not valid YAML"):
        load(broken)
    broken.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected 'name: value' lines; got a list"):
        load(broken)


def test_the_resolved_config_repeats_the_run(tmp_path: Path) -> None:
    config = load(overrides={"dataset": "a.json", "lr": 3e-4, "mesh.data": 2, "stop": "</s>"})
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config


class Door(cli.Options):
    as_json: bool = pydantic.Field(False, alias="json", description="one object")
    where: str = pydantic.Field(description="a folder")
    prompt: str | None = pydantic.Field(None, description="what is asked")
    share: float | None = pydantic.Field(0.5, description="a number, or none")

    @classmethod
    def positional(cls) -> tuple[str, ...]:
        return ("where",)


def parse(*argv: str) -> tuple[Config, Door]:
    return cli.parse(argv, "door", "does.", Door)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused_everywhere(tmp_path: Path, value: str) -> None:
    named = {"eval_datasets": DatasetConfig, "": Config, "proportions": ProportionsConfig}
    floats = [
        (place, name)
        for place, model in named.items()
        for name, field in field_names(model).items()
        if "float" in (kind := str(field.annotation).lower()) and "literal" not in kind
    ]
    assert ("eval_datasets", "weight") in floats
    assert ("", "lr_scheduler_kwargs.min_lr") in floats
    assert len(floats) > 20
    file = tmp_path / "c.yaml"
    for place, name in floats:
        text = f"{name}: {value}"
        if place == "proportions":
            text = f"datasets: [{{path: a, proportions: {{column: c, {name}: {{a: {value}}}}}}}]"
        elif place:
            text = f"{place}: [{{path: a, {name}: {value}}}]"
        file.write_text(text + "\n")
        with pytest.raises(ConfigError, match="should be a finite number"):
            load(file)


def test_flags_reach_every_field() -> None:
    config, door = parse(
        "DIR", "--mesh.fsdp", "8", "--max-length=256", "--packing", "false", "--max_steps", "-1",
        "--report_to", "tensorboard", "--json", "--datasets", "[{path: a, limit: 3}]",
        "--template", "USER: {instruction}\\nASSISTANT: {output}", "--stop", "none",
    )  # fmt: skip
    assert (config.mesh.fsdp, config.max_length, config.packing) == (8, 256, False)
    assert config.report_to == ("tensorboard",)
    assert (config.datasets[0].path, config.datasets[0].limit) == ("a", 3)
    assert config.template.startswith("USER: {instruction}")
    assert config.stop is None
    assert (door.as_json, door.where) == (True, "DIR")


def test_one_entry_of_a_list_may_stand_alone_as_a_flag() -> None:
    config, _ = parse("DIR", "--datasets", "{path: a, limit: 3}", "--lora.targets", "all-linear")
    assert (config.datasets[0].path, config.datasets[0].limit) == ("a", 3)
    assert config.lora.targets == ("all-linear",)
    assert parse("DIR", "--datasets", "a.json", "b.json")[0].datasets[1].path == "b.json"


def test_entries_of_a_mapping_are_flags(tmp_path: Path) -> None:
    """In YAML, as one flag or entry by entry; of every dataset, keys as they are."""
    file = tmp_path / "c.yaml"
    file.write_text("columns: {instruction: ask}\ndatasets: [a, {path: b, columns: {input: x}}]\n")
    config, _ = parse(
        "DIR", "--config", str(file), "--columns.output=my-answer", "--eval_file", "e"
    )
    columns = {"instruction": "ask", "output": "my-answer"}
    assert config.columns == columns
    entries = (*config.datasets, *config.eval_datasets)
    assert [e.columns for e in entries] == [columns, {"input": "x", **columns}, columns]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(config))
    assert load(resolved) == config
    file.write_text("columns: {instruction: ask}")
    words = ("--columns", "{output: o}", "--columns.input", "i")
    config, _ = parse("DIR", "--config", str(file), *words)
    assert config.columns == {"output": "o", "input": "i"}
    words = (
        "--chat_template_kwargs.enable_thinking",
        "false",
        "--chat-template-kwargs.in-put",
        "[1]",
    )
    with pytest.raises(ConfigError, match="'in-put' is no name of a variable"):
        parse("DIR", *words)
    assert parse("DIR", *words[:2])[0].chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns.output"], "flags: --columns.output needs a value"),
        (["--columns.output", "a", "b"], "--columns.output takes one value; got 'a b'. Quote it"),
        (["--columns.output", "a", "--columns.output", "b"], "both set columns.output"),
        (["--columns."], "unknown flag '--columns.'"),
        (["--seed.output", "a"], "unknown flag '--seed.output'"),
        (["--chat_template_kwargs.x", "{"], "--chat_template_kwargs.x: not valid YAML: '{'"),
        (["--columns", "a", "--columns.x", "b"], "columns: expected entries by name; got 'a'"),
        (["--datasets", "{path: a, columns: {output: x}}", "--columns.output", "y"],
         "columns maps output to 'y', and for a to 'x'; keep one"),
    ],
)  # fmt: skip
def test_entries_of_a_mapping_that_are_wrong(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse("DIR", *words)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["[INST]"], ["[INST]"]),
        (["[INST]", "[/INST]"], ["[INST]", "[/INST]"]),
        (['["<a>","<b>"]'], ["<a>", "<b>"]),
        (["['[INST]']"], ["[INST]"]),
        (["[a, b]"], ["a", "b"]),
        (["[a, '12']"], ["a", "12"]),
        (["[draft] hi"], ["[draft] hi"]),
        (["[draft] hi, you"], ["[draft] hi, you"]),
        (["[note]: a, b"], ["[note]: a, b"]),
        (["[a, b"], ["[a, b"]),
        (["none"], ["none"]),
    ],
)
def test_a_word_in_brackets_is_a_list_only_where_it_can_be_one(
    words: list[str], found: list[str]
) -> None:
    config, _ = parse("DIR", "--add_tokens", *words)
    assert config.add_tokens == tuple(found)
    config, _ = parse("DIR", "--eval_split", "0.1", "--sample_prompts", *words)
    assert config.sample_prompts == tuple(found)


def test_none_unsets_a_knob_and_is_a_word_to_a_door() -> None:
    _, door = parse("DIR", "--prompt", "none", "--share", "none")
    assert (door.prompt, door.share) == ("none", None)
    assert parse("DIR", "--prompt", "Null")[1].prompt == "Null"
    assert parse("DIR", "--system_prompt", "none")[0].system_prompt is None


def test_help_says_what_is_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert said.count("several words, or one YAML list with a comma or quotes: '[a, b]'") == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("D", "--max_lenght", "3"), "unknown flag '--max_lenght'. Did you mean 'max_length'?"),
        (("--max_length", "3"), "WHERE is missing. Usage: jaxtune door WHERE"),
        (("D", "E"), "'E' belongs to no flag"),
        (("D", "--max_length"), "--max_length needs a value"),
        (("D", "--max_length", "3", "4"), "--max_length takes one value"),
        (("D", "--lr", "1", "--learning_rate", "2"), "both set learning_rate"),
        (("D", "--datasets", "[{"), "not valid YAML"),
        (("D", "--add_tokens", '["<a>", "<b>"'), "--add_tokens: not valid YAML"),
        (("D", "--add_tokens", "[yes, b]"), "Input should be a valid string; got True"),
        (("D", "--share", "inf"), "share: Input should be a finite number; got 'inf'"),
        (("D", "--datasets", "[" * 50_000), "not valid YAML"),
        (("D", "--json", "perhaps"), "json: Input should be a valid boolean"),
    ],
)
def test_bad_flags_are_named(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("raised", "code"),
    [(ConfigError, 2), (DataError, 2), (ModelError, 2), (Diverged, 3), (cli.Stopped, 75)],
)
def test_exit_codes(raised: type, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config, options: Door) -> None:
        raise raised("the one message")

    assert cli.execute("door", "does.", Door, run, ["D"]) == code
    shown = capsys.readouterr()
    assert shown.err == "jaxtune door: the one message\n"
    assert shown.out == ""


def test_an_interrupt_is_one_line_and_the_other_hosts_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: Config, options: Door) -> None:
        raise KeyboardInterrupt

    assert cli.execute("door", "does.", Door, run, ["D"]) == 130
    assert capsys.readouterr().err == "jaxtune door: interrupted.\n"
    told = []
    monkeypatch.setattr(cli.ThisProcess, "leave", lambda code, said: told.append((code, said)))
    cli.execute("door", "does.", Door, run, ["D"])
    assert told == [(130, "interrupted.")]


@pytest.mark.parametrize(
    "text", ["lora: {r: 8}", "lora_r: 8", "lora: {r: '8'}", "adapter_name_or_path: somewhere"]
)
def test_the_learning_rate_of_adapters_is_another_and_said(tmp_path: Path, text: str) -> None:
    file, said = tmp_path / "c.yaml", []
    file.write_text(text)
    assert load(file, note=said.append).learning_rate == 2e-4
    assert any("learning_rate: 0.0002, the default with adamw and LoRA" in line for line in said)
    file.write_text(f"{text}\nlearning_rate: 1e-5")
    assert load(file).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: " + "[" * 50_000, "not valid YAML: nested too deeply"),
        ("seed: 2026-99-99\n", "not valid YAML: month must be in"),
        ("seed: !!timestamp x\n", "not valid YAML: 'NoneType' object"),
        ("seed: !!int ''\n", "not valid YAML: string index out of range"),
    ],
)
def test_yaml_that_its_reader_fails_on(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "odd.yaml")


def test_overrides_replace_what_a_mapping_or_a_config_sets():
    first = {"cutoff_len": 5, "dataset": "a.jsonl", "lora": {"r": 4}}
    for source in (first, Config(**first)):
        config = load_config(source, max_length=7, datasets=[{"path": "b.jsonl"}])
        assert (config.max_length, config.lora.r) == (7, 4)
        assert [entry.path for entry in config.datasets] == ["b.jsonl"]
    assert load_config(config) is config

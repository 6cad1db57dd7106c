"""What SECURITY.md promises and no other test holds: strangers' code, secrets, permissions."""

from __future__ import annotations

import ast
import datetime
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from jaxtune import cli, config, train
from jaxtune.data import sources
from jaxtune.data.templating import jinja
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "configs" / "quickstart" / "model"
DATE = datetime.date(2026, 1, 1)
SECRETS = {"HF_TOKEN": "hf_neverInAnyFile", "WANDB_API_KEY": "wandbNeverInAnyFile"}

# called or imported, these run what a file says
DANGEROUS = {
    *("eval", "exec", "__import__", "pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen", "torch"),
}
# room -> what it may use all the same. The workers talk to their own child processes.
ALLOWED = {"data/workers.py": {"pickle"}}


def dangers(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module).partition(".")[0]]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
            for word in node.keywords:
                switches = word.arg in ("trust_remote_code", "allow_pickle", "shell")
                if switches and ast.unparse(word.value) != "False":
                    found.add(f"{word.arg}={ast.unparse(word.value)}")
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        found |= {n for n in names if n in DANGEROUS}
    return found


def test_nothing_runs_what_a_file_says() -> None:
    files = sorted((ROOT / "jaxtune").rglob("*.py"))
    assert len(files) > 50
    for file in files:
        name = str(file.relative_to(ROOT / "jaxtune"))
        assert dangers(file.read_text()) <= ALLOWED.get(name, set()), name


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "import pickle", "from torch import load", "yaml.load(f)", "f = yaml.load"),
        *("from os import system", "np.load(p, allow_pickle=True)", "run(c, shell=True)"),
        "AutoTokenizer.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_the_check_itself_catches(line: str) -> None:
    assert dangers(line)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch gone') }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{% for m in messages %}{{ m.__setitem__('content', 'x') }}{% endfor %}",
    ],
)
def test_a_strangers_template_is_held(tmp_path: Path, source: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    with pytest.raises(config.ConfigError, match=r"unsafe|not safely callable"):
        resolve(str(file), load_tokenizer(str(MODEL)))


def test_only_what_the_package_brings_is_rendered_without_the_sandbox() -> None:
    free = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    how: dict[str, Any] = {"add_generation_prompt": False, "date": DATE, "named": {}}
    assert "Popen" in jinja.render(free, [], trusted=True, **how)  # so the sandbox does matter
    with pytest.raises(jinja.TemplateFailed, match="unsafe"):
        jinja.render(free, [], **how)


def test_a_strangers_config_makes_no_objects(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    file = tmp_path / "c.yaml"
    file.write_text(f"seed: !!python/object/apply:os.mkdir [{str(trace)!r}]\n")
    with pytest.raises(config.ConfigError, match=r"c\.yaml:1: not valid YAML"):
        config.load(str(file))
    assert not trace.exists()


def test_a_dataset_with_a_script_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    trace = tmp_path / "it-ran"
    (folder / "stranger.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    (folder / "rows.jsonl").write_text('{"text": "hello"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
        try:
            files = {Path(file.path).name for file in sources.find(str(folder), split="train")}
        except config.JaxtuneError:
            files = set()
    assert not trace.exists()
    assert files <= {"rows.jsonl"}


def test_a_run_writes_no_secret_and_ordinary_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    shape = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1024,
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(shape))
    rows = [{"instruction": f"What is {i}?", "output": f"A number, {i}."} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    before = os.umask(0o022)
    try:
        words = ["--model_name_or_path", str(model), "--init", "random", "--max_steps", "1"]
        words += ["--dataset", str(tmp_path / "train.jsonl"), "--output_dir", str(out)]
        words += ["--max_length", "64", "--report_to", "tensorboard"]
        assert train.main(words) == 0
    finally:
        os.umask(before)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "README.md"} <= {file.name for file in files}
    written = b"".join(file.read_bytes() for file in files)
    shown = "".join(capfd.readouterr())
    assert "trained:" in shown
    for value in SECRETS.values():
        assert value.encode() not in written
        assert value not in shown
    for path in (out, *out.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), f"{path}: {mode:o}"


def test_a_message_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.execute("train", "", train.TrainOptions, train.run, ["--\x1b[2Jgone", "1"]) == 2
    shown = capfd.readouterr().err
    assert "\x1b" not in shown
    assert r"\x1b[2Jgone" in shown

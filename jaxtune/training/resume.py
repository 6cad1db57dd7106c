"""Start a run: anew, or after the newest good checkpoint of the same run.

Refuses what would not be the same run: other data, another base, other adapters.
"""

from __future__ import annotations

from typing import Any

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError
from jaxtune.data.dataset import Batches
from jaxtune.data.progress import fingerprint
from jaxtune.training.checkpoint.checkpoints import Checkpoints
from jaxtune.training.initial_weights import base_params, first_adapters
from jaxtune.training.program import Program
from jaxtune.training.state import TrainState
from jaxtune.training.subject import Subject
from jaxtune.tree import split


def first_step(
    config: Config,
    checkpoints: Checkpoints,
    batches: Batches,
    subject: Subject,
    total_steps: int,
    *,
    before: int | None = None,
) -> int:
    """The step to go on from (below `before`); 0 is the beginning. Raises `ConfigError` for what
    would not be the same run."""
    latest = checkpoints.newest_good(note, before=before)
    if latest is None:
        if config.resume == "must" and before is None:
            raise ConfigError(f"resume: must, but {checkpoints.folder} holds no checkpoint.")
        return 0
    if config.resume == "never" and before is None:
        raise ConfigError(
            f"resume: never, but {checkpoints.folder} holds step {latest} of an earlier run, "
            "which would be overwritten. Choose another output_dir, or remove that one."
        )
    meta, now = checkpoints.meta(latest), fingerprint(batches)
    if meta["fingerprint"] != now:
        raise ConfigError(
            f"{checkpoints.folder}: step {latest} was trained on other data: its fingerprint of "
            f"data files, tokenizer, template, seed and batch is {meta['fingerprint'][:12]}, this "
            f"run's is {now[:12]}. Restore what changed, or choose another "
            "output_dir to start anew."
        )
    subject.check_resumed(meta, where=f"{checkpoints.folder}: step {latest}")
    if latest > total_steps and before is None:
        raise ConfigError(
            f"{checkpoints.folder}: holds step {latest}, but this run ends at {total_steps}. "
            "Raise max_steps or num_train_epochs, or choose another output_dir."
        )
    if meta["total_steps"] != total_steps:
        note(
            f"resume: the run was planned for {meta['total_steps']} steps and is now for "
            f"{total_steps}; the learning rate follows the new plan from here."
        )
    note(f"resume: going on after step {latest}")
    return latest


def past_of(config: Config, checkpoints: Checkpoints, start: int, evaluated: str) -> dict[str, Any]:
    """Read the meta of the checkpoint of `start`.

    Its best step is forgotten where `evaluated`, the fingerprint of the held-out data, is no longer
    what it was measured on, and where it is to be exported and is gone.
    """
    meta = checkpoints.meta(start) if start else {}
    history = meta.get("standing", {})
    best = history.get("best_step")
    if best is None:
        return meta
    if meta.get("held_out", evaluated) != evaluated:
        note(
            f"resume: what is evaluated on is not what it was, so step {best} is no longer the "
            "best, and evaluations are counted anew"
        )
        measured = ("best_step", "best_loss", "since_best")
        rest = {name: value for name, value in history.items() if name not in measured}
        return {**meta, "standing": rest}
    if config.load_best_model_at_end and not checkpoints.counts(best):
        note(
            f"resume: the best step {best}, eval_loss {history['best_loss']:.4f}, is kept nowhere "
            "any more; the best of the steps from here on is exported"
        )
        return {**meta, "standing": {**history, "best_step": None, "best_loss": None}}
    return meta


def first_state(
    config: Config,
    subject: Subject,
    program: Program,
    checkpoints: Checkpoints,
    start: int,
) -> tuple[TrainState, Any]:
    """The state to go on from, and what is frozen beside it; a resumed run reads only the latter
    from the model."""
    _, frozen = split(program.placed, program.is_trained)
    if start:
        state = checkpoints.restore(start, program.abstract, program.shardings)
        if not frozen:
            return state, frozen
    # A table is never quantised: its dtype is that of the parameters.
    dtype = program.variables["params"]["embed"]["table"].dtype
    params = base_params(subject.model, config, program.placed["params"], dtype, lora=subject.lora)
    variables = {"params": params}
    if start:
        return state, split(variables, program.is_trained)[1]
    if subject.adapters is not None:
        placed = program.placed["lora"]
        variables["lora"] = first_adapters(
            subject.spec, subject.adapters, variables["params"], placed, seed=config.seed
        )
    return program.first_state(variables)

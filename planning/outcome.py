"""What a prepared run is, put together: its record and its folder."""

import torch

from data import WindowPlan
from planning.decisions import KeptPrecision, RunRecord, keep_identity
from planning.plan import RunPlan
from planning.runs import Candidates, SettledRun
from planning.trial import Compiled, Trial
from text.token_cache import TokenizedText
from training.run_folder import RunFolder
from training_utils import TrainingConfig


def make_record(
    plan: RunPlan,
    candidates: Candidates,
    text: TokenizedText,
    trial: Trial,
    training: TrainingConfig,
    tried: tuple[Compiled, list[str]],
) -> RunRecord:
    """The record of all decisions; tried has notices of what differs from the settings."""
    learner, parallel, (compiled, adapted) = trial.learner, trial.parallel, tried
    return RunRecord(
        run_id=candidates.run_id,
        started=candidates.now,
        changes=[],
        mode=plan.mode,
        settings=plan.settings,
        asked=plan.asked(),
        model_name=plan.model_name,
        model=learner.model.config,
        training=training,
        choice=plan.choice,
        start=plan.start,
        chat=plan.chat,
        sampling=plan.sampling,
        device=learner.device.type if parallel.world > 1 else str(learner.device),
        ranks=parallel.world,
        parallel=parallel.kind,
        precision=KeptPrecision(learner.precision.name, learner.precision.reason),
        threads=trial.threads,
        micro_batch=learner.micro_batch,
        attention=learner.model.blocks[0].attention.kernel,
        compiled=compiled.on,
        why_compiled=compiled.reason,
        tokenizer=text.tokenizer.fingerprint,
        stood_in=text.stood_in,
        steps_per_epoch=trial.steps_per_epoch,
        total_steps=plan.count_steps(training, trial.steps_per_epoch),
        origins=plan.origins,
        adapted=adapted,
        torch=torch.__version__,
    )


def make_folder_of(
    run: SettledRun,
    record: RunRecord,
    text: TokenizedText,
    windows: WindowPlan,
    deadline: float | None,
) -> RunFolder:
    """The folder of a run, which is not on the disk before training begins."""
    notes: list[str] = []
    if run.before is not None:
        record, notes = keep_identity(record, run.before)
    data = text.report | {
        "tokenizer_id": text.tokenizer.fingerprint,
        "tokens_sha256": text.sha256,
        "split": {
            "train_tokens": windows.n_train,
            "validation_tokens": windows.n_val,
            "train_windows": windows.n_windows,
            "tokens_left_over": windows.n_unused,
        },
        "notices": text.notices,
    }
    return RunFolder(
        path=run.path,
        named=run.named,
        goes_on=run.before is not None,
        record=record,
        data=data,
        tokenizer_file=text.tokenizer_file,
        notes=[*run.notes, *notes],
        deadline=deadline,
    )

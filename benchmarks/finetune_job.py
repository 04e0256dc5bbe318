"""A contender of benchmarks.finetune: steps of this trainer, or of transformers' Trainer.

python -m benchmarks.finetune_job ours|theirs JOB  (finetune.py writes the job)
"""

import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peer_job import peak_bytes

LEARNING_RATE, BETA2, SEED = 1e-4, 0.95, 1


@dataclass(frozen=True)
class FineTuning:
    """Steps over a window each, in a folder with tokens.npy and the weights as transformers reads
    them; model has the fields of a GPTConfig. lora_rank None trains all weights."""

    folder: str
    model: dict[str, Any]
    length: int
    steps: int
    lora_rank: int | None
    bf16: bool

    def windows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The (T,) ids and targets of each step."""
        tokens = torch.from_numpy(np.load(Path(self.folder) / "tokens.npy"))
        starts = range(0, self.steps * self.length, self.length)
        return [(tokens[s : s + self.length], tokens[s + 1 : s + 1 + self.length]) for s in starts]


def ours(job: FineTuning) -> dict[str, Any]:
    """Train with this trainer's step."""
    from benchmarks.steps import fresh_model
    from engine.lora import add_lora
    from engine.optim import build_adamw
    from engine.precision import DTYPES, Precision
    from engine.processor import default_threads, prepare_processor
    from model import GPTConfig
    from training.learner import take_step

    prepare_processor()
    torch.set_num_threads(default_threads())
    precision = Precision("bf16" if job.bf16 else "fp32", "as the other's", "cpu")
    model = fresh_model(GPTConfig(**job.model), torch.device("cpu"))
    if job.lora_rank is not None:
        add_lora(model, job.lora_rank, SEED, DTYPES[precision.name])
    model.train()
    optimizer = build_adamw(model, LEARNING_RATE, 0.0)
    marks, losses = [time.perf_counter()], []
    for ids, targets in job.windows():
        loss, _ = take_step(model, [(ids[None], targets[None])], optimizer, precision, 1.0)
        losses.append(loss.item())
        marks.append(time.perf_counter())
    return {"marks": marks, "first_loss": losses[0], "versions": {"torch": torch.__version__}}


def theirs(job: FineTuning) -> dict[str, Any]:
    """Train with transformers' Trainer, and PEFT for an adapter."""
    try:
        import peft
        import transformers
    except ImportError as error:
        sys.exit(f"{error.name} is missing: pip install transformers peft accelerate")
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            for ids, targets in job.windows():
                yield {"input_ids": ids, "labels": targets, "shift_labels": targets}

    model = transformers.AutoModelForCausalLM.from_pretrained(Path(job.folder) / "weights")
    if job.lora_rank is not None:
        rank = job.lora_rank
        settings = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=BETA2,
            bf16=job.bf16,
            use_cpu=True,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Windows(), callbacks=[Clock()]
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    libraries = (torch, transformers, peft)
    versions = {library.__name__: library.__version__ for library in libraries}
    return {"marks": marks, "first_loss": losses[0], "versions": versions}


def main(who: str, path: str) -> None:
    """Train, and write the report beside the job."""
    job = FineTuning(**json.loads(Path(path).read_text(encoding="utf-8")))
    found = {"ours": ours, "theirs": theirs}[who](job)
    marks = found.pop("marks")
    found["step_s"] = [end - start for start, end in itertools.pairwise(marks)]
    found["peak_bytes"] = peak_bytes()
    Path(job.folder, "report.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])

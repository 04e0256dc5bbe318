"""transformers' Trainer as a contender, in the peers' environment (peers.py writes the job).

python -m benchmarks.peer_transformers JOB
"""

import sys
import tempfile
from importlib.metadata import version

import torch
from torch.utils.data import IterableDataset
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peer_job import Job, StepClock, read_job, report


class Windows(IterableDataset):
    """The windows in order; Trainer would shuffle a map-style dataset."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self):
        for window in self.job.windows():
            targets = torch.from_numpy(window[1:])
            # shift_labels gives each id a target; labels alone would leave out one
            yield {
                "input_ids": torch.from_numpy(window[:-1]),
                "labels": targets,
                "shift_labels": targets,
            }


class Clock(TrainerCallback):
    """Marks the start and the end of Trainer's steps."""

    def __init__(self) -> None:
        self.steps = StepClock()

    def on_train_begin(self, *_, **__):
        self.steps.mark()

    def on_step_end(self, *_, **__):
        self.steps.mark()


def main(job: Job) -> None:
    """Train GPT2LMHeadModel with Trainer from our weights, and report."""
    clock = Clock()
    model = GPT2LMHeadModel.from_pretrained(job.weights)
    with tempfile.TemporaryDirectory() as folder:
        logging = {"logging_steps": 1} if job.keep_losses else {}
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=job.precision == "bf16",
            use_cpu=job.device == "cpu",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            **logging,
        )
        trainer = Trainer(model, arguments, train_dataset=Windows(job), callbacks=[clock])
        trainer.train()
    parameters = sum(p.numel() for p in model.parameters())
    not_in_products = model.transformer.wpe.weight.numel()
    if not model.config.tie_word_embeddings:
        not_in_products += model.transformer.wte.weight.numel()
    report(
        job,
        clock.steps,
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        parameters=parameters,
        in_products=parameters - not_in_products,
        precision="bf16" if arguments.bf16 else "fp32",
        versions={name: version(name) for name in ("torch", "transformers", "accelerate")},
    )


if __name__ == "__main__":
    main(read_job(sys.argv[1]))

"""litgpt's pretraining as a contender, in the peers' environment (peers.py writes the job).

python -m benchmarks.peer_litgpt JOB

Its closest model to GPT-2 has rotary positions and a vocabulary padded to a multiple of 64.
Precision and compiling are its defaults.
"""

import csv
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import get_default_supported_precision
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.peer_job import Job, StepClock, read_job, report


class Windows(IterableDataset):
    """The job's windows in order; with a clock, each batch marks the end of a step."""

    def __init__(self, job: Job, clock: StepClock | None) -> None:
        self.job, self.clock = job, clock

    def __iter__(self):
        for number, window in enumerate(self.job.windows()):
            # litgpt requests a batch at the end of the previous step
            if self.clock is not None and number % self.job.batch_size == 0:
                self.clock.mark()
            yield torch.from_numpy(window)


class Tokens(DataModule):
    """The job's windows as a litgpt DataModule."""

    def __init__(self, job: Job, clock: StepClock) -> None:
        super().__init__()
        self.job, self.clock = job, clock

    def connect(self, **_) -> None:
        """Ignore the tokenizer and the batch size."""

    def train_dataloader(self) -> DataLoader:
        """The training batches."""
        return DataLoader(Windows(self.job, self.clock), batch_size=self.job.batch_size)

    def val_dataloader(self) -> DataLoader:
        """The validation batches."""
        return DataLoader(Windows(self.job, None), batch_size=self.job.batch_size)


def nearest_model(shape: dict) -> Config:
    """litgpt's closest configuration to a GPTConfig's fields."""
    return Config(
        name="gpt2-like",
        block_size=shape["context_length"],
        vocab_size=shape["vocab_size"],
        padding_multiple=64,
        n_layer=shape["n_layers"],
        n_head=shape["n_heads"],
        n_embd=shape["emb_dim"],
        intermediate_size=shape["ff_dim"],
        parallel_residual=False,
        gelu_approximate="tanh",
    )


def main(job: Job) -> None:
    """Train with litgpt.pretrain.setup, and report."""
    clock, trained = StepClock(), []
    build = pretrain.GPT

    def keep_model(config: Config) -> torch.nn.Module:
        trained.append(build(config))
        return trained[-1]

    # neither affects a timed step: the model for its parameter count, and no 2 GB checkpoint
    pretrain.GPT = keep_model
    pretrain.save_checkpoint = lambda *_: None
    config = nearest_model(job.model)
    with tempfile.TemporaryDirectory() as folder:
        pretrain.setup(
            model_name=config.name,
            model_config=config,
            out_dir=Path(folder),
            data=Tokens(job, clock),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=job.batch_size,
                micro_batch_size=job.batch_size,
                max_tokens=job.steps * job.batch_size * job.max_length,
                lr_warmup_steps=None,
                max_norm=1.0,
                min_lr=job.learning_rate,
                tie_embeddings=job.model["tie_embeddings"],
            ),
            eval=EvalArgs(interval=job.steps + 1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {
                    "lr": job.learning_rate,
                    "betas": (0.9, 0.95),
                    "weight_decay": 0.0,
                },
            },
            devices=1,
            logger_name="csv",
        )
        (metrics,) = Path(folder).rglob("metrics.csv")
        with metrics.open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
    model = trained[0]
    parameters = sum(p.numel() for p in model.parameters())
    looked_up = 0 if job.model["tie_embeddings"] else model.transformer.wte.weight.numel()
    report(
        job,
        clock,
        losses=losses,
        parameters=parameters,
        in_products=parameters - looked_up,
        precision=get_default_supported_precision(training=True),
        versions={name: version(name) for name in ("torch", "litgpt", "lightning")},
    )


if __name__ == "__main__":
    main(read_job(sys.argv[1]))

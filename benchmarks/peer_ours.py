"""This project as a contender: python -m benchmarks.peer_ours JOB (peers.py writes the job)."""

import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.peer_job import Job, StepClock, read_job, report
from benchmarks.steps import prepare_step
from data import WindowBatches, WindowDataset, as_batch
from engine.precision import choose_precision
from model import GPTConfig


def main(job: Job) -> None:
    """Train with train.py's loader and step, and report."""
    device = torch.device(job.device)
    precision = choose_precision(job.precision, device)
    windows = WindowDataset(np.load(job.tokens, mmap_mode="r"), job.max_length, job.max_length)
    in_order = WindowBatches(windows, job.batch_size, seed=None)
    loader = DataLoader(windows, batch_sampler=in_order, collate_fn=as_batch)
    model, step = prepare_step(
        GPTConfig(**job.model),
        device,
        precision,
        learning_rate=job.learning_rate,
        weight_decay=0.0,
    )
    clock, losses = StepClock(), []
    batches = iter(loader)
    clock.mark()
    for _ in range(job.steps):
        loss = step(*next(batches))
        if device.type != "cpu":
            torch.accelerator.synchronize()
        clock.mark()
        losses.append(loss)
    report(
        job,
        clock,
        losses=[loss.item() for loss in losses],
        parameters=model.count_parameters(),
        in_products=model.parameters_in_products(),
        precision=precision.name,
        versions={"torch": torch.__version__},
    )


if __name__ == "__main__":
    main(read_job(sys.argv[1]))

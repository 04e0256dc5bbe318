"""Train a GPT from scratch on your own text: edit config_run.py, then run  python main.py"""

import contextlib
import gc
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.clock import process_began_at
from engine.starting import end_at_ctrl_c, insisting_on_ctrl_c, raise_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()
    began_at = process_began_at()
# Shorter busy-waiting of OpenMP's threads: beside another program it doubles a step's time.
# OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Without it torch logs pages of addresses when a rank is lost.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from data import evaluation_loader
from distributed.parallel import ALONE, join
from distributed.sharding import whole
from distributed.signals import StopSignals
from engine.console import complain, report_failure, say, use_utf8
from engine.errors import (
    BusyError,
    CheckpointError,
    NumericsError,
    PipelineError,
    ResourceError,
    RunFinished,
    SettingsError,
    Stopped,
    first_line,
)
from engine.metrics import Score
from engine.processor import using_threads
from environment import RuntimeEnv, prepare_environment
from insight.report import Report
from storage.files import write_json
from train import continue_prompts, train
from training.journal import PICTURE, History, Journal

LINE = "=" * 70


def main(arguments: list[str], *, began_at: float | None = None) -> int:
    """Run the pipeline; returns the exit code (see engine/errors.py).

    MINUTES count from began_at, by time.perf_counter(); None: from this call.
    """
    use_utf8()
    began_at = time.perf_counter() if began_at is None else began_at
    env, parallel = None, ALONE
    try:
        parallel = join()
        with parallel.watched():
            settings = _settings_file(arguments)
            say(f"{LINE}\nGPT Model Training Pipeline\n{LINE}")
            with insisting_on_ctrl_c():
                env = prepare_environment(settings, began_at=began_at)
            with _no_more_worker_errors():
                run_pipeline(env)
    except RunFinished as finished:
        say(f"✓ {finished}")
    except Stopped as stopped:
        after_training = "The training is done and saved; the same command finishes the rest."
        complain(str(stopped) or after_training)
        return stopped.exit_code
    except (PipelineError, MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        if _is_lost_worker(error):
            error = ResourceError(
                "a process that prepares batches was ended from outside: "
                f"{first_line(error)[:100]}\n"
                "Memory may have run out. Set num_workers to 0, or to a lower number."
            )
        return report_failure(
            error,
            "Set a smaller batch_size and, for the same step, more gradient_accumulation_steps; or "
            "a smaller max_length or model.",
            kept="" if isinstance(error, BusyError | CheckpointError) else _what_is_kept(env),
            prefix=parallel.prefix,
            is_told=parallel.speaks_for_all,
        )
    except KeyboardInterrupt:
        complain("Stopped." + _what_is_kept(env))
        return 130
    finally:
        parallel.leave()
    return 0


@contextlib.contextmanager
def _no_more_worker_errors() -> Iterator[None]:
    """After an error, keep torch's signal handler for dead workers from raising another one."""
    try:
        yield
    except Exception:
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise


def _is_lost_worker(error: Exception) -> bool:
    """Whether a loader's worker died: torch says so, or its pipe broke."""
    if isinstance(error, ConnectionError | EOFError):
        frames = traceback.extract_tb(error.__traceback__)
        return any(Path(frame.filename).name == "dataloader.py" for frame in frames)
    return "DataLoader worker (pid" in str(error)


def _what_is_kept(env: RuntimeEnv | None) -> str:
    """Where the measurements of a failed run are, if there are any."""
    if env is None or not os.path.exists(env.run.path / "metrics.jsonl"):
        return ""
    return f" What was measured so far is in {env.run.path}"


def run_pipeline(env: RuntimeEnv) -> None:
    """Train, sample, plot and sum up; all files are in env.run.path.

    Raises NumericsError in the end if training has diverged.
    """
    say("\nTRAINING START")
    # the lock and the threads are for the samples and the summary too
    with env.parallel.held_by_main(env.run.opened), using_threads(env.run.record.threads):
        journal = train(env)
        env.parallel.place = "after training"
        requested = env.parallel.only_main(env.run.take_stop_request)
        with StopSignals(env.parallel, requested) as stop:
            show_samples(env, journal, stop)
            if journal.complete_picture():
                say(f"✓ Saved training loss plot to {PICTURE}")
            stop.agree()
            stop.check()
            say("\nTRAINING COMPLETE")
            sum_up(env, journal, stop)
    if journal.history.has_diverged:
        losses, rate = journal.history.train_losses, env.train_config.learning_rate
        raise NumericsError(
            f"training diverged: the training loss rose from {losses[0]:.4g} to {losses[-1]:.4g}.\n"
            f"The learning rate was {rate:.3g}; begin a run with a third of it, or with a "
            "max_grad_norm of 1."
        )
    say("✓ Training pipeline finished successfully!")


def show_samples(env: RuntimeEnv, journal: Journal, stop: StopSignals) -> None:
    """Continue the prompts or answer the questions, as one batch: greedy, top-k and top-p.

    Raises Stopped after a signal: a single process after the token that it writes, several ranks
    after the sample.
    """
    sampling, prompts = env.run.record.sampling, env.prompts
    top_k, top_p = ("all" if n is None else n for n in (sampling.top_k, sampling.top_p))
    generator = torch.Generator(device=env.device).manual_seed(env.run.record.asked.seed)
    choices: dict[str, dict[str, float | None]] = {
        "Greedy": {"temperature": 0.0},
        f"Top-k ({top_k})": {"top_k": sampling.top_k},
        f"Top-p ({top_p})": {"top_p": sampling.top_p},
    }
    for label, choice in choices.items():
        options = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "repetition_window": sampling.repetition_window,
            "generator": generator,
            "on_step": stop.check,
        }
        with whole(env.model, env.parallel), env.precision.autocast():
            texts = continue_prompts(env.model, env.tokenizer, prompts, **options | choice)
        journal.note_sample(label, texts, is_last=True)
        stop.agree()
        stop.check()


def sum_up(env: RuntimeEnv, journal: Journal, stop: StopSignals) -> None:
    """Print the summary and then write summary.json, which marks a finished run."""
    most = env.train_config.final_iter
    score = env.learner.score(env.val_loader, env.tokenizer, most, stop, label="Evaluating")
    text = "validation text" if env.run.record.chat is None else "answers that validate"
    over = f"all {text}"
    if score.n_batches < score.of_batches:
        over = f"{score.n_batches:,} of {score.of_batches:,} batches of the {text}"
    history = journal.history
    step = journal.weights_of_step or history.steps[-1]
    final_train = history.train_losses[history.steps.index(step)]
    best_loss, best_step, how_best = _best(env, history, step, score)
    whose = "" if journal.weights_of_step is None else "with the best weights, "
    say("Training Summary:")
    say(f"  Final train loss: {final_train:.4f}")
    say(f"  Final val loss: {score.loss:.4f}")
    say(f"  Best val loss: {best_loss:.4f} (at step {best_step}{how_best})")
    if history.skipped:
        say(f"  Steps skipped: {history.skipped} (a loss or gradient was not finite)")
    say(f"  Run folder: {env.run.path} (its report.html says what came of the run)")
    start = env.run.record.start
    untuned = None if start is None else start.bits_per_byte
    is_of_part = start is not None and start.measured_share < 1
    earlier = ""
    if untuned is not None:
        earlier = f"before training {untuned:.3f}{' on a part of it' * is_of_part}; "
    say(
        f"  Bits a byte: {score.bits_per_byte:.3f} ({score.bits_per_character:.3f} a character, "
        f"perplexity {score.perplexity:,.1f}; {earlier}{whose}over {over})"
    )
    of_all = not is_of_part and score.n_batches == score.of_batches
    if untuned is not None and of_all and score.bits_per_byte >= untuned:
        say(
            "  Note: the weights were no worse before training: set a lower learning_rate, or more "
            "text"
        )
    summary = {
        "final_train_loss": final_train,
        "final_val_loss": score.loss,
        "final_val_perplexity": score.perplexity,
        "final_val_bits_per_character": score.bits_per_character,
        "final_val_bits_per_byte": score.bits_per_byte,
        "best_val_loss": best_loss,
        "best_step": best_step,
        "initial_val_loss": history.val_losses[0],
        "initial_val_bits_per_byte": untuned,  # of weights that INIT_FROM names
        "uniform_loss": math.log(env.tokenizer.vocab_size),
        "weights_of_step": step,
        "steps": len(history.batch_losses),
        "steps_skipped": history.skipped,
        "tokens_seen": history.tokens_seen[-1],
        "elapsed_s": history.elapsed_s,
        "parameters": env.model.count_parameters(),
        "device": str(env.device),
        "precision": env.precision.name,
        "ranks": env.parallel.world,
    }
    env.parallel.on_main(lambda: _write_summary(env.run.path, summary))


def _write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, and say what the run shows."""
    write_json(folder / "summary.json", summary)
    for line in Report(folder).finish():
        say(line)


def _best(env: RuntimeEnv, history: History, step: int, score: Score) -> tuple[float, int, str]:
    """The lowest validation loss, its step, and what it compares with where it is not comparable
    with the score of the weights of `step`: it is an evaluation's, of a part of the text."""
    best_step = history.steps[history.best]
    if best_step == step:
        return score.loss, step, ""
    read = evaluation_loader(env.val_loader, env.train_config.eval_iter).batch_sampler
    how = ""
    if read.n_batches < read.of_batches:
        then = history.val_losses[history.steps.index(step)]
        how = (
            f"; on {read.n_batches:,} of {read.of_batches:,} batches of the validation text, "
            f"on which step {step} has {then:.4f}"
        )
    return history.val_losses[history.best], best_step, how


def _settings_file(arguments: list[str]) -> str | None:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        raise SettingsError(
            f"main.py does not know {' '.join(arguments)}.\n"
            "It takes no options: edit config_run.py, or name another settings file of its shape."
        )
    return arguments[0] if arguments else None


if __name__ == "__main__":
    raise_at_ctrl_c()
    code = main(sys.argv[1:], began_at=began_at)
    gc.freeze()  # else the end of Python collects all that was imported, for half a second
    sys.exit(code)

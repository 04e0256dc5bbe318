"""Train a GPT from scratch on your own text: edit config_run.py, then run  python main.py"""

import math
import os
import sys

import torch

from engine.console import complain, say, use_utf8
from engine.errors import PipelineError, ResourceError, SettingsError
from engine.metrics import perplexity
from engine.storage import write_json
from environment import RuntimeEnv, is_out_of_memory, prepare_environment
from generation import generate, text_to_token_ids, token_ids_to_text
from train import PICTURE, History, Journal, mean_loss, save_picture, train

LINE = "=" * 70


def main(arguments: list[str]) -> int:
    """Run the whole pipeline; returns the exit code (engine/errors.py has them)."""
    use_utf8()
    env = None
    try:
        settings = _settings_file(arguments)
        say(f"{LINE}\nGPT Model Training Pipeline\n{LINE}")
        env = prepare_environment(settings)
        run_pipeline(env)
    except (PipelineError, MemoryError, RuntimeError) as error:
        if os.environ.get("GPT_DEBUG") == "1":
            raise
        return _report_failure(error, env)
    except KeyboardInterrupt:
        complain("Stopped." + _what_is_kept(env))
        return 130
    return 0


def _report_failure(error: Exception, env: RuntimeEnv | None) -> int:
    """Say what went wrong; returns the exit code. What nobody expected keeps its traceback."""
    if is_out_of_memory(error):
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        error = ResourceError(
            f"out of memory: {reason[:100]}\nSet a smaller batch_size, max_length or model."
        )
    if not isinstance(error, PipelineError):
        raise error
    complain(f"{type(error).__name__}: {error}{_what_is_kept(env)}")
    return error.exit_code


def _what_is_kept(env: RuntimeEnv | None) -> str:
    if env is None or not env.run.path.is_dir() or not (env.run.path / "metrics.jsonl").exists():
        return ""
    return f" What was measured so far is in {env.run.path}"


def run_pipeline(env: RuntimeEnv) -> None:
    """Train, sample, plot, sum up; everything that is left behind is in env.run.path."""
    _headline("TRAINING START")
    journal = train(env)
    show_samples(env, journal)
    if save_picture(journal.history, env.run.path, env.tokenizer.vocab_size):
        say(f"✓ Saved training loss plot to {PICTURE}")
    else:
        say("Note: matplotlib is not installed, so there is no picture (pip install matplotlib)")
    _headline("TRAINING COMPLETE")
    sum_up(env, journal.history)
    say("✓ Training pipeline finished successfully!")


def show_samples(env: RuntimeEnv, journal: Journal) -> None:
    """Continue the start context in three ways: greedy, top-k and top-p."""
    sampling = env.sampling
    prompt = text_to_token_ids(env.train_config.start_context, env.tokenizer).to(env.device)
    generator = torch.Generator(device=env.device).manual_seed(env.seed)
    for label, choice in (
        ("Greedy", {"temperature": 0.0}),
        (f"Top-k ({sampling.top_k})", {"top_k": sampling.top_k}),
        (f"Top-p ({sampling.top_p})", {"top_p": sampling.top_p}),
    ):
        options = {"temperature": sampling.temperature, "generator": generator} | choice
        with env.precision.autocast():
            ids = generate(env.model, prompt, max_new_tokens=sampling.max_new_tokens, **options)
        journal.note_sample(label, token_ids_to_text(ids, env.tokenizer))


def sum_up(env: RuntimeEnv, history: History) -> None:
    """Print the summary and write summary.json; the final loss is over all validation text."""
    final_val = mean_loss(env.model, env.val_loader, env.device, env.precision)
    best = history.best
    say("Training Summary:")
    say(f"  Final train loss: {history.train_losses[-1]:.4f}")
    say(
        f"  Final val loss: {final_val:.4f} (over all validation text; perplexity "
        f"{perplexity(final_val):,.1f})"
    )
    say(f"  Best val loss: {history.val_losses[best]:.4f} (at step {history.steps[best]})")
    say(f"  Run folder: {env.run.path}")
    summary = {
        "final_train_loss": history.train_losses[-1],
        "final_val_loss": final_val,
        "final_val_perplexity": perplexity(final_val),
        "best_val_loss": history.val_losses[best],
        "best_step": history.steps[best],
        "initial_val_loss": history.val_losses[0],
        "uniform_loss": math.log(env.tokenizer.vocab_size),
        "steps": len(history.batch_losses),
        "tokens_seen": history.tokens_seen[-1],
        "elapsed_s": history.elapsed_s,
        "parameters": env.model.count_parameters(),
        "device": str(env.device),
        "precision": env.precision.name,
    }
    write_json(env.run.path / "summary.json", summary)


def _headline(text: str) -> None:
    say(f"\n{LINE}\n{text}\n{LINE}")


def _settings_file(arguments: list[str]) -> str | None:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        raise SettingsError(
            f"main.py does not know {' '.join(arguments)}.\n"
            "It takes no options: edit config_run.py, or name another settings file of its shape."
        )
    return arguments[0] if arguments else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

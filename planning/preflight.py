"""The lines that are printed before a run: machine, text, model and training."""

from typing import Any

from data import WindowPlan
from engine.console import say
from engine.devices import device_count, device_name
from model import GPTModel
from planning.card import about_tokens, card_lines, start_lines
from planning.decisions import RunRecord, most_steps_of
from planning.machine import Machine, why_no_gpu
from planning.plan import OPEN_MODEL, RunPlan
from planning.recipe import MOST_REPEATED
from text.documents import DataSpec
from text.facts import TextFacts
from text.token_cache import TokenizedText
from training_utils import TrainingConfig

FEW_TOKENS = 32  # to validate on
MOST_COPIED = 0.45  # of the text, without a note; of one that was pasted twice it is half
HOW_MANY = "torchrun --nproc-per-node 2 main.py uses two"


def show_machine(machine: Machine, plan: RunPlan) -> None:
    device, parallel, precision = machine.device, machine.parallel, machine.precision
    say(f"Device: {device.type.upper()}")
    if not parallel.is_alone:
        name = {"ddp": "DDP, unsharded", "fsdp": "FSDP2, sharded"}
        say(f"Parallel: {parallel.world} processes ({name[parallel.kind]})")
    elif plan.run.PARALLEL != "auto":
        say(f"Note: PARALLEL is for torchrun's processes, and this one is alone ({HOW_MANY})")
    elif device.type == "cuda" and (count := device_count("cuda")) > 1:
        say(f"Note: one of {count} GPUs is used ({HOW_MANY})")
    if device.type != "cpu":
        say(f"GPU: {device_name(device)}")
    elif plan.run.DEVICE is None and parallel.is_main and (reason := why_no_gpu()):
        say(f"Note: {reason}")
    say(f"Precision: {precision.name} ({precision.reason})")
    say(f"Mode: {plan.mode} ({plan.origins['mode'].en})")
    if plan.model_name != OPEN_MODEL:  # else the card has it
        say(f"Model: {plan.model_name} ({plan.origins['model'].en})")
    for notice in plan.notices:
        say(f"Note: {notice}")


def show_card(plan: RunPlan) -> None:
    """What was chosen for MINUTES, and what is expected of it."""
    choice, minutes = plan.choice, plan.run.MINUTES
    assert choice is not None and minutes is not None, "decide_recipe() has chosen"
    why = plan.origins.get("start")
    lines = card_lines(choice.recipe, choice.text, choice.machine, minutes, why)
    say("\n".join(["", *lines, ""]))


def show_tokenizer(plan: RunPlan, text: TextFacts) -> None:
    """What TOKENIZER "auto" has become."""
    assert plan.tokenizer is not None, "decide_tokenizer() has chosen"
    say(f"Tokenizer: {about_tokens(plan.tokenizer, text).en}: chosen for this text and model")


def show_start(plan: RunPlan, training: TrainingConfig, total_steps: int, model: GPTModel) -> None:
    """What a run begins from that has given weights, and how it trains."""
    if plan.start is not None:
        lines = start_lines(plan, training, total_steps, model.count_parameters())
        say("\n".join(["", *lines, ""]))


def show_text(text: TokenizedText, spec: DataSpec) -> None:
    for notice in text.notices:
        say(f"Note: {notice.en}")
    files = text.report["files"]
    name = files[0]["name"] if len(files) == 1 else ", ".join(spec.train + spec.val)
    say(f"✓ Text loaded from {name}")
    for note in text.report["notes"]:
        say(f"  {note.en}")
    say(f"✓ Tokenizer initialized ({text.report['tokenizer']})")


def show_model(plan: RunPlan, model: GPTModel) -> None:
    if plan.recipe is not None:  # the card has it
        return
    name, config = plan.model_name, model.config
    purpose = " (for testing)" if name == "small" else ""
    say(f"✓ Using {name} model configuration{purpose}")
    say("Model Configuration")
    say(f"  Vocab size: {config.vocab_size:,}")
    say(f"  Context length: {config.context_length:,}")
    say(f"  Embedding dim: {config.emb_dim:,}")
    say(f"  Num heads: {config.n_heads}")
    say(f"  Num layers: {config.n_layers}")
    say(f"  Total params: {model.count_parameters():,}")


def show_all(
    plan: RunPlan, record: RunRecord, text: TokenizedText, windows: WindowPlan, model: GPTModel
) -> None:
    """What is trained, on what, and with which numbers."""
    show_start(plan, record.training, record.total_steps, model)
    show_training(plan, record.training, record.total_steps, record.adapted)
    show_windows(plan, text, windows, model)


def show_training(
    plan: RunPlan, training: TrainingConfig, total_steps: int | None, adapted: list[str]
) -> None:
    """The notices and the numbers of training; total_steps None: what its minutes allow."""
    name = plan.mode if plan.start is None else "fine-tuning"
    for notice in adapted:
        say(f"Note: {notice}")
    purpose = ", for testing" if name == "quick" else ""
    minutes = training.time_budget_minutes or 0.0
    length = f"{training.num_epochs} epoch{'s' * (training.num_epochs != 1)}"
    if training.max_steps is not None:
        length = f"{training.max_steps} steps"
    elif minutes:
        length = f"{minutes:g} minute{'s' * (minutes != 1)}"
    say(f"✓ Using {name} training config ({length}{purpose})")
    accumulation = training.gradient_accumulation_steps
    batch = f"{accumulation} x " * (accumulation > 1) + f"{training.batch_size}"
    count = "steps that fit, each"
    if total_steps is not None:
        count = f"{total_steps:,} steps"
    elif most := most_steps_of(plan.recipe, minutes, 0, from_weights=False):
        count = f"at most {most:,} steps"
    warmup = "" if training.warmup_steps is None else f", {training.warmup_steps} warm-up steps"
    say(
        f"  {count} of {batch} x {training.max_length} tokens, learning rate "
        f"{training.learning_rate:.3g} ({training.schedule}{warmup})"
    )
    say("✓ Data loaders ready")


def show_windows(plan: RunPlan, text: TokenizedText, windows: WindowPlan, model: GPTModel) -> None:
    if plan.recipe is None:
        by_heart = plan.chat is not None and plan.chat.is_small  # what the run is for
        n_parameters = model.count_parameters()
        lines = describe_text(text.report, windows, n_parameters, by_heart=by_heart)
    else:  # the card has the rest
        lines = about_documents(text.report)
    for line in lines + about_prompts(text.report):
        say(f"  {line}")
    # the card may have told it
    if plan.choice is None or plan.choice.text.repeated <= MOST_REPEATED:
        for line in about_copies(text.report):
            say(f"  {line}")
    train = (
        f"{windows.n_train:,} tokens to train on in {windows.n_windows:,} windows "
        f"({windows.n_unused} left over)"
    )
    if plan.chat is not None:
        train = (
            f"{plan.chat.rows:,} conversations to train on: {windows.n_train:,} tokens in "
            f"{windows.n_windows:,} windows, in which each sees itself alone"
        )
    say(f"  {train}, {windows.n_val:,} to validate on")
    if windows.n_val < FEW_TOKENS:
        say(
            f"  Note: {windows.n_val} tokens to validate on say little: the validation loss and "
            'the best weights are chance; a longer text, or DATA\'s "val", has more'
        )


def about_copies(report: dict[str, Any]) -> list[str]:
    """A note where much of a text is copies of what came before in the same document."""
    if (copied := report.get("copied", 0.0)) < MOST_COPIED:  # reports of old entries lack it
        return []
    return [
        f"Note: {copied:.0%} of the text repeats what came before in the same document: the "
        "model learns it by heart; leave the copies out of the text"
    ]


def about_prompts(report: dict[str, Any]) -> list[str]:
    """A note where a question is asked in training and in validation."""
    if not (shared := report.get("chat", {}).get("prompts_on_both_sides", 0)):
        return []
    verb = "is" if shared == 1 else "are"
    return [
        f"Note: {shared:,} of the questions to validate on {verb} trained on too: the validation "
        "loss says less of new ones"
    ]


def about_documents(report: dict[str, Any]) -> list[str]:
    """A line on the documents that add nothing, if there are any; a note if most repeat others."""
    lines = []
    aside = {
        "passed over": len(report["passed_over"]),
        "without text": report["empty_documents"],
        "duplicates": report["duplicate_documents"],
        "in both training and validation text": report["documents_on_both_sides"],
    }
    if any(aside.values()):
        counts = ", ".join(f"{number:,} {what}" for what, number in aside.items() if number)
        lines.append(f"{counts} (data.json in the run folder has more)")
    if 2 * report["duplicate_documents"] >= report["documents"] > 1:
        lines.append(
            f"Note: {report['duplicate_documents'] / report['documents']:.0%} of the documents "
            "repeat others: the model learns them by heart; leave them out of the text"
        )
    return lines


def describe_text(
    report: dict[str, Any], plan: WindowPlan, n_parameters: int, *, by_heart: bool = False
) -> list[str]:
    """Lines on the text: its files, its tokens, and whether it is enough for the model; by_heart
    says that the model is to learn it by heart."""
    count, size = len(report["files"]), f"{report['characters']:,} characters"
    if report["bytes"]:  # a dataset from the Hub has no files to count
        size = f"{report['bytes']:,} bytes, {size}"
    lines = [
        f"{report['documents']:,} document{'s' * (report['documents'] != 1)} in {count:,} "
        f"file{'s' * (count != 1)}: {size}"
    ]
    lines += about_documents(report)
    per_parameter = plan.n_train / n_parameters
    verdict = "a few epochs are safe"
    if per_parameter < 1:
        verdict = "the model can learn it by heart"
        verdict += ", as it is to" if by_heart else ": watch the validation loss"
    elif per_parameter >= 20:  # compute-optimal (Hoffmann et al. 2022)
        verdict = "enough to learn more than the text itself"
    lines.append(
        f"{plan.n_tokens:,} tokens, {report['tokens_per_character']:.2f} a character, "
        f"{report['vocabulary_used'] / report['vocabulary']:.0%} of the vocabulary in use"
    )
    lines.append(f"{per_parameter:.3g} training tokens a parameter: {verdict}")
    return lines

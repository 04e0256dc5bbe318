"""The README.md of a model that leaves: what it learnt from, how long, and how well."""

import json
from pathlib import Path
from typing import Any

from engine.metrics import as_duration
from exchange.saved_run import LoadedModel
from storage.files import DATA, SUMMARY

MOST_NAMED = 10  # files of the text
LICENCE = """## Licence

None is chosen yet: that is for whoever publishes the model. It depends on the licence of the text
that the model learnt from, and of the weights that training began with."""


def model_card(model: LoadedModel, dtype: str) -> str:
    """A model card, in Markdown with the head that the Hugging Face Hub reads."""
    config = model.model.config
    rows = {
        "made from": model.source,
        "parameters": f"{model.n_parameters:,}",
        "layers, heads, width": f"{config.n_layers}, {config.n_heads}, {config.emb_dim}",
        "context": f"{config.context_length:,} tokens",
        "tokenizer": f"{model.tokenizer.name}, {config.vocab_size:,} tokens",
        "weights": dtype,
    }
    start = model.settings.get("start")
    if start:
        rows["fine-tuned from"] = start["source"]
    if model.path is not None:
        rows |= _facts_of_run(model.path, model.step)
    if start and start["bits_per_byte"] is not None:
        part = "" if start["measured_share"] == 1 else ", of a part of the text"
        rows["bits a byte before training"] = f"{start['bits_per_byte']:.4f}{part}"
    kind = "It holds conversations by its chat template."
    if model.chat_template is None:
        kind = "It is a base model: it continues text, and is no assistant."
    table = [f"| {name} | {_in_a_cell(value)} |" for name, value in rows.items()]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {_in_a_cell(model.name)}", "", kind, "", "| | |", "|---|---|", *table, ""]
    return "\n".join([*lines, LICENCE, ""])


def _facts_of_run(run: Path, step: int | None) -> dict[str, str]:
    """What a run's files say of its text, its training and the weights of a step.

    Files that are missing say nothing.
    """
    data, summary = (_read(run / name) for name in (DATA, SUMMARY))
    rows = {}
    if files := data.get("files"):
        names = ", ".join(file["name"] for file in files[:MOST_NAMED])
        more = f" and {len(files) - MOST_NAMED} more" if len(files) > MOST_NAMED else ""
        rows["text"] = f"{names}{more}: {data['tokens']:,} tokens"
        if data["bytes"]:  # a dataset from the Hub has no files to count
            rows["text"] += f", {data['bytes']:,} bytes"
    if not summary:
        return rows
    rows["training"] = (
        f"{summary['steps']:,} steps, {summary['tokens_seen']:,} tokens, "
        f"{as_duration(summary['elapsed_s'])} on {summary['device']}"
    )
    if summary["weights_of_step"] == step:
        rows |= {
            "loss on the validation text": f"{summary['final_val_loss']:.4f} a token",
            "perplexity": f"{summary['final_val_perplexity']:,.2f}",
            "bits a byte": f"{summary['final_val_bits_per_byte']:.4f}",
        }
    elif summary["best_step"] == step:
        loss = f"{summary['best_val_loss']:.4f} a token, in training's evaluations"
        rows["loss on the validation text"] = loss
    return rows


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

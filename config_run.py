"""The settings of a run. Change what you like, save, and start:  python main.py"""

# ---------------------------------------------------------------- what to train on
# Your text: a file (.txt .md .html .epub .docx .pdf .jsonl .json .csv .tsv .parquet, plain or .gz
# .zst), a folder, a pattern like "books/*.txt", an address, "hf:dataset:configuration", a list of
# these, or a name: "the-verdict", "tiny-shakespeare", "sample-en", "sample-zh", "wikitext-2",
# "dummy". More can be said with {"path": ..., "val": ..., "field": "text", "encoding": "gb18030",
# "separator": "line", "bad_rows": "skip"}. Rows with questions and answers train a model to answer.
DATA = "the-verdict"
# The minutes that training may take: 0.25 to 10,000. Model, tokenizer and all other numbers are
# then chosen for your text and this machine, and shown before training. None: the modes below.
MINUTES = None
# Begin from weights that are trained already: a run's folder ("runs/..."), a folder of Hugging Face
# files, a .gguf file, "hf:owner/name", "smollm2-135m" (docs/fine-tuning.md says what to install).
# Model and tokenizer are theirs. "auto": the recipe of MINUTES chooses. None: random weights.
INIT_FROM = None
DRY_RUN = False  # True: show what would be trained and how long it would take, and end before it

# ---------------------------------------------------------------- which kind of run
QUICK_MODE = True  # True: the whole chain in seconds, with a small model;  False: full training
# True: your numbers below, in custom_params; wins over QUICK_MODE. With MINUTES your numbers stay,
# and the others are chosen around them.
CUSTOM_MODE = False

# ---------------------------------------------------------------- which model, which tokenizer
# "auto": MINUTES chooses, or without it the mode;  or a name from config.json: "small", "mini",
# "gpt2-124m", "llama-mini", "llama-124m"
MODEL = "auto"
USE_SMALL = True  # custom mode with MODEL "auto": the small model
USE_DEFAULT = False  # custom mode with MODEL "auto" and USE_SMALL False: the 124M model
# How text becomes tokens: "gpt2" (50,257 tokens, for English), "char" (one a character),
# "bpe:4096" (4,096 tokens learnt from your text), a tokenizer.json's path, or "auto": by the text.
TOKENIZER = None  # None: MINUTES chooses;  without MINUTES "gpt2"

# ---------------------------------------------------------------- your numbers (custom mode)
# Leave any of them out. None means: chosen by MINUTES, or without it worked out from the model and
# the text, or the value that the comment names.
custom_params = {
    "num_epochs": 3,  # how often to read through the text: 1 or more
    "max_steps": None,  # end after this many optimizer steps, whatever num_epochs says
    "time_budget_minutes": None,  # a run of this length, in place of num_epochs
    "batch_size": None,  # windows at a time: 1 or more;  None: 8
    "gradient_accumulation_steps": None,  # batches whose gradients a step sums up;  None: 1
    # "adamw", or "muon": learns more in a step, which takes longer;  None: "adamw"
    "optimizer": None,
    "learning_rate": None,  # peak step size, 0.0001 to 0.01 as a rule; wide models want less
    "embedding_rate": None,  # the peak for embeddings, head and norms;  None: learning_rate
    # the rate after warm-up: "cosine", "wsd" (stays, then falls), "constant";  None: "cosine"
    "schedule": None,
    "warmup_steps": None,  # steps in which the rate rises to its peak: 0 or more
    "decay_share": None,  # share of the run in which "wsd" falls: above 0 to 1;  None: 0.2
    "final_rate": None,  # share of the peak where "cosine" and "wsd" end: 0 to 1;  None: 0.1
    "beta2": None,  # memory of AdamW for squared gradients: above 0, below 1;  None: 0.95
    "weight_decay": None,  # pull of the matrices towards zero: 0 to 10;  None: 0.1
    "decay_embeddings": None,  # True: pull the embeddings towards zero too;  None: False
    "max_grad_norm": 1.0,  # longer gradients are cut to this length; 0 never cuts
    "max_length": None,  # tokens the model sees at once: 1 or more; None: as config.json says
    "stride": None,  # tokens from one window's start to the next; None: max_length, no overlap
    # "windows": each in turn, shuffled;  "random": cut anywhere, each step;  None: "windows"
    "sampling": None,
    "shift_windows": None,  # True: "windows" begin at another token each epoch;  None: False
    "train_ratio": 0.9,  # share of the text to train on, the rest validates: between 0 and 1
    "eval_freq": None,  # evaluate every so many steps: 1 or more
    # batches in an evaluation: 1 or more;  None: the whole validation text, or what 5 % of the run
    # is enough for
    "eval_iter": None,
    "final_iter": None,  # batches in the evaluation after training;  None: the whole text
    # end after so many evaluations in a row without a better one;  None: never, with INIT_FROM 3
    "patience": None,
    "save_every": None,  # steps from one checkpoint to the next;  None: by time
    "save_minutes": 5.0,  # minutes from one checkpoint to the next: above 0
    "keep_checkpoints": 2,  # how many of the last ones are kept: 2 or more; the best comes on top
    "start_context": "Every effort moves you",  # what samples go on from;  or ["春江", "往事"]
    "num_workers": 0,  # processes that prepare batches: 0 is right for all but huge texts
    "activation_checkpointing": False,  # True: less memory a step, a third more time
    # with INIT_FROM: the rank of an adapter (LoRA), which takes less memory: 8 to 32 as a rule
    "lora_rank": None,
    "model_overrides": {},  # e.g. {"n_layers": 4, "n_heads": 4, "emb_dim": 256, "drop_rate": 0.1}
}

# ---------------------------------------------------------------- text after training
sampling_params = {
    "max_new_tokens": None,  # tokens in each sample;  None: as many as make some 300 characters
    "temperature": 0.8,  # 0: always the likeliest token; higher: bolder
    "top_k": 50,  # the top-k sample draws from the k likeliest tokens;  None: from all
    "top_p": 0.9,  # the top-p sample draws from the likeliest that sum to p: 0 to 1;  None: all
    "min_p": 0.0,  # leave out tokens less likely than this share of the likeliest: 0 to 1
    "repetition_penalty": 1.0,  # above 1: what was just written becomes less likely
    "repetition_window": 64,  # for how many of the last tokens that holds
}

# ---------------------------------------------------------------- the machine
DEVICE = None  # None: the best there is;  or "cpu", "cuda", "mps", "xpu"
PRECISION = "auto"  # "auto": bf16 where the hardware has it;  or "bf16", "fp32", "fp16" (old GPUs)
COMPILE = "auto"  # "auto": where the run is long enough to repay the wait;  or True, False
PARALLEL = "auto"  # under torchrun: "ddp" (auto), or "fsdp" for models too large for one GPU
SEED = 123  # the same seed gives the same run
NIGHT_MODE = False  # True: leave half of the cores, or of the GPU's memory, to others
LOG_EVERY = 0  # print the batch loss every so many steps;  0: never

# ---------------------------------------------------------------- what is left behind
OUTPUT_DIR = "runs"  # each run makes a folder in here
RUN_NAME = None  # that folder's name;  None: date, time and mode
# "auto": go on with the newest unfinished run that has these settings and this text;
# False: always begin a new one;  or the folder of the run to go on with, "runs/..."
RESUME = "auto"
TRACKING = []  # curves elsewhere too: "tensorboard", "wandb" (offline without an account)

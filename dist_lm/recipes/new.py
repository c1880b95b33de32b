"""A recipe of one's own from five answers.

Enters: task, data, tokenizer, run folder, steps.  Leaves: YAML text that `config check` accepts.
Promises: figures come from the shipped recipe of the task, the answers replace its places.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_lm.errors import ConfigError

TASKS = {
    "mlm": ("mask_unit: word", "pairs", "bert"),
    "causal_lm": ("documents: isolated", "tokens", "gpt2"),
    "span_corruption": ("objective: span", "tokens", "t5"),
    "classification": ("", "classification", "bert"),
    "token_classification": ("", "token_classification", "bert"),
    "question_answering": ("", "question_answering", "bert"),
    "seq2seq": ("label_smoothing: 0.1", "seq2seq", "t5"),
    "instruction": ("", "instruction", "gpt2"),
}
"""Task: its options, the kind of data it reads, the family of a new model."""
_SHOWN_TIMES = 10
"""How often a run of any length logs, evaluates and saves."""


@dataclass(frozen=True)
class Answers:
    """What only the user knows."""

    task: str
    data: str
    """Folder of `data prepare`, with train/ and heldout/."""
    tokenizer: str
    run_dir: str
    steps: int
    start_from: str = ""
    """Hugging Face folder or run to start from; empty: a new model."""


def new_recipe(answers: Answers) -> str:
    """YAML text.  Raises ConfigError where the task is unknown."""
    if answers.task not in TASKS:
        raise ConfigError(f"there is no task `{answers.task}`", do=f"There are {', '.join(TASKS)}.")
    if answers.steps < 1:
        raise ConfigError(f"{answers.steps} steps are no run", do="Write 1 or more.")
    options, kind, family = TASKS[answers.task]
    every = max(1, answers.steps // _SHOWN_TIMES)
    seq_len = "\n  seq_len: 128" if kind == "tokens" else ""
    model = f"{{from: {_text(answers.start_from)}}}" if answers.start_from else f"{{family: {family}, size: mini}}"
    rate = "5.0e-5" if answers.start_from else "1.0e-3"
    return f"""\
# Data: dist-lm data prepare INPUT --kind {kind} --tokenizer {answers.tokenizer} --out {answers.data} --heldout 0.05
# dist-lm doctor -c THIS, dist-lm plan -c THIS, dist-lm train -c THIS --cpu 2 (without --cpu: all GPUs)
task: {{name: {answers.task}{", " + options if options else ""}}}
model: {model}
data:
  train: {_text(answers.data + "/train")}
  heldout: {_text(answers.data + "/heldout")}
  tokenizer: {_text(answers.tokenizer)}{seq_len}
batch: {{global: 32, micro: 16}}
optim:
  lr: {rate}
  clip: 1.0
  schedule: {{kind: linear, warmup_steps: {answers.steps // 10}}}
run:
  dir: {_text(answers.run_dir)}
  steps: {answers.steps}
  log_every: {max(1, every // 10)}
  eval_every: {every}
  save_every: {every}
  keep: 2
precision: fp32
zero: 2
"""


def _text(value: str) -> str:
    """A YAML string, quoted: an answer may hold anything."""
    import json

    return json.dumps(value)

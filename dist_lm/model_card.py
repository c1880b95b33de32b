"""The model card of an export: what the model is, how it was made, how good it is.

Enters: a run folder and one of its checkpoints.  Leaves: README.md, with the metadata that model
hubs read.  Promises: figures are those of the checkpoint's own step, and data sets are named by
fingerprint; no path of the machine is told.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedModel

import dist_lm
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir

_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "text2text-generation",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
_LOADED_BY_PIPELINE = {"text-classification", "token-classification", "fill-mask", "text-generation"}
_NOT_FIGURES = {"kind", "step", "time", "tables"}


def model_card(run_dir: RunDir, checkpoint: Checkpoint, model: PreTrainedModel) -> str:
    """Markdown with a YAML head."""
    identity = json.loads(run_dir.identity.read_text())
    progress = checkpoint.progress
    name = type(model).__name__
    pipeline = next((value for ending, value in _PIPELINES.items() if name.endswith(ending)), "")
    return f"""---
library_name: transformers
tags: [dist_lm]
{f"pipeline_tag: {pipeline}" if pipeline else ""}
---
# {name}

Trained with dist_lm {dist_lm.__version__} for {progress.step:,} steps on {progress.tokens:,} tokens
({progress.world_size} ranks, ZeRO-{progress.zero_stage}, {progress.precision}),
{sum(parameter.numel() for parameter in model.parameters()):,} parameters.

## Figures

{_figures(run_dir, progress.step)}

## Use

```
{_usage(pipeline, name)}
```

## How it was made

| setting | value |
|---|---|
{_settings(identity)}

`data.train` and `data.heldout` are fingerprints of the prepared data sets.
"""


def _figures(run_dir: RunDir, step: int) -> str:
    """The evaluation of this step, or the last one before it."""
    evaluations = [record for record in read_metrics(run_dir.metrics, "eval") if record["step"] <= step]
    if not evaluations:
        return "The run has evaluated nothing up to this step."
    last = evaluations[-1]
    rows = [f"| {name} | {value:.4f} |" for name, value in last.items() if name not in _NOT_FIGURES]
    return "\n".join([f"On held-out data at step {last['step']:,}:", "", "| figure | value |", "|---|---|", *rows])


def _settings(identity: dict[str, Any]) -> str:
    return "\n".join(f"| {key} | `{json.dumps(value)}` |" for key, value in sorted(identity.items()))


def _usage(pipeline: str, name: str) -> str:
    if pipeline in _LOADED_BY_PIPELINE:
        return f'from transformers import pipeline\npipeline("{pipeline}", model="FOLDER")'
    return f'from transformers import AutoTokenizer, {name}\nmodel = {name}.from_pretrained("FOLDER")'

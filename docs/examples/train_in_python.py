"""From texts to a trained model in Python, without the command line.

    python docs/examples/train_in_python.py FOLDER

The text is Python's own reference, which every Python has.  Run it again: what is there is not made
again, and the run goes on where it was.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import dist_lm
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import train_tokenizer
from dist_lm.metrics import read_metrics

RECIPE = """
task: {{name: causal_lm}}
model:
  family: gpt2
  size: tiny
  overrides: {{n_embd: 32, n_layer: 2, n_head: 2}}
data: {{train: {folder}/data/train, heldout: {folder}/data/heldout, tokenizer: {folder}/tokenizer, seq_len: 64}}
batch: {{global: 16, micro: 16}}
optim: {{lr: 2e-3, schedule: {{kind: cosine, warmup_steps: 2}}}}
run: {{dir: {folder}/run, steps: 8, log_every: 1, save_every: 4}}
"""


def prepare_data(folder: Path) -> None:
    """tokenizer/, data/train and data/heldout in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [topics[name] for name in sorted(topics)][:40]
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not (folder / "tokenizer").exists():
        train_tokenizer(texts, vocab_size=600, kind="bpe", out=folder / "tokenizer")
    prepare(
        PrepareOptions(
            inputs=[str(source)],
            out=folder / "data",
            tokenizer=folder / "tokenizer",
            kind="tokens",
            seq_len=64,
            heldout_fraction=0.1,
            workers=1,
        )
    )


def main(folder: Path) -> None:
    prepare_data(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    # The same keys as behind `dist-lm train`; two ranks on the CPU would be cpu=2.
    status = dist_lm.run_training(recipe, ["run.seed=1"], cpu=1)
    losses = [record["loss"] for record in read_metrics(folder / "run" / "metrics.jsonl", "train")]
    print(f"{status.state} at step {status.step}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


# The ranks are processes that import this file: without this line each of them would start the run anew.
if __name__ == "__main__":
    main(Path(sys.argv[1]))

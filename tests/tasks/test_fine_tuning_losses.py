"""Losses of the fine-tuning tasks beside those that transformers' own models compute of the same rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.trainer_pt_utils import LabelSmoother

from dist_lm.config import (
    ClassificationTask,
    InstructionTask,
    ModelSection,
    Seq2SeqTask,
    TokenClassificationTask,
)
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.errors import ConfigError, DataError
from dist_lm.tasks.base import PREDICTED, MicroBatch
from dist_lm.tasks.classification import Classification
from dist_lm.tasks.instruction import InstructionTuning
from dist_lm.tasks.question_answering import QuestionAnswering
from dist_lm.tasks.seq2seq import Seq2Seq
from dist_lm.tasks.token_classification import TokenClassification
from tests.tasks.prepared_rows import view_and_rows

pytestmark = pytest.mark.fast
TINY = ModelSection(size="tiny", overrides={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64})
TEXTS = ["the import statement", "a class is defined by a name and a block of statements", "pass", "lambda forms"]
WORDS = [text.split() for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer(topics_data: Path) -> Tokenizer:
    return load_tokenizer(topics_data / "tokenizer")


def inputs_of(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return {name: batch.inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}


def classification(tokenizer: Tokenizer, truths: list[Any], settings: dict[str, Any], **options: Any) -> Any:
    records = [
        {"text": text, "label": label, **({"text_pair": "of a second text"} if options.get("text_pair") else {})}
        for text, label in zip(TEXTS, truths, strict=True)
    ]
    view, rows = view_and_rows("classification", records, tokenizer, seq_len=64, **options)
    task = Classification(ClassificationTask(name="classification", **settings), tokenizer, view, seed=3)
    return task, rows, task.build_model(TINY).eval()


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (["x", "y", "z", "x"], {}),
        (["x", "y", "z", "x"], {"text_pair": True}),
        ([["x", "y"], [], ["z"], ["x"]], {"labels": "many"}),
        ([1.5, -2.0, 0.25, 3.0], {"labels": "number"}),
    ],
    ids=["one", "pairs", "many", "number"],
)
def test_classification_has_the_loss_of_transformers(
    tokenizer: Tokenizer, labels: list[Any], options: dict[str, Any]
) -> None:
    task, rows, model = classification(tokenizer, labels, {}, **options)
    batch = task.collate(rows)
    sums = task.loss_sums(model, batch.inputs)
    theirs = model(**inputs_of(batch), labels=batch.inputs["labels"]).loss
    assert sums["label_loss"].item() / batch.targets["label"] == pytest.approx(theirs.item(), rel=1e-6)
    assert PREDICTED in sums
    assert (1 in batch.inputs["token_type_ids"]) == bool(options.get("text_pair"))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pair", [False, True])
def test_rows_are_those_of_run_glue(tokenizer: Tokenizer, tmp_path: Path, kind: str, pair: bool) -> None:
    folder = tokenizer.path
    if kind == "roberta":
        # What RoBERTa puts between two texts, on the same words.
        shutil.copytree(folder, tmp_path / "roberta")
        folder = tmp_path / "roberta"
        spec = json.loads((folder / "tokenizer.json").read_text())
        ends = {"sep": ["[SEP]", tokenizer.sep_id], "cls": ["[CLS]", tokenizer.cls_id]}
        spec["post_processor"] = {"type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": False}
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_tokenizer(folder)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    texts = [*TEXTS, "assert " * 40]
    seconds = ["of a second text"] * len(texts) if pair else None
    records = [{"text": text, "label": str(n % 2), "text_pair": "of a second text"} for n, text in enumerate(texts)]
    view, rows = view_and_rows("classification", records, ours, seq_len=32, text_pair=pair)
    batch = Classification(ClassificationTask(name="classification"), ours, view, seed=3).collate(rows)
    theirs = fast(texts, seconds, truncation=True, max_length=32)
    lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
    assert [row[:n] for row, n in zip(batch.inputs["input_ids"].tolist(), lengths, strict=True)] == theirs["input_ids"]


def test_class_weights_and_smoothing_are_those_of_torch(tokenizer: Tokenizer) -> None:
    settings = {"class_weights": {"y": 3.0}, "label_smoothing": 0.1}
    task, rows, model = classification(tokenizer, ["x", "y", "z", "x"], settings)
    batch = task.collate(rows)
    logits = model(**inputs_of(batch)).logits
    loss = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 1.0]), reduction="sum", label_smoothing=0.1)
    expected = loss(logits, batch.inputs["labels"]).item()
    assert task.loss_sums(model, batch.inputs)["label_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_settings_without_effect_and_labels_that_are_none_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="`w` is no label"):
        classification(tokenizer, ["x", "y", "z", "x"], {"class_weights": {"w": 2.0}})
    with pytest.raises(ConfigError, match="have no effect"):
        classification(tokenizer, [1.0, 2.0, 3.0, 4.0], {"label_smoothing": 0.1}, labels="number")
    with pytest.raises(DataError, match="at least two labels"):
        classification(tokenizer, ["x"] * 4, {})
    with pytest.raises(DataError, match="without labels"):
        classification(tokenizer, ["x"] * 4, {}, labels="none")


def test_fillers_are_no_targets_and_change_no_loss(tokenizer: Tokenizer) -> None:
    task, rows, model = classification(tokenizer, ["x", "y", "z", "x"], {})
    plain = task.loss_sums(model, task.collate(rows).inputs)["label_loss"].item()
    batch = task.collate(rows.padded(7))
    assert batch.targets == {"label": 4}
    assert task.loss_sums(model, batch.inputs)["label_loss"].item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("label_tokens", ["first", "all"])
def test_tagging_has_the_loss_of_transformers(tokenizer: Tokenizer, label_tokens: str) -> None:
    tags = [["B-X" if number % 3 == 0 else "O" for number in range(len(words))] for words in WORDS]
    records = [{"tokens": words, "tags": names} for words, names in zip(WORDS, tags, strict=True)]
    view, rows = view_and_rows("token_classification", records, tokenizer, seq_len=64)
    settings = TokenClassificationTask(name="token_classification", label_tokens=label_tokens)
    task = TokenClassification(settings, tokenizer, view, seed=3)
    model = task.build_model(TINY).eval()
    batch = task.collate(rows.padded(6))
    labels = torch.full(batch.inputs["input_ids"].shape, -100)
    labels.view(-1)[batch.inputs["judged"]] = batch.inputs["labels"]
    theirs = model(**inputs_of(batch), labels=labels).loss
    sums = task.loss_sums(model, batch.inputs)
    assert sums["tag_loss"].item() / batch.targets["tag"] == pytest.approx(theirs.item(), rel=1e-6)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(TEXTS))
    assert batch.targets["tag"] == (sum(map(len, WORDS)) if label_tokens == "first" else tokens)
    # The first token of a word decides, whichever tokens are targets.
    state = task.metrics_state()
    task.judge(state, batch.inputs["labels"], batch)
    assert state.counts()[-1] == sum(map(len, WORDS))
    assert state.compute([state.counts()])["entity_f1"] == 1.0


def test_a_tagger_of_one_tag_is_refused(tokenizer: Tokenizer) -> None:
    records = [{"tokens": words, "tags": ["O"] * len(words)} for words in WORDS]
    view, _ = view_and_rows("token_classification", records, tokenizer, seq_len=64)
    with pytest.raises(DataError, match="a tagger needs at least two tags, the data set has 1"):
        TokenClassification(TokenClassificationTask(name="token_classification"), tokenizer, view, seed=3)


def test_question_answering_has_the_loss_of_transformers(tokenizer: Tokenizer) -> None:
    context = " ".join(TEXTS)
    records = [
        {
            "question": f"which {name}?",
            "context": context,
            "answers": {"text": [name], "answer_start": [context.index(name)]},
        }
        for name in ("import", "statements", "lambda")
    ]
    view, rows = view_and_rows("question_answering", records, tokenizer, seq_len=32, doc_stride=8)
    task = QuestionAnswering(tokenizer, view, seed=3)
    model = task.build_model(TINY).eval()
    batch = task.collate(rows)
    # Row by row: of padded rows transformers' loss would give padding a share.
    theirs = 0.0
    for row, length in enumerate(batch.inputs["attention_mask"].sum(dim=1).tolist()):
        one = {name: value[row : row + 1, :length] for name, value in inputs_of(batch).items()}
        start, end = (batch.inputs[name][row : row + 1] for name in ("start", "end"))
        theirs += model(**one, start_positions=start, end_positions=end).loss.item()
    sums = task.loss_sums(model, batch.inputs)
    assert sums["span_loss"].item() == pytest.approx(theirs, rel=1e-6)
    assert batch.inputs["start"].any()
    filled = task.collate(rows.padded(len(rows) + 3))
    assert filled.targets == batch.targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_seq2seq_has_the_loss_of_transformers_and_its_trainer(
    tokenizer: Tokenizer, tmp_path: Path, smoothing: float
) -> None:
    config = T5Config(
        vocab_size=tokenizer.vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        dropout_rate=0.0, pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.sep_id,
        decoder_start_token_id=tokenizer.pad_id,
    )  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    records = [{"source": text, "target": text[::-1]} for text in TEXTS]
    view, rows = view_and_rows("seq2seq", records, tokenizer, seq_len=32, prefix="turn: ", target_len=24)
    task = Seq2Seq(Seq2SeqTask(name="seq2seq", label_smoothing=smoothing), tokenizer, view, seed=3)
    model = task.build_model(ModelSection(weights=tmp_path / "t5")).eval()
    batch = task.collate(rows)
    labels = torch.full(batch.inputs["target_ids"].shape, -100)
    labels.view(-1)[batch.inputs["judged"]] = batch.inputs["target_ids"].view(-1)[batch.inputs["judged"]]
    output = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], labels=labels)
    theirs = LabelSmoother(epsilon=smoothing)(output, labels) if smoothing else output.loss
    sums = task.loss_sums(model, batch.inputs)
    assert sums["target_loss"].item() / batch.targets["target"] == pytest.approx(theirs.item(), rel=1e-6)
    assert model.config.dist_lm["prefix"] == "turn: "


def _causal(family: str, tokenizer: Tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=128)
        )
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, intermediate_size=64, max_position_embeddings=128)
    )  # fmt: skip


@pytest.mark.parametrize(("family", "chunk"), [("gpt2", 1024), ("llama", 1024), ("llama", 7)])
def test_packed_dialogues_have_the_loss_of_each_alone(tokenizer: Tokenizer, family: str, chunk: int) -> None:
    records = [{"prompt": text, "response": text[::-1]} for text in TEXTS]
    view, rows = view_and_rows("instruction", records, tokenizer, seq_len=128)
    task = InstructionTuning(InstructionTask(name="instruction", head_chunk=chunk), tokenizer, view, seed=3)
    model = _causal(family, tokenizer).eval()
    task.prepare_for(model)
    assert len(rows) < len(TEXTS)
    packed = task.collate(rows)
    assert packed.targets["answer"] > 2 * 7
    widest = _widest_logits(model)
    loss = task.loss_sums(model, packed.inputs)["answer_loss"]
    assert widest() == min(chunk, packed.targets["answer"])
    loss.backward()
    ours, gradients = loss.item(), [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    theirs, targets = 0.0, 0
    for record in records:
        _, alone = view_and_rows("instruction", [record], tokenizer, seq_len=128)
        length = int(alone.columns["length"][0])
        ids = torch.from_numpy(alone.columns["tokens"][:, :length].astype(np.int64))
        labels = torch.where(torch.from_numpy(alone.columns["answer"][:, :length] > 0), ids, -100)
        count = int((labels[:, 1:] != -100).sum())
        loss = model(input_ids=ids, labels=labels).loss * count
        loss.backward()
        theirs += loss.item()
        targets += count
    assert packed.targets["answer"] == targets
    assert ours == pytest.approx(theirs, rel=1e-6)
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        assert (mine - parameter.grad).norm() <= 1e-6 * parameter.grad.norm() + 1e-7


def _widest_logits(model: Any) -> Callable[[], int]:
    """Asks how many targets the head has seen at one time."""
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))
    return lambda: max(seen)

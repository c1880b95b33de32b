"""Instructions and answers, several dialogues a row: a causal model learns the answers only.

Enters: records of `prompt` and `response`, or of `messages`.  Leaves: rows of token numbers, with
the flag whether each is part of an answer, and the number of the dialogue that it belongs to.
Promises: `pack` makes one row of each dialogue; `join` fills the rows of a shard by one rule: the
longest dialogue first, each into the fullest row that has room for it.  So the rows of a shard are a
pure function of its dialogues and their order.  No dialogue is parted; one that is longer than a row
loses its end, and is counted.

Columns: tokens, answer and segment [capacity], length.  Segments are numbered from 1 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Kind, PackedRows, PackingRules, Unusable
from dist_lm.data.kinds.chat import ASSISTANT, ChatTemplate, Message, clean_messages, encode_chat, load_template
from dist_lm.data.manifest import Column
from dist_lm.data.packing import best_fit
from dist_lm.data.ragged import padded
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError


class Instruction(Kind):
    name = "instruction"
    fields: ClassVar[Mapping[str, str]] = {}
    optional_fields = {
        "prompt": "what is asked",
        "response": "the answer to `prompt`",
        "messages": "a dialogue instead: a list of {role, content}",
    }
    token_columns = ("tokens",)

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        messages = clean_dialogue(fields)
        if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
            raise Unusable(f"no message of the role {ASSISTANT}: nothing to learn")
        return {"messages": messages}

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        return (
            Column("tokens", rules.token_dtype, (rules.seq_len,), lengths="length"),
            Column("answer", "uint8", (rules.seq_len,), lengths="length"),
            Column("segment", "uint16", (rules.seq_len,), lengths="length"),
            Column("length", "uint16"),
        )

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        template = load_template(tokenizer.path)
        lost = np.zeros((len(records), 4), dtype=np.int64)
        dialogues: dict[int, tuple[list[int], list[int]]] = {}
        for number, record in enumerate(records):
            ids: list[int] = []
            answer: list[int] = []
            for piece, is_answer in _encoded(record["messages"], template, tokenizer):
                ids += piece
                answer += [int(is_answer)] * len(piece)
            lost[number, 2:] = (len(ids) > rules.seq_len, max(len(ids) - rules.seq_len, 0))
            if any(answer[: rules.seq_len]):
                dialogues[number] = ids[: rules.seq_len], answer[: rules.seq_len]
            else:
                lost[number] = (1, len(ids), 0, 0)
        rows = list(dialogues.values())
        tokens, length = padded([ids for ids, _ in rows], rules.seq_len, tokenizer.pad_id, rules.token_dtype)
        answers, _ = padded([answer for _, answer in rows], rules.seq_len, 0, "uint8")
        segments = (np.arange(rules.seq_len) < length[:, None]).astype(np.uint16)
        columns = {"tokens": tokens, "answer": answers, "segment": segments, "length": length}
        ordinal = np.zeros(len(rows), dtype=np.int64)
        return PackedRows(np.array(list(dialogues), dtype=np.int64), ordinal, columns, lost)

    def join(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        length = columns["length"].astype(np.int64)
        capacity = columns["tokens"].shape[1]
        plan = best_fit(dict(enumerate(length.tolist())), capacity)
        joined = {name: np.zeros((len(plan), *array.shape[1:]), array.dtype) for name, array in columns.items()}
        for row, members in enumerate(plan):
            end = 0
            for segment, member in enumerate(members, start=1):
                begin, end = end, end + length[member]
                for name in ("tokens", "answer"):
                    joined[name][row, begin:end] = columns[name][member, : length[member]]
                joined["segment"][row, begin:end] = segment
            joined["length"][row] = end
        return joined

    def facts(self, tokenizer: Tokenizer, rules: PackingRules) -> dict[str, Any]:
        template = load_template(tokenizer.path)
        return {"chat_template": template.text, "chat_tokens": template.tokens}


def _encoded(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    try:
        return encode_chat(messages, template, tokenizer)
    except Unusable as error:
        raise DataError(
            "the chat template of the tokenizer does not fit the dialogues",
            where=str(tokenizer.path),
            why=f"{error}; the dialogue begins with `{messages[0]['content'][:40]}`.",
            do="Correct the dialogues, or the tokenizer's chat_template.",
        ) from error


def clean_dialogue(fields: Fields) -> list[dict[str, str]]:
    """Messages of a record, whichever way it holds them.  Raises Unusable."""
    if fields.get("messages") is not None:
        return clean_messages(fields["messages"])
    if fields.get("prompt") is None:
        raise Unusable("neither `messages` nor `prompt` and `response`")
    messages = [{"role": "user", "content": checked.text(fields, "prompt")}]
    if fields.get("response") is not None:
        messages.append({"role": ASSISTANT, "content": checked.text(fields, "response")})
    return messages

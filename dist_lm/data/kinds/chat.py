"""Messages as text, by the chat template that a model was or will be trained with.

Enters: messages of {role, content}, and the folder of a tokenizer.  Leaves: Pieces of token numbers,
each with the flag whether it is an answer.
Promises: the text is what transformers' apply_chat_template makes; contents are never read as special
tokens, the template's own words are; needs jinja2, but neither transformers nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist_lm.data.kinds.base import Unusable
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.vocabulary import CONFIG_FILE, TEMPLATE_FILE
from dist_lm.errors import DataError

ASSISTANT = "assistant"
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\\n' }}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n### assistant\\n' }}{% endif %}"
)
"""Used where the tokenizer has none."""

Message = dict[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may write."""

    text: str
    tokens: dict[str, str]
    """Such as eos_token, by role."""

    def render(self, messages: Sequence[Message], *, for_answer: bool = False) -> str:
        """The messages as one text; `for_answer` adds what comes before an answer.  Raises Unusable."""
        try:
            rendered = _compiled(self.text).render(
                messages=list(messages), add_generation_prompt=for_answer, **self.tokens
            )
        except jinja2.TemplateError as error:
            raise Unusable(f"the chat template refuses the messages: {error}") from None
        return str(rendered)


def load_template(folder: Path) -> ChatTemplate:
    """The chat template of a tokenizer folder, or the default one."""
    config: dict[str, Any] = {}
    path = folder / CONFIG_FILE
    if path.is_file():
        config = json.loads(path.read_text("utf-8"))
    tokens = {}
    for role in ("bos_token", "eos_token", "sep_token", "pad_token", "unk_token"):
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if content:
            tokens[role] = str(content)
    # A tokenizer of an encoder has no eos; its separator ends a text as well.
    tokens.setdefault("eos_token", tokens.get("sep_token", ""))
    own = folder / TEMPLATE_FILE
    text = own.read_text("utf-8") if own.is_file() else config.get("chat_template")
    if text is not None and not isinstance(text, str):
        raise DataError(
            "the tokenizer has several chat templates",
            where=str(path),
            do="Keep one: a text under `chat_template`, or the file chat_template.jinja.",
        )
    return ChatTemplate(text or DEFAULT_TEMPLATE, tokens)


@lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    # The settings of transformers' chat templates.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment.from_string(text)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def clean_messages(messages: Any) -> list[Message]:
    """Messages of {role, content}.  Raises Unusable."""
    if not isinstance(messages, list) or not messages:
        raise Unusable("`messages` is not a list of {role, content}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise Unusable(f"message {number} has no text in `role` and `content`")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def encode_chat(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer
) -> list[tuple[list[int], bool]]:
    """Token numbers of the whole dialogue in pieces, each with the flag whether it is an answer.

    An answer is what follows the words that ask for it, with the token that ends it.
    """
    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked = template.render(messages[:number], for_answer=True)
        answered = template.render(messages[: number + 1])
        if not asked.startswith(done) or not answered.startswith(asked):
            raise Unusable("the chat template writes an answer otherwise than it asks for one")
        contents = [other["content"] for other in messages[:number]]
        pieces.append((encode_template(asked[len(done) :], contents, tokenizer), False))
        pieces.append((encode_template(answered[len(asked) :], [message["content"]], tokenizer), True))
        done = answered
    return [(ids, answer) for ids, answer in pieces if ids]


def encode_prompt(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Token numbers up to the place where the answer begins, as training sees them."""
    pieces = encode_chat(messages, template, tokenizer)
    told = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    done = template.render(messages[: told[-1] + 1]) if told else ""
    asked = template.render(messages, for_answer=True)
    rest = encode_template(asked[len(done) :], [message["content"] for message in messages], tokenizer)
    return [*(number for ids, _ in pieces for number in ids), *rest]


def encode_template(text: str, contents: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Token numbers of a rendered text; special tokens count where the template wrote them."""
    ids: list[int] = []
    for content in contents:
        before, found, after = text.partition(content.strip())
        if content.strip() and found:
            ids += tokenizer.encode_template(before)
            ids += tokenizer.encode_batch([found])[0]
            text = after
    return ids + tokenizer.encode_template(text)

"""Samples as a model reads them: conversations through its chat template, items as placeholders or as text."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.tasks.task import Task
from esmerge.errors import InputError
from esmerge.mllm import MllmProcessor
from esmerge.modalities import TextModality
from esmerge.modalities.modality import with_encoder
from esmerge.tokenizer import NO_TEMPLATE, apply_chat_template, without_added_end
from esmerge.yaml_files import nearest
from lightning_modules.samples import Item, Part, Sample

_BETWEEN_TURNS = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from.

    Attributes:
        text: with one placeholder for each item.
        items: by modality, in the order of their placeholders.
    """

    text: str
    items: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become prompts.

    Attributes:
        template: a Jinja chat template; None to join the turns by blank lines.
    """

    template: str | None

    @property
    def hash(self) -> str | None:
        """Of the template; None without one."""
        return None if self.template is None else content_digest(self.template)

    @classmethod
    def of(cls, processor: MllmProcessor, chosen: str | None) -> "ChatFormat":
        """The tokenizer's own template, or a `chosen` one: the path of a file, or `none`."""
        if chosen == NO_TEMPLATE:
            return cls(None)
        if chosen is None:
            return cls(processor.tokenizer.get_chat_template() if processor.tokenizer.chat_template else None)
        try:
            return cls(Path(chosen).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the chat template {chosen} cannot be read; give the file of a Jinja chat template, or none."
            ) from error


class PromptWriter:
    """Writes samples as prompts for one model.

    An item is a placeholder and a soft token sequence where the model has an encoder for its modality, else text.

    Args:
        processor: of the model.
        chat: how its conversations look.
        as_text: modalities whose items are text although the model has, or others have, an encoder for them.
    """

    def __init__(self, processor: MllmProcessor, chat: ChatFormat, as_text: Collection[str] = ()) -> None:
        self.processor = processor
        self.chat = chat
        self.as_text = set(as_text)
        self.known = {name: m for name, m in processor.modalities.items() if name not in self.as_text}
        self.encoded = set(with_encoder(self.known))

    def check_modalities(self, task: str, samples: Sequence[Sample]) -> None:
        """Raise `InputError` if a multimodal model lacks a modality of a task's items.

        A model without any encoder reads all items as text. One with encoders was trained on items in another form
        than text, so that text in place of an encoder is most likely a mistake.
        """
        needed = {p.modality for sample in samples for turn in sample.turns for p in turn.parts if isinstance(p, Item)}
        missing = sorted(needed - self.known.keys() - self.as_text)
        if missing and with_encoder(self.processor.modalities):
            raise InputError(
                f"the task {task} has items of {missing[0]}, for which the model has no encoder (it has: "
                f"{', '.join(self.processor.modalities)}): take another model, or let it read them as text "
                f"(--as-text {missing[0]}, or as_text in a recipe)."
            )

    def check_as_text(self, tasks: Sequence[Task], field: str) -> None:
        """Raise `InputError` for an entry of a recipe's or the command line's `field` that is no modality of anything.

        Only what the model has or a task's samples can have may be written as text.
        """
        known = sorted({*self.processor.modalities, *(name for task in tasks for name in task.modalities)})
        if unknown := sorted(self.as_text.difference(known)):
            raise InputError(
                f"{field}: {unknown[0]} is a modality of neither the model nor a task{nearest(unknown[0], known)} "
                f"(they have: {', '.join(known)})."
            )

    def write(self, sample: Sample, answer_prefix: str = "") -> Prompt:
        """The conversation of a sample up to where the answer begins, or goes on after `answer_prefix`."""
        items: dict[str, list[str]] = {}
        messages = [
            {"role": turn.role, "content": "".join(self._part(part, items) for part in turn.parts)}
            for turn in sample.turns
        ]
        if self.chat.template is None:
            text = _BETWEEN_TURNS.join(message["content"] for message in messages)
            # Behind a plain text, an answer of any kind begins with a blank.
            text += f" {answer_prefix.rstrip()}" if answer_prefix else ""
        else:
            text = self._apply_template(messages) + answer_prefix.rstrip()
        return Prompt(text, items)

    def answer(self, choice: str, answer_prefix: str = "") -> str:
        """How a choice goes on from a prompt: after a blank unless it begins the assistant's turn."""
        starts_turn = self.chat.template is not None and not answer_prefix
        blank = answer_prefix[len(answer_prefix.rstrip()) :] if answer_prefix else " "
        return choice if starts_turn else blank + choice

    def tokenize(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of prompts, with the beginning that the tokenizer adds unless a chat template has its own.

        An end that the tokenizer adds is left out: the answer is to follow.
        """
        tokenizer = self.processor.tokenizer
        texts = [prompt.text for prompt in prompts]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=self.chat.template is None)["input_ids"]
        return [without_added_end(own, text, tokenizer) for own, text in zip(ids, texts, strict=True)]

    def tokenize_answers(self, choices: Sequence[str], answer_prefix: str, prompt: str) -> list[list[int]]:
        """The token ids of choices as they go on from a prompt's text, which tells a tokenizer that no text begins."""

        def ids(text: str) -> list[int]:
            return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        before, found = ids(prompt), []
        for answer in (self.answer(choice, answer_prefix) for choice in choices):
            whole = ids(prompt + answer)
            # A tokenizer may also join the end of one and the beginning of the other.
            found.append(whole[len(before) :] if whole[: len(before)] == before else ids(answer))
        return found

    def _apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            return apply_chat_template(self.processor.tokenizer, messages, self.chat.template)
        except Exception as error:  # whatever a template raises: Jinja's errors and Python's
            if messages[0]["role"] == "system":
                # Some templates refuse a system turn; the model then reads it before the question, as is usual.
                first = {**messages[1], "content": messages[0]["content"] + _BETWEEN_TURNS + messages[1]["content"]}
                return self._apply_template([first, *messages[2:]])
            raise InputError(f"the chat template cannot be applied: {error}; give another one.") from error

    def _part(self, part: Part, items: dict[str, list[str]]) -> str:
        if isinstance(part, str):
            return self._without_placeholders(part)
        modality = self.known.get(part.modality)
        if modality is None:
            return self._without_placeholders(part.value)
        if isinstance(modality, TextModality):
            return self._without_placeholders(modality.render(part.value))
        items.setdefault(part.modality, []).append(part.value)
        return modality.placeholder

    def _without_placeholders(self, text: str) -> str:
        for name, modality in self.processor.modalities.items():
            if modality.placeholder in text:
                raise InputError(
                    f"a text of the task has {modality.placeholder} in it, which stands for an item of {name} in this "
                    "model's prompts: write it in another way."
                )
        return text


def check_choices(choices: Sequence[str], ids: Sequence[Sequence[int]], compare_sums: bool) -> None:
    """Raise `InputError` if likelihoods cannot tell two choices apart.

    Args:
        choices: as the task names them.
        ids: the tokens of each.
        compare_sums: whether the choices' likelihoods are compared as they are, without regard to their lengths.
    """
    for (first, a), (second, b) in combinations(zip(choices, ids, strict=True), 2):
        if a == b:
            raise InputError(
                f"the choices {first!r} and {second!r} are the same tokens to this model's tokenizer: reword one."
            )
        shorter, longer = (first, second) if len(a) < len(b) else (second, first)
        if compare_sums and a[: len(b)] == b[: len(a)]:
            raise InputError(
                f"the choice {longer!r} begins with all tokens of {shorter!r}, so it can never be likelier: reword "
                "one, or compare them with --normalise tokens."
            )
    for choice, tokens in zip(choices, ids, strict=True):
        if not tokens:
            raise InputError(f"the choice {choice!r} has no tokens: reword it.")


def content_digest(content: Any) -> str:
    """`sha256:<hex>` of text or of what can be written as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def hash_lines(lines: Sequence[Any], key: Callable[[Any], Any]) -> str:
    """The digest of a sequence, entry by entry."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(key(line), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"

"""From prompts with placeholders, and their items, to the inputs of a multimodal LLM."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from esmerge.errors import InputError
from esmerge.hub import SMALL_FILES
from esmerge.modalities import Features, Modality, TextModality, open_modality, save_modality
from esmerge.modalities.modality import add_placeholders, check_name, feature_name, with_encoder
from esmerge.modalities.registry import MODALITIES_FOLDER, SETTINGS_FILE

Items = Sequence[str] | Sequence[Sequence[str]]


class MllmProcessor(ProcessorMixin):
    """A tokenizer and the modalities of a multimodal LLM.

    A prompt has one placeholder for each item. For a modality with an encoder it becomes as many placeholder tokens as
    the item has soft tokens; for a text modality it becomes the item's text.

    Args:
        tokenizer: of the LLM; placeholders that it does not know yet are added to it.
        modalities: by name.
    """

    def __init__(self, tokenizer: Any = None, modalities: Mapping[str, Modality] | None = None, **kwargs: Any) -> None:
        self.modalities = dict(modalities or {})
        owners: dict[str, str] = {}
        for name, modality in self.modalities.items():
            check_name(name, "the modalities of a processor")
            if modality.placeholder in owners:
                raise InputError(
                    f"the modalities {owners[modality.placeholder]} and {name} have one placeholder, "
                    f"{modality.placeholder}: give each its own."
                )
            owners[modality.placeholder] = name
        self._owners = owners
        if tokenizer is not None:
            add_placeholders(tokenizer, self.modalities)
            tokenizer.padding_side = "left"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            if tokenizer.pad_token in owners:
                raise InputError(
                    f"{tokenizer.pad_token} is the tokenizer's pad_token and the placeholder of "
                    f"{owners[tokenizer.pad_token]}: give the tokenizer another pad_token."
                )
        super().__init__(tokenizer, **kwargs)

    @property
    def chat_template(self) -> Any:
        """The tokenizer's; setting it sets that."""
        return None if self.tokenizer is None else self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, value: Any) -> None:
        if value is not None:
            self.tokenizer.chat_template = value

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Token ids of the placeholders of modalities with an encoder."""
        return {
            name: self.tokenizer.convert_tokens_to_ids(modality.placeholder)
            for name, modality in with_encoder(self.modalities).items()
        }

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = True,
        add_special_tokens: bool = True,
        return_tensors: str = "pt",
        **items: Items,
    ) -> BatchFeature:
        """Inputs for one prompt or several.

        Args:
            text: prompts with placeholders.
            padding: as the tokenizer takes it; to the left, as generation needs it.
            add_special_tokens: False for prompts that a chat template has made.
            items: by modality; one list for all placeholders in their order, or one for each prompt.

        Returns:
            `input_ids` and `attention_mask` [B, T], and `<modality>_<feature>` for the items.

        Raises:
            InputError: if items and placeholders are not equally many, or an item is not valid.
        """
        if return_tensors != "pt":
            raise ValueError("only return_tensors='pt' is supported")
        prompts = [text] if isinstance(text, str) else list(text)
        queues = {name: self._queue(name, given, prompts) for name, given in items.items()}
        found: dict[str, list[Features]] = {}
        expanded = [self._expand(prompt, queues, found) for prompt in prompts]
        encoded = self.tokenizer(
            expanded, padding=padding, add_special_tokens=add_special_tokens, return_tensors="pt", padding_side="left"
        )
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        for name, features in found.items():
            batch = self.modalities[name].collate(features)
            inputs |= {feature_name(name, key): value for key, value in batch.items()}
        return BatchFeature(inputs)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """A conversation as a prompt, or as inputs with `tokenize=True`.

        A message's content is text, or a list of parts: `{"type": "text", "text": ...}` and
        `{"type": <modality>, <modality>: <item>}`.
        """
        tokenize = kwargs.pop("tokenize", False)
        kwargs.pop("return_dict", None)
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = conversation if several else [conversation]
        rows = [self._flatten(messages) for messages in conversations]
        prompts = [
            self.tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **kwargs)
            for messages, _ in rows
        ]
        if not tokenize:
            return prompts if several else prompts[0]
        used = [name for name in self.modalities if any(items[name] for _, items in rows)]
        given: dict[str, Any] = {name: [items[name] for _, items in rows] for name in used}
        return self(prompts, add_special_tokens=False, **given)

    def _flatten(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
        items: dict[str, list[str]] = {name: [] for name in self.modalities}
        flat = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                text = ""
                for part in content:
                    kind = part["type"]
                    if kind == "text":
                        text += part["text"]
                    elif kind in self.modalities:
                        text += self.modalities[kind].placeholder
                        items[kind].append(part[kind])
                    else:
                        raise InputError(f"a message has a part of type {kind!r}, the model knows {self._known()}.")
                content = text
            flat.append({**message, "content": content})
        return flat, items

    def _known(self) -> str:
        return ", ".join(["text", *self.modalities])

    def _queue(self, name: str, given: Items, prompts: Sequence[str]) -> Iterator[str]:
        if name not in self.modalities:
            raise InputError(f"there are items of the modality {name!r}, the model knows {self._known()}.")
        given = [given] if isinstance(given, str) else given
        placeholder = self.modalities[name].placeholder
        if given and not isinstance(given[0], str):
            if len(given) != len(prompts):
                raise InputError(f"{name}: {len(given)} lists of items were given for {len(prompts)} prompts.")
            for index, (own, prompt) in enumerate(zip(given, prompts, strict=True)):
                self._check_count(name, len(own), prompt.count(placeholder), f"prompt {index} (counted from 0) has")
            given = [item for own in given for item in own]
        self._check_count(name, len(given), sum(p.count(placeholder) for p in prompts), "the prompts have")
        return iter([str(item) for item in given])

    def _check_count(self, name: str, items: int, placeholders: int, owner: str) -> None:
        if items != placeholders:
            raise InputError(
                f"{owner} {placeholders} placeholders {self.modalities[name].placeholder} for {items} items of {name}: "
                "each item needs one."
            )

    def _expand(self, prompt: str, queues: Mapping[str, Iterator[str]], found: dict[str, list[Features]]) -> str:
        if not self._owners:
            return prompt
        parts = re.split("(" + "|".join(map(re.escape, self._owners)) + ")", prompt)
        for index, part in enumerate(parts):
            name = self._owners.get(part)
            if name is None:
                continue
            item = next(queues.get(name, iter(())), None)
            if item is None:
                raise InputError(f"the prompts have a placeholder {part}, but no items of {name} were given.")
            parts[index] = self._in_place(name, item, found)
        return "".join(parts)

    def _in_place(self, name: str, item: str, found: dict[str, list[Features]]) -> str:
        modality = self.modalities[name]
        if isinstance(modality, TextModality):
            text = modality.render(item)
            if inside := next((p for p, o in self._owners.items() if p in text and o != name), None):
                raise InputError(f"an item of {name} has the placeholder {inside} in it: {text[:60]!r}.")
            return text
        features = modality.features(item)
        found.setdefault(name, []).append(features)
        return modality.placeholder * modality.soft_tokens(features)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that every batch has."""
        return ["input_ids", "attention_mask"]

    def to_dict(self) -> dict[str, Any]:
        """Nothing but the class: the modalities have files of their own."""
        return {"processor_class": type(self).__name__}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write tokenizer, chat template and modalities."""
        for name, modality in self.modalities.items():
            save_modality(modality, Path(save_directory) / MODALITIES_FOLDER / name)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "MllmProcessor":
        """The processor in a folder or a Hub repository."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            names = ("revision", "token", "cache_dir", "local_files_only")
            chosen = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            patterns = [f"{MODALITIES_FOLDER}/*", *(f"*{suffix}" for suffix in SMALL_FILES)]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **chosen))
        # Without an answer, transformers would ask the user.
        trusted = bool(kwargs.get("trust_remote_code", False))
        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted), open_modalities(folder))


def open_modalities(folder: Path) -> dict[str, Modality]:
    """The modalities that a model's folder has."""
    settings = sorted((folder / MODALITIES_FOLDER).glob(f"*/{SETTINGS_FILE}"))
    return {file.parent.name: open_modality(file.parent) for file in settings}

"""What a modality is: a placeholder token, and a way from an item (a SMILES, a sequence) to soft tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor, nn

from esmerge.errors import InputError
from esmerge.names import natural_order

Features = dict[str, Tensor]

# First words of inputs that a modality's features would be taken for.
_INPUTS = ("input", "inputs", "attention", "position", "past", "cache", "output", "logits", "labels", "use", "return")
# What a processor takes beside items, and a method of models.
_ARGUMENTS = ("text", "padding", "add_special_tokens", "self", "modality")


class MissingPackageError(InputError):
    """A modality needs a package that is not installed; without it, an encoder can be copied, but not run."""


class Modality(BaseModel, ABC):
    """The settings of a modality, and what can be done with items by them alone.

    Settings are kept as JSON beside the weights of the encoder. The encoder itself is the module that `build` makes.
    Both steps are separate, so that a processor can prepare items without any weights.

    Attributes:
        kind: by which a modality's settings name its class.
        placeholder: stands for an item in a prompt; a prompt has one for each item, and each becomes as many
            positions as the item has soft tokens.
        empty_build: whether `build` works where parameters have no memory (accelerate's `init_empty_weights`), which
            saves initialising those that are loaded anyway.
        version: another one with each change by which the same settings, weights and features give other soft tokens:
            those that were kept on disk are then made again.
        derived: what the tensors are that `adopt` leaves out.
    """

    model_config = ConfigDict(extra="forbid")

    kind: ClassVar[str]
    empty_build: ClassVar[bool] = False
    version: ClassVar[int] = 1
    derived: ClassVar[str] = "what the settings of the encoder determine"
    placeholder: str = Field(min_length=1)

    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def folder(self) -> Path:
        """Where its own files lie, if it has some."""
        return self._folder

    @property
    def files(self) -> tuple[str, ...]:
        """Names of files in its folder that it needs beside the settings and the weights."""
        return ()

    @property
    def weightless(self) -> bool:
        """Whether the encoder has no weights to load."""
        return False

    @abstractmethod
    def features(self, item: str) -> Features:
        """What the encoder takes of one item, on the CPU; without a batch dimension.

        Raises:
            InputError: if the item is not valid; names it.
        """

    @abstractmethod
    def soft_tokens(self, features: Features) -> int:
        """How many soft tokens an item becomes."""

    @abstractmethod
    def build(self, hidden_size: int) -> "Encoder":
        """A new encoder for an LLM with that hidden size, with fresh weights."""

    def known_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]] | None:
        """The shapes of an encoder's tensors by name, where they are known without what `build` needs; by default not.

        Tensors of these shapes are taken for the encoder's; those of any others are compared with what `build` makes.
        """
        return None

    def projection(self, shapes: Mapping[str, Sequence[int]]) -> tuple[str, int] | None:
        """The tensor of the encoder that makes soft tokens, and their width; None where shapes do not tell.

        By this, encoders of another LLM are found before anything is loaded. By default it is the last matrix under
        `projector.`, with one row for each value of a soft token.

        Args:
            shapes: of the encoder's tensors, by name.
        """
        return last_matrix(shapes, "projector.")

    def adopt(self, names: Sequence[str], read: Callable[[str], Tensor]) -> tuple[dict[str, str], dict[str, Any]]:
        """What the tensors of an encoder, perhaps saved by older versions, are today.

        Args:
            names: of the tensors in the checkpoint.
            read: gives the values of one.

        Returns:
            Today's name -> name in the checkpoint, without what is `derived`; and settings that the tensors tell.
        """
        return {name: name for name in names}, {}

    def collate(self, features: Sequence[Features]) -> Features:
        """The features of several items as one batch; by default stacked, padded with zeros at the end of dimension 0.

        What was padded must be told by one of the features, such as an attention mask.
        """
        batch = {}
        for name in features[0]:
            rows = [item[name] for item in features]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)
        return batch


class Encoder(nn.Module, ABC):
    """Turns a batch of features into soft tokens."""

    def settings(self, modality: Modality) -> Modality:
        """The settings that make this encoder again: those it was built from, unless its weights told more."""
        return modality

    @abstractmethod
    def forward(self, **features: Tensor) -> Tensor:
        """The soft tokens of all items, one item after the other and without padding, [sum of n_i, hidden]."""


class TextModality(Modality):
    """A modality whose items are read by the LLM as they are: no encoder, no soft tokens.

    Attributes:
        template: what an item becomes in the prompt, with `{item}` in it.
        max_characters: longer items are cut off after that many characters; None for no limit.
    """

    kind: ClassVar[str] = "text"
    template: str = "{item}"
    max_characters: int | None = Field(default=None, gt=0)

    def render(self, item: str) -> str:
        """The text that takes the placeholder's place.

        Raises:
            InputError: if there is nothing to read in the item.
        """
        if not any(character.isalnum() for character in item):
            raise InputError(f"an item for {self.placeholder} is empty ({item!r}): fill it in or leave it out.")
        return self.template.replace("{item}", item[: self.max_characters])

    @property
    def weightless(self) -> bool:
        return True

    def features(self, item: str) -> Features:
        """None: text needs no encoder."""
        return {}

    def soft_tokens(self, features: Features) -> int:
        """None."""
        return 0

    def build(self, hidden_size: int) -> Encoder:
        """Not for text."""
        raise TypeError("a text modality has no encoder")


def last_matrix(shapes: Mapping[str, Sequence[int]], prefix: str) -> tuple[str, int] | None:
    """The last matrix, in natural order, among tensors whose names start with a prefix, and its number of rows.

    >>> last_matrix({"projector.2.weight": (8, 4), "projector.10.weight": (6, 8)}, "projector.")
    ('projector.10.weight', 6)
    """
    matrices = [name for name, shape in shapes.items() if name.startswith(prefix) and len(shape) == 2]
    last = max(matrices, key=natural_order, default=None)
    return None if last is None else (last, int(shapes[last][0]))


def shorten(item: str, length: int = 40) -> str:
    """An item, quoted and cut off, for messages.

    >>> shorten("M" * 50, 8)
    "'MMMMMMMM...' (50 characters)"
    """
    return repr(item) if len(item) <= length else f"{item[:length] + '...'!r} ({len(item)} characters)"


def feature_name(modality: str, name: str) -> str:
    """What a feature of a modality is called among the inputs of a model: `protein_input_ids`."""
    return f"{modality}_{name}"


def split_features(modalities: Sequence[str], inputs: Mapping[str, object]) -> dict[str, Features]:
    """The features of each modality among the inputs of a model, by their own names.

    >>> split_features(["protein"], {"protein_input_ids": 1, "input_ids": 2})
    {'protein': {'input_ids': 1}}
    """
    found: dict[str, Features] = {}
    # The longest name first: `cell_line_values` is a feature of `cell_line` where there is one, not of `cell`.
    for key, value in inputs.items():
        owner = max((m for m in modalities if key.startswith(f"{m}_")), key=len, default=None)
        if owner is not None and value is not None:
            found.setdefault(owner, {})[key.removeprefix(f"{owner}_")] = value  # type: ignore[assignment]
    return found


def check_name(name: str, source: str) -> None:
    """Raise `InputError` if a modality's name cannot be told from other inputs and parts of a model.

    Args:
        source: where it is from, for messages.
    """
    taken = name.split("_")[0] in _INPUTS or name in _ARGUMENTS or hasattr(nn.ModuleDict, name)
    if taken or not name.isidentifier():
        raise InputError(f"{source}: {name!r} is no name for a modality, as models have other inputs or parts of it.")


def with_encoder(modalities: Mapping[str, Modality]) -> dict[str, Modality]:
    """Those of some modalities whose items become soft tokens."""
    return {name: modality for name, modality in modalities.items() if not isinstance(modality, TextModality)}


def add_placeholders(tokenizer: Any, modalities: Mapping[str, Modality]) -> None:
    """Make every placeholder of a modality with an encoder one token, new ones after all that there are."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    wanted = [modality.placeholder for modality in with_encoder(modalities).values()]
    new = [AddedToken(p, special=True, normalized=False) for p in wanted if p not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)

"""Proteins by ESM-2 and a projector, laid out as in Prot2Text-V2 (Fei et al., arXiv 2505.11194; its public code)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from esmerge.errors import InputError
from esmerge.modalities.modality import Encoder, Features, Modality, shorten

# ESM-2's tokens in the order of their ids, the same for all its sizes.
ALPHABET = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO",
    *(".", "-", "<null_1>", "<mask>"),
)
_IDS = {token: number for number, token in enumerate(ALPHABET)}
_RESIDUES = {token: number for token, number in _IDS.items() if token.isalpha()}
# What an EsmConfig must say to agree with the alphabet.
_SPECIAL = {"pad_token_id": _IDS["<pad>"], "mask_token_id": _IDS["<mask>"]}
_FREQUENCIES = "rotary_embeddings.inv_freq"
# What implementations of powers differ by.
_POWER_ERROR = 3e-7

Precision = Literal["float32", "bfloat16", "float16"]


def _precision(name: str, stored: Tensor, encoder: Mapping[str, Any]) -> Precision:
    """To which precision the rotary frequencies in a checkpoint were rounded.

    A model that was trained in half precision was often trained with frequencies that had been rounded to it, which
    moves the angles of late residues: it must keep them.
    """
    width = int(encoder["hidden_size"]) // int(encoder["num_attention_heads"])
    computed = 1 / 10000 ** (torch.arange(0, width, 2) / width)
    if stored.shape != computed.shape:
        raise InputError(
            f"the encoder's tensor {name} has shape {list(stored.shape)}, expected {list(computed.shape)}: "
            "num_attention_heads or hidden_size of the setting encoder is wrong."
        )
    if torch.allclose(stored.float(), computed, rtol=_POWER_ERROR, atol=0):
        return "float32"
    halves: tuple[Precision, ...] = ("bfloat16", "float16")
    for precision in halves:
        if torch.equal(stored.float(), computed.to(getattr(torch, precision)).float()):
            return precision
    raise InputError(
        f"the encoder's tensor {name} holds other rotary frequencies than those of ESM-2, which no setting of the kind "
        "esm gives: download or save the checkpoint again."
    )


class EsmModality(Modality):
    """Amino acid sequences; every residue, and the begin and end that ESM adds, becomes a soft token.

    Attributes:
        encoder: the EsmConfig, as in the config.json of an ESM-2 checkpoint.
        intermediate_size: of the projector.
        dropout: of the projector, in training.
        max_residues: longer sequences are cut off after that many residues.
        frequencies: the precision to which the encoder's rotary frequencies are rounded; they are never stored.
    """

    kind: ClassVar[str] = "esm"
    empty_build: ClassVar[bool] = True
    derived: ClassVar[str] = "positions and rotary frequencies of ESM, which its config determines"
    encoder: dict[str, Any]
    intermediate_size: int = Field(default=2048, gt=0)
    dropout: float = Field(default=0.3, ge=0, lt=1)
    max_residues: int = Field(default=1022, gt=0)
    frequencies: Precision = "float32"

    @field_validator("encoder")
    @classmethod
    def _fits_alphabet(cls, encoder: dict[str, Any]) -> dict[str, Any]:
        if encoder.get("model_type", "esm") != "esm":
            raise ValueError(f"model_type is {encoder['model_type']!r}; expected the config of an ESM-2 model")
        for name, expected in _SPECIAL.items():
            if encoder.get(name) != expected:
                raise ValueError(f"{name} is {encoder.get(name)!r}, expected {expected} as in ESM-2's config.json")
        size = encoder.get("vocab_size")
        if not isinstance(size, int) or size < len(ALPHABET):
            raise ValueError(f"vocab_size is {size!r}, expected {len(ALPHABET)} as in ESM-2's config.json")
        return encoder

    def features(self, item: str) -> Features:
        """Token ids with begin and end, and a mask of ones; each [n], int64."""
        residues = item.strip().upper()
        if not residues:
            raise InputError("a protein sequence is empty; give its amino acids as letters.")
        for position, letter in enumerate(residues, start=1):
            if letter not in _RESIDUES:
                raise InputError(
                    f"the protein {shorten(item)} has {letter!r} at position {position}, which is no amino acid code; "
                    f"use the letters {''.join(sorted(_RESIDUES))}."
                )
        ids = [_RESIDUES[letter] for letter in residues[: self.max_residues]]
        tokens = torch.tensor([_IDS["<cls>"], *ids, _IDS["<eos>"]])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def soft_tokens(self, features: Features) -> int:
        return len(features["input_ids"])

    def collate(self, features: Sequence[Features]) -> Features:
        batch = super().collate(features)
        # ESM counts positions and masked tokens by ids, and 0 is <cls>.
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IDS["<pad>"])
        return batch

    def adopt(self, names: Sequence[str], read: Callable[[str], Tensor]) -> tuple[dict[str, str], dict[str, Any]]:
        """Checkpoints of older versions of transformers hold what nothing looks up, and rotary frequencies.

        Of these there is one tensor for each layer (transformers 4), one for all (5), or one named after no layer
        (`layer.*.`, some 5.x); the precision to which they are rounded becomes a setting.
        """
        rotary = self.encoder.get("position_embedding_type") == "rotary"
        unused = ["encoder.embeddings.position_ids"]
        unused += ["encoder.embeddings.position_embeddings.weight"] if rotary else []
        kept: dict[str, str] = {}
        precisions: dict[Precision, str] = {}
        for name in names:
            if name.startswith("encoder.") and name.endswith(_FREQUENCIES):
                if rotary:
                    precisions.setdefault(_precision(name, read(name), self.encoder), name)
            elif name not in unused:
                # transformers 5 saves the norms of an EsmModel under the names of TensorFlow, and reads both.
                today = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                if today in kept:
                    raise InputError(
                        f"the encoder has one tensor in two places ({kept[today]}, {name}): save it again."
                    )
                kept[today] = name
        if len(precisions) > 1:
            one, other = list(precisions.values())[:2]
            raise InputError(
                f"the encoder's tensors {one} and {other} hold different rotary frequencies, but ESM has the same in "
                "all layers: download or save the checkpoint again."
            )
        precision = next(iter(precisions), self.frequencies)
        return kept, {} if precision == self.frequencies else {"frequencies": precision}

    def known_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]] | None:
        """Those of ESM-2 (rotary positions, one norm at the end), whose model takes longer to import than to merge."""
        config = self.encoder
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = [config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0]
        numbers = ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "max_position_embeddings")
        is_esm2 = (
            config.get("position_embedding_type") == "rotary"
            and not config.get("emb_layer_norm_before")
            and config.get("hidden_act", "gelu") == "gelu"
            and all(isinstance(config.get(name, 0), int | float) for name in numbers)
        )
        if not is_esm2 or len(sizes) < len(names):
            return None
        width, inner, layers, heads = sizes
        if width % heads:
            return None
        linear = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (width, width), "intermediate.dense": (inner, width)}
        linear |= {"output.dense": (width, inner)}
        modules: dict[str, tuple[int, ...]] = {}
        for layer in range(layers):
            prefix = f"encoder.encoder.layer.{layer}."
            modules |= {prefix + name: shape for name, shape in linear.items()}
            modules |= {prefix + name: (width,) for name in ("attention.LayerNorm", "LayerNorm")}
        modules["encoder.encoder.emb_layer_norm_after"] = (width,)
        modules["encoder.contact_head.regression"] = (1, layers * heads)
        projector, size = "projector.", self.intermediate_size
        modules |= {projector + "fc1": (size, width), projector + "fc2": (hidden_size, size)}
        modules |= {projector + "ln1": (size,), projector + "ln2": (hidden_size,)}
        shapes = {f"{name}.weight": shape for name, shape in modules.items()}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in modules.items()}
        return {**shapes, "encoder.embeddings.word_embeddings.weight": (self.encoder["vocab_size"], width)}

    def build(self, hidden_size: int) -> "EsmEncoder":
        return EsmEncoder(self, hidden_size)


class EsmProjector(nn.Module):
    """Prot2Text-V2's `ModalityAdapter`: two layers, then vectors of length one.

    The norms `ln1` and `ln2` are in its checkpoints but not in its computation.
    """

    def __init__(self, input_size: int, intermediate_size: int, output_size: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, output_size)
        self.ln1 = nn.LayerNorm(intermediate_size)
        self.ln2 = nn.LayerNorm(output_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """From [..., input] to [..., output]."""
        states = self.dropout(nn.functional.gelu(self.fc1(states)))
        states = self.dropout(nn.functional.gelu(self.fc2(states)))
        return nn.functional.normalize(states, dim=-1)


class EsmEncoder(Encoder):
    """`encoder` (transformers' EsmModel without a pooler) and `projector`."""

    def __init__(self, settings: EsmModality, hidden_size: int) -> None:
        from transformers import EsmConfig, EsmModel

        super().__init__()
        try:
            config = EsmConfig.from_dict(settings.encoder)
            self.encoder = EsmModel(config, add_pooling_layer=False)
        # transformers raises errors of several libraries for settings that are not valid.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"esm: transformers cannot build an ESM model from the setting encoder: {reason}"
            ) from error
        if getattr(config, "position_embedding_type", "absolute") != "rotary":
            # Positions count from the padding's id on.
            room = config.max_position_embeddings - _IDS["<pad>"] - 3
            if settings.max_residues > room:
                raise InputError(
                    f"esm: max_residues is {settings.max_residues}, but the encoder's position embeddings are enough "
                    f"for {room} residues only: lower it."
                )
        self.projector = EsmProjector(config.hidden_size, settings.intermediate_size, hidden_size, settings.dropout)
        self._frequencies = settings.frequencies
        for _, module in self._rotary():
            rounded = module.get_buffer("inv_freq").to(getattr(torch, settings.frequencies)).float()
            module.register_buffer("inv_freq", rounded, persistent=False)

    def settings(self, modality: Modality) -> Modality:
        return modality.model_copy(update={"frequencies": self._frequencies})

    def forward(self, **features: Tensor) -> Tensor:
        """From `input_ids` and `attention_mask`, each [items, n], to the soft tokens, [sum of n_i, hidden]."""
        mask = features["attention_mask"]
        states = self.encoder(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        return self.projector(states[mask.bool()])

    def _rotary(self) -> list[tuple[str, nn.Module]]:
        modules = self.encoder.named_modules(prefix="encoder")
        return [(name, module) for name, module in modules if "inv_freq" in dict(module.named_buffers(recurse=False))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Angles are frequencies times positions: frequencies rounded to half precision are wrong after a few residues.
        kept = {name: module.get_buffer("inv_freq") for name, module in self._rotary()}
        super()._apply(fn, recurse)
        for name, module in self._rotary():
            if not kept[name].is_meta:
                # Put where it is: setting the attribute would make it a buffer that is saved.
                module._buffers["inv_freq"] = kept[name].to(module.get_buffer("inv_freq").device)
        return self

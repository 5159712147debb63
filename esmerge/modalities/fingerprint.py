"""Molecules by their Morgan fingerprint and a small network: an encoder that trains in minutes, without downloads."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from esmerge.modalities.modality import Encoder, Features, Modality
from esmerge.modalities.smiles import parse_smiles

# About that of word embeddings, so that untrained soft tokens do not drown the text.
_INITIAL_SCALE = 0.02


class FingerprintModality(Modality):
    """SMILES; each becomes a fixed number of soft tokens.

    Attributes:
        radius: in bonds, of the atoms' neighbourhoods that are counted.
        n_bits: length of the fingerprint.
        tokens: soft tokens for each molecule.
        intermediate_size: of the network.
    """

    kind: ClassVar[str] = "fingerprint"
    radius: int = Field(default=2, ge=0)
    n_bits: int = Field(default=2048, gt=0)
    tokens: int = Field(default=8, gt=0)
    intermediate_size: int = Field(default=512, gt=0)

    def features(self, item: str) -> Features:
        """Logarithms of one plus the counts, [n_bits], float32."""
        molecule = parse_smiles(item)
        counts = _generator(self.radius, self.n_bits).GetCountFingerprintAsNumPy(molecule)
        return {"values": torch.from_numpy(counts.astype("float32")).log1p()}

    def soft_tokens(self, features: Features) -> int:
        return self.tokens

    def projection(self, shapes: Mapping[str, Sequence[int]]) -> tuple[str, int] | None:
        found = super().projection(shapes)
        # All soft tokens come out of one row of units.
        return found and (found[0], found[1] // self.tokens)

    def build(self, hidden_size: int) -> "FingerprintEncoder":
        return FingerprintEncoder(self, hidden_size)


class FingerprintEncoder(Encoder):
    """Linear, GELU, LayerNorm and Linear, whose output is cut into soft tokens."""

    def __init__(self, settings: FingerprintModality, hidden_size: int) -> None:
        super().__init__()
        width = settings.intermediate_size
        self.hidden_size = hidden_size
        self.fc1 = nn.Linear(settings.n_bits, width)
        self.norm = nn.LayerNorm(width)
        self.projector = nn.Linear(width, settings.tokens * hidden_size)
        nn.init.normal_(self.projector.weight, std=_INITIAL_SCALE * width**-0.5)
        nn.init.zeros_(self.projector.bias)

    def forward(self, **features: Tensor) -> Tensor:
        """From `values`, [items, n_bits], to the soft tokens, [items * tokens, hidden]."""
        values = features["values"].to(self.fc1.weight.dtype)
        states = self.norm(nn.functional.gelu(self.fc1(values)))
        return self.projector(states).view(-1, self.hidden_size)


@lru_cache(maxsize=8)
def _generator(radius: int, n_bits: int) -> Any:
    from rdkit.Chem import rdFingerprintGenerator

    return rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)

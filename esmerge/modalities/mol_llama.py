"""Mol-LLaMA's own encoder, through its own package (Kim et al., arXiv 2502.13449; github.com/DongkiKim95/Mol-LLaMA).

The package is not on PyPI and needs versions of transformers (4.43) and Uni-Core that few environments have. This file
follows its published code: `models/mol_llama_encoder.py`, `models/mol_llama.py`, `utils/configuration_mol_llama.py`.
Where it cannot be imported, its features can still be used: see `cached.py`.
"""

from importlib import import_module
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from esmerge.errors import InputError
from esmerge.modalities.modality import Encoder, Features, Modality

QUERY_TOKENS = 8
# Parts of the Q-Former and the encoder that only their pretraining needs; checkpoints do not have them.
_PRETRAINING = ("graph_proj", "text_proj", "gtm_head")


class MolLlamaModality(Modality):
    """SMILES; each becomes the eight vectors of the Q-Former, projected.

    Attributes:
        graph_encoder_config, blending_module_config, qformer_config: the sections of Mol-LLaMA's config.json.
    """

    kind: ClassVar[str] = "mol_llama"
    placeholder: str = "<mol>"
    graph_encoder_config: dict[str, Any] = Field(default_factory=dict)
    blending_module_config: dict[str, Any] = Field(default_factory=dict)
    qformer_config: dict[str, Any] = Field(default_factory=dict)

    def features(self, item: str) -> Features:
        """The characters' codes, [n], uint8: the package itself makes conformers and graphs, for a whole batch."""
        smiles = item.strip()
        if not smiles or not smiles.isascii():
            raise InputError(f"{item!r} is no valid SMILES: correct it or leave it out.")
        return {"smiles": torch.tensor(list(smiles.encode("ascii")), dtype=torch.uint8)}

    def soft_tokens(self, features: Features) -> int:
        return QUERY_TOKENS

    def build(self, hidden_size: int) -> "MolLlamaEncoder":
        return MolLlamaEncoder(self, hidden_size)


class MolLlamaEncoder(Encoder):
    """`encoder` (the package's MolLLaMAEncoder) and `llm_proj`, as its checkpoints name them."""

    def __init__(self, settings: MolLlamaModality, hidden_size: int) -> None:
        super().__init__()
        try:
            encoders = import_module("models.mol_llama_encoder")
            configurations = import_module("utils.configuration_mol_llama")
            self._graphs = import_module("models.mol_llama").get_mol_graphs
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"Mol-LLaMA's package cannot be imported here ({error}): run its encoder in its own environment, "
                "export the features, and give them as the specialist's features, or use a modality of the kind cached."
            ) from error
        sections = settings.model_dump(include={"graph_encoder_config", "blending_module_config", "qformer_config"})
        config = configurations.MolLLaMAConfig(**{name: section for name, section in sections.items() if section})
        self.encoder = encoders.MolLLaMAEncoder(
            graph_encoder_config=config.graph_encoder_config,
            blending_module_config=config.blending_module_config,
            qformer_config=config.qformer_config,
        )
        for name in _PRETRAINING:
            setattr(self.encoder, name, None)
        former = self.encoder.Qformer
        former.cls = None
        former.bert.embeddings.word_embeddings = None
        former.bert.embeddings.position_embeddings = None
        for layer in former.bert.encoder.layer:
            layer.output = None
            layer.intermediate = None
        self.llm_proj = nn.Linear(former.config.hidden_size, hidden_size)

    def forward(self, **features: Tensor) -> Tensor:
        """From `smiles`, codes padded with zeros [items, n], to the soft tokens, [items * 8, hidden]."""
        items = [bytes(row[row != 0].tolist()).decode("ascii") for row in features["smiles"].cpu()]
        graphs = self._graphs(items, self.encoder.unimol_dictionary, self.llm_proj.weight.device)
        queries = self.encoder.graph_forward(graphs)[2].last_hidden_state
        if len(queries) != len(items):
            raise InputError(f"Mol-LLaMA's package finds no conformer of one of {', '.join(items)}: leave it out.")
        projected: Tensor = self.llm_proj(queries)
        return projected.flatten(0, 1)

"""Mol-LLaMA's own encoder, through its own package (Kim et al., arXiv 2502.13449; github.com/DongkiKim95/Mol-LLaMA).

The package is not on PyPI and needs versions of transformers (4.43) and Uni-Core that few environments have. This file
follows its published code: `models/mol_llama_encoder.py`, `models/mol_llama.py`, `utils/configuration_mol_llama.py`.
Where it cannot be imported, its features can still be used: see `export_mol_llama.py`.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from esmerge.errors import InputError
from esmerge.modalities.modality import Encoder, Features, MissingPackageError, Modality, last_matrix, shorten
from esmerge.modalities.smiles import parse_smiles

QUERY_TOKENS = 8
# Uni-Mol's dictionary, one symbol in a line, in the order of the ids (its public example_data/molecule/dict.txt).
UNIMOL_SYMBOLS = (
    *("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    *("C", "N", "O", "S", "H", "Cl", "F", "Br", "I", "Si", "P", "B", "Na", "K", "Al", "Ca", "Sn", "As", "Hg", "Fe"),
    *("Zn", "Cr", "Se", "Gd", "Au", "Li"),
)
# Of SciBERT, whose other sizes are BERT's.
_VOCABULARY = 31090
# Parts of the Q-Former and the encoder that only their pretraining needs; checkpoints do not have them.
_PRETRAINING = ("graph_proj", "text_proj", "gtm_head")
# A buffer of the Q-Former, which counts up.
_POSITIONS = "encoder.Qformer.bert.embeddings.position_ids"


class MolLlamaModality(Modality):
    """SMILES; each becomes the eight vectors of the Q-Former, projected.

    Attributes:
        graph_encoder_config, blending_module_config, qformer_config: the sections of Mol-LLaMA's config.json.
    """

    kind: ClassVar[str] = "mol_llama"
    derived: ClassVar[str] = "positions of Mol-LLaMA's Q-Former, which count up"
    placeholder: str = "<mol>"
    graph_encoder_config: dict[str, Any] = Field(default_factory=dict)
    blending_module_config: dict[str, Any] = Field(default_factory=dict)
    qformer_config: dict[str, Any] = Field(default_factory=dict)

    def features(self, item: str) -> Features:
        """The characters' codes, [n], uint8: the package itself makes conformers and graphs, for a whole batch."""
        smiles = item.strip()
        parse_smiles(smiles)
        return {"smiles": torch.tensor(list(smiles.encode("ascii")), dtype=torch.uint8)}

    def soft_tokens(self, features: Features) -> int:
        return int(self.qformer_config.get("num_query_tokens", QUERY_TOKENS))

    def projection(self, shapes: Mapping[str, Sequence[int]]) -> tuple[str, int] | None:
        return last_matrix(shapes, "llm_proj.")

    def adopt(self, names: Sequence[str], read: Callable[[str], Tensor]) -> tuple[dict[str, str], dict[str, Any]]:
        return {name: name for name in names if name != _POSITIONS}, {}

    def build(self, hidden_size: int) -> "MolLlamaEncoder":
        return MolLlamaEncoder(self, hidden_size)


class MolLlamaEncoder(Encoder):
    """`encoder` (the package's MolLLaMAEncoder) and `llm_proj`, as its checkpoints name them.

    The package downloads the weights of the graph encoders and of SciBERT when it makes an encoder. Here nothing is
    downloaded: checkpoints have them all.
    """

    def __init__(self, settings: MolLlamaModality, hidden_size: int) -> None:
        super().__init__()
        try:
            encoders = import_module("models.mol_llama_encoder")
            configurations = import_module("utils.configuration_mol_llama")
            self._graphs = import_module("models.mol_llama").get_mol_graphs
            kind = _without_downloads(encoders)
        except (ImportError, AttributeError) as error:
            raise MissingPackageError(
                f"Mol-LLaMA's package cannot be imported here ({error}): run esmerge/modalities/export_mol_llama.py in "
                "its own environment, and set the specialist's `features` to the file that it writes, or use a "
                "modality of the kind cached."
            ) from error
        sections = settings.model_dump(include={"graph_encoder_config", "blending_module_config", "qformer_config"})
        config = configurations.MolLLaMAConfig(**{name: section for name, section in sections.items() if section})
        self.encoder = kind(
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
        former.bert.embeddings._non_persistent_buffers_set.add("position_ids")
        for layer in former.bert.encoder.layer:
            layer.output = None
            layer.intermediate = None
        self.llm_proj = nn.Linear(former.config.hidden_size, hidden_size)

    def forward(self, **features: Tensor) -> Tensor:
        """From `smiles`, codes padded with zeros [items, n], to the soft tokens, [items * 8, hidden]."""
        items = [bytes(row[row != 0].tolist()).decode("ascii") for row in features["smiles"].cpu()]
        # One at a time: the package leaves out molecules that it finds no conformer of, and does not say which.
        projected: Tensor = self.llm_proj(torch.cat([self._queries(item) for item in items]))
        return projected.flatten(0, 1)

    def _queries(self, smiles: str) -> Tensor:
        try:
            graphs = self._graphs([smiles], self.encoder.unimol_dictionary, self.llm_proj.weight.device)
        # Without any molecule left, it fails in one way or another.
        except Exception as error:
            raise InputError(f"Mol-LLaMA's package finds no conformer of {shorten(smiles)}: leave it out.") from error
        queries: Tensor = self.encoder.graph_forward(graphs)[2].last_hidden_state
        return queries


def _without_downloads(encoders: ModuleType) -> type[Any]:
    """The package's MolLLaMAEncoder, with parts that are as its own, but not filled with downloaded weights."""

    class LocalEncoder(encoders.MolLLaMAEncoder):  # type: ignore[name-defined]
        def init_unimol_encoder(self, unimol_config: Any) -> tuple[nn.Module, nn.Module, Any]:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "dict.txt"
                file.write_text("\n".join(UNIMOL_SYMBOLS) + "\n", encoding="utf-8")
                dictionary = encoders.Dictionary.load(str(file))
            dictionary.add_symbol("[MASK]", is_special=True)
            graph_encoder = encoders.SimpleUniMolModel(dictionary=dictionary)
            return graph_encoder, nn.LayerNorm(graph_encoder.num_features), dictionary

        def init_moleculestm_encoder(self, moleculestm_config: Any) -> tuple[nn.Module, nn.Module]:
            graph_encoder = encoders.MoleculeSTM()
            graph_encoder.num_features = graph_encoder.emb_dim
            return graph_encoder, nn.LayerNorm(graph_encoder.num_features)

        def init_Qformer(  # noqa: N802  # the package's name
            self, qformer_config: Any, hidden_size: int
        ) -> tuple[nn.Module, nn.Parameter, None]:
            config = encoders.BertConfig(vocab_size=_VOCABULARY)
            config.encoder_width = hidden_size
            config.add_cross_attention = True
            config.cross_attention_freq = qformer_config.cross_attention_freq
            config.query_length = qformer_config.num_query_tokens
            queries = nn.Parameter(torch.zeros(1, config.query_length, config.hidden_size))
            return encoders.BertLMHeadModel(config), queries, None

    return LocalEncoder

"""Full checkpoints: every tensor of the base, with the specialist's values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esmerge.checkpoint import Checkpoint
from esmerge.deltas import Delta, ValueDelta
from esmerge.errors import InputError
from esmerge.names import canonical_names
from esmerge.sources import read_json
from esmerge.specialists.encoder import SpecialistEncoder

INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


class FullSpecialist:
    """A full checkpoint, whose delta is what it has minus what the base has, tensor by tensor.

    Attributes:
        name: the specialist's name, which is its modality's.
        folder: of the checkpoint.
        config: its config.json.
        modules: empty; no tensor has low-rank factors.
        ties_embeddings: whether its output embeddings are its input embeddings.
        encoder: of its modality, if it brings one.
        left_out: how many of its tensors the result does without, by what they are.

    Args:
        config: of the LLM, where config.json is that of a model which holds the LLM.
        checkpoint: where it is open already.
        tensors: those of the LLM, where the checkpoint holds more.
    """

    low_rank = False

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        config: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
        tensors: Sequence[str] | None = None,
        encoder: SpecialistEncoder | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.encoder = encoder
        self.config: Mapping[str, Any] = read_json(folder / "config.json") if config is None else config
        if self.config.get("quantization_config"):
            raise InputError(
                f"specialist {name}: {folder} is quantised "
                f"({self.config['quantization_config'].get('quant_method', 'unknown method')}); "
                "save it dequantised, in bfloat16 or float32, and give that."
            )
        self.checkpoint = checkpoint or Checkpoint.open(folder)
        self.modules: dict[str, str] = {}
        # Old checkpoints carry the rotary frequencies, which the config determines.
        own = list(self.checkpoint) if tensors is None else tensors
        stored = [tensor for tensor in own if not tensor.endswith("rotary_emb.inv_freq")]
        self.left_out = dict(left_out or {})
        if len(stored) < len(own):
            self.left_out["rotary frequencies, which the config determines"] = len(own) - len(stored)
        self._stored = canonical_names(stored, str(folder))
        self.ties_embeddings = not any(head in self._stored for head in OUTPUT_EMBEDDINGS)

    @property
    def names(self) -> list[str]:
        """Canonical names of its tensors of floating-point values."""
        return [name for name, tensor in self._stored.items() if self.checkpoint.info(tensor).dtype.is_floating_point]

    def stored_as(self, name: str) -> str:
        """The checkpoint's tensor behind a canonical name."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.checkpoint.info(self._stored[name]).shape

    def delta(self, name: str, shape: tuple[int, ...]) -> Delta:
        """The delta of one tensor."""
        return ValueDelta(self.checkpoint, self._stored[name])

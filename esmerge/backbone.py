"""Walks a decoder-only transformer one layer at a time, without ever loading it whole."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esmerge.checkpoint import Checkpoint
from esmerge.devices import usable_device
from esmerge.errors import InputError, first_line
from esmerge.names import canonical_name, canonical_names, is_expert, is_rotary

# Attention matrices up to this size, in float32 for all heads of a batch, are written out.
MAX_ATTENTION_BYTES = 64 << 20

# What the norm after the last layer is called, by Llama and its like, Phi and NeoX, OPT, GPT-2, Mamba, LFM2, RWKV,
# RecurrentGemma, XGLM and BioGPT.
_FINAL_NORMS = (
    *("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm", "ln_out", "final_norm"),
    "layer_norm",
)
# Settings of models whose layers read more than what the layer before hands on.
_BESIDE_HIDDEN_STATES = ("hidden_size_per_layer_input", "num_kv_shared_layers")

# What models take for their layers' results.
_RETURNED: tuple[Callable[[Tensor], Any], ...] = (
    lambda hidden_states: hidden_states,
    lambda hidden_states: (hidden_states,),
    lambda hidden_states: (hidden_states, None),
    lambda hidden_states: (hidden_states, None, None),
)

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


class Backbone:
    """A base model on the meta device, whose layers get their weights one at a time.

    Args:
        folder: a transformers checkpoint folder (config.json and safetensors weights).
        dtype: in which the layers run; None for the dtype in which most of the weights are stored (on a CPU, float32
            instead of float16).
        device: on which the layers run.
        checkpoint: the one in the folder, if it is open already.
        trust_remote_code: whether code in the folder may run.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        checkpoint: Checkpoint | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.device = usable_device(device)
        self.checkpoint = checkpoint or Checkpoint.open(folder)
        self.dtype = dtype or _probe_dtype(self.checkpoint, self.device)
        self.model = _empty_model(folder, self.dtype, trust_remote_code)
        self.body: nn.Module = self.model.base_model
        if beside := next((name for name in _BESIDE_HIDDEN_STATES if getattr(self.model.config, name, None)), None):
            raise InputError(
                f"{folder}: layers of a {type(self.model).__name__} read more than the layer before hands on ({beside} "
                "in its config.json), so it cannot be probed: use coefficients and a method that need no probe."
            )
        stored = [name for name in self.checkpoint if not is_rotary(name)]
        self._stored = canonical_names(stored, str(folder))
        self.layers_name, self.layers = _decoder_layers(self.model, self.model.config.num_hidden_layers)
        embedding = self.model.get_input_embeddings()
        self._embedding_name = _name_of(self.model, embedding)
        outer = set(self.layers.modules()) | {embedding}
        for module_name, module in self.body.named_modules():
            if module not in outer:
                self._materialize(module, module_name, recurse=False)
                for name, parameter in module.named_parameters(module_name, recurse=False):
                    if not parameter.isfinite().all():
                        raise InputError(
                            f"{folder}: tensor {self._find(name)} has NaN or infinite values; "
                            "download or save the base again."
                        )
        for module_name, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                # Those that are part of a checkpoint were trained or computed with it, as parameters were.
                full = canonical_name(f"{module_name}.{name}" if module_name else name)
                if full in self._stored and name not in module._non_persistent_buffers_set:
                    buffer = self.checkpoint.read(self._stored[full], buffer.dtype)
                setattr(module, name, buffer.to(self.device))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.model.get_input_embeddings().embedding_dim

    @property
    def length_matters(self) -> bool:
        """Whether what stands at a position depends on how many follow: rotary frequencies that go by the length."""
        return bool({"dynamic", "longrope"} & set(_rope_types(self.model.config.to_dict())))

    def _find(self, name: str) -> str:
        """The checkpoint's name for a parameter of the model."""
        if canonical_name(name) in self._stored:
            return self._stored[canonical_name(name)]
        if any(map(is_expert, self._stored)):
            raise InputError(
                f"{self.folder}: the experts of a {type(self.model).__name__} are stored one by one, but run as one "
                "tensor: such mixtures of experts cannot be probed; use coefficients and a method that need no probe."
            )
        raise InputError(
            f"{self.folder} has no tensor {name}, which a {type(self.model).__name__} of its config.json needs."
        )

    def _materialize(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            full = f"{prefix}.{name}" if prefix else name
            stored = self._find(full)
            tensor = self.checkpoint.read(stored, self.dtype)
            if tensor.shape != parameter.shape:
                raise InputError(
                    f"{self.checkpoint.info(stored).file}: tensor {stored} has shape {list(tensor.shape)}, "
                    f"its config.json makes it {list(parameter.shape)}."
                )
            owner_name, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            owner.register_parameter(leaf, nn.Parameter(tensor.to(self.device), requires_grad=False))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings [.., H] of token ids [..]; only the rows that occur are read."""
        embedding = self.model.get_input_embeddings()
        tokens, positions = input_ids.unique(return_inverse=True)
        stored = self._find(self._embedding_name + ".weight")
        if tokens.max() >= self.checkpoint.info(stored).shape[0]:
            raise InputError(
                f"the tokenizer of {self.folder} gives token {int(tokens.max())}, its embedding has only "
                f"{self.checkpoint.info(stored).shape[0]} rows: use the tokenizer that belongs to the base."
            )
        rows = self.checkpoint.read_rows(stored, tokens).to(self.device, self.dtype)
        if not rows.isfinite().all():
            raise InputError(
                f"{self.folder}: tensor {stored} has NaN or infinite values; download or save the base again."
            )
        meta = embedding.weight
        # The module itself looks the rows up, so that models that scale their embeddings do so here too.
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        padding, embedding.padding_idx = embedding.padding_idx, None
        try:
            return embedding(positions.to(self.device))
        finally:
            embedding.weight, embedding.padding_idx = meta, padding

    def use_fast_attention(self, batch_size: int, length: int) -> None:
        """Attention written out where its matrices are small: in half precision the fused CPU kernel is 3 times slower.

        Args:
            batch_size, length: of the largest batch.
        """
        heads = getattr(self.model.config, "num_attention_heads", 1)
        small = 4 * batch_size * heads * length**2 <= MAX_ATTENTION_BYTES
        if small and self.device.type == "cpu" and self.dtype != torch.float32:
            self.model.set_attn_implementation("eager")

    @torch.no_grad()
    def layer_arguments(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[LayerArguments]]:
        """What the model's own forward hands to its layers: masks, position embeddings, and so on.

        The model runs with its layers replaced by recorders, so whatever it prepares for each of them (a
        sliding window here, full attention there) is what it would have prepared.

        Args:
            inputs_embeds: [B, T, H].
            attention_mask: [B, T], 1 for a token, 0 for padding.

        Returns:
            The first layer's input [B, T, H], and for each layer the arguments after the hidden states.
        """
        kwargs: dict[str, Any] = {"attention_mask": attention_mask.to(self.device)}
        if "position_ids" in inspect.signature(self.body.forward).parameters:
            # As `generate` counts them: from each row's first token, whatever padding stands before it.
            kwargs["position_ids"] = (kwargs["attention_mask"].long().cumsum(-1) - 1).clamp_min(0)
        kwargs |= {"inputs_embeds": inputs_embeds.to(self.device, self.dtype), "use_cache": False}
        recorded, failure = None, None
        for returned in _RETURNED:
            try:
                recorded = self._record(kwargs, returned)
            # What a model makes of a layer that returns something else than its own.
            except (IndexError, ValueError, TypeError, AttributeError) as error:
                failure = error
            if recorded is not None:
                break
        if recorded is None and failure is not None:
            raise InputError(
                f"a {type(self.model).__name__} cannot be probed, as its layers return what is not known here "
                f"({first_line(failure)}): use coefficients and a method that need no probe."
            ) from failure
        hidden, arguments = recorded or ([], [])
        if len(arguments) != self.num_layers:
            raise InputError(
                f"{type(self.model).__name__} called {len(arguments)} layers for {self.num_layers}: only decoders "
                "whose layers run once, one after the other, can be probed."
            )
        return hidden[0], arguments

    def _record(
        self, kwargs: Mapping[str, Any], returned: Callable[[Tensor], Any]
    ) -> tuple[list[Tensor], list[LayerArguments]] | None:
        """The inputs of all layers; None if the model expects them to return something else."""
        hidden: list[Tensor] = []
        arguments: list[LayerArguments] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden.append(hidden_states)
            arguments.append((args, kwargs))
            return returned(hidden_states)

        try:
            for layer in self.layers:
                layer.forward = record
            self.body(**kwargs)
        finally:
            for layer in self.layers:
                del layer.forward
        # A tensor that was taken for a tuple loses a dimension at each layer.
        return None if any(state.shape != hidden[0].shape for state in hidden) else (hidden, arguments)

    def iterate_layers(self) -> Iterator[nn.Module]:
        """The decoder layers in order, each with its weights only until the next one is asked for."""
        for number, layer in enumerate(self.layers):
            self._materialize(layer, f"{self.layers_name}.{number}")
            yield layer
            layer.to("meta")

    def final_norm(self) -> tuple[str, nn.Module]:
        """The norm after the last layer and its canonical name; the identity for a model that has none."""
        for leaf in _FINAL_NORMS:
            for name, module in self.body.named_modules():
                if name.rpartition(".")[2] == leaf and not name.startswith(self._inner_layers):
                    return canonical_name(name), module
        return "", nn.Identity()

    @property
    def _inner_layers(self) -> str:
        return self.layers_name.removeprefix(f"{self.model.base_model_prefix}.") + "."


def _empty_model(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """The model of a folder's config.json, without weights; `InputError` if transformers knows none of that kind."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.use_cache = False
        # Buffers (rotary frequencies, embedding scales) are made for real: no checkpoint holds them.
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except Exception as error:  # whatever transformers makes of numbers that do not fit
        raise InputError(
            f"{folder}: transformers cannot build a causal LM from its config.json: {first_line(error)}."
        ) from error


def weight_modules(folder: Path, trust_remote_code: bool = False) -> dict[str, dict[str, nn.Module]]:
    """Canonical name of each weight -> the modules that have it, by the names that the model of a config.json has.

    Empty where transformers knows no such model.
    """
    try:
        model = _empty_model(folder, None, trust_remote_code)
    except InputError:
        return {}
    found: dict[str, dict[str, nn.Module]] = {}
    for name, _ in model.named_parameters():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            found.setdefault(canonical_name(name), {})[module] = model.get_submodule(module)
    return found


def run_layer(layer: nn.Module, hidden_states: Tensor, arguments: LayerArguments) -> Tensor:
    """The layer's output [B, T, H]."""
    args, kwargs = arguments
    output = layer(hidden_states, *args, **kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def _rope_types(settings: Any) -> Iterator[str]:
    """All `rope_type`s in a config, however deep."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                yield value
            yield from _rope_types(value)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which most of a checkpoint's floating-point values are stored."""
    bytes_of: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype], default=torch.float32)


def _probe_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    stored = stored_dtype(checkpoint)
    # CPUs have no arithmetic for it.
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def _decoder_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers: it cannot be probed.")


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)

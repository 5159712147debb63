"""The layer-streaming engine agrees with plain forward passes and autograd through whole models."""

import inspect
import re
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from esmerge.backbone import Backbone, run_layer
from esmerge.errors import InputError
from esmerge.probe import batched
from esmerge.scores import Scratch
from esmerge.signals import ProbedSpecialist, SignalSettings, embedding_signals
from esmerge.specialists import LoraSpecialist

BATCH_SIZE = 2
SLIDING_WINDOW = 4
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MIXED_ATTENTION = ["sliding_attention", "full_attention"] * 2
LLAMA_LIKE = (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "down_proj"])
# Configuration class, its settings, number of specialists, all target modules and a few of them.
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}, 3, *LLAMA_LIKE),
    "mistral": ("MistralConfig", {"sliding_window": SLIDING_WINDOW}, 2, *LLAMA_LIKE),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, 4, *LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}, 2, *LLAMA_LIKE),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": SLIDING_WINDOW, "layer_types": MIXED_ATTENTION, "query_pre_attn_scalar": 8},
        2,
        *LLAMA_LIKE,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": SLIDING_WINDOW, "layer_types": MIXED_ATTENTION, "query_pre_attn_scalar": 8},
        4,
        *LLAMA_LIKE,
    ),
    "phi3": (
        "Phi3Config",
        {"bos_token_id": 1, "eos_token_id": 2},
        3,
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        ["qkv_proj"],
    ),
    "olmo2": ("Olmo2Config", {}, 2, *LLAMA_LIKE),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, "resid_pdrop": 0, "attn_pdrop": 0},
        2,
        ["c_attn", "c_proj", "c_fc"],
        ["c_attn"],
    ),
    "falcon": (  # its layers return tuples
        "FalconConfig",
        {"head_dim": None, "multi_query": True, "parallel_attn": True},
        2,
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        ["query_key_value"],
    ),
    "gptj": (
        "GPTJConfig",
        {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, "rotary_dim": 4},
        2,
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
        ["q_proj"],
    ),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        2,
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ["fc1"],
    ),
    "mamba": (  # what its linear layers read is laid out otherwise
        "MambaConfig",
        {"state_size": 4, "time_step_rank": 4},
        2,
        ["in_proj", "x_proj"],
        ["x_proj"],
    ),
    "bamba": (  # its layers return two values
        "BambaConfig",
        {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4, "attn_layer_indices": [1, 3]},
        2,
        ["in_proj", "out_proj", "q_proj", "v_proj", "gate_proj", "down_proj"],
        ["q_proj", "down_proj"],
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {},
        2,
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        ["query_key_value"],
    ),
}


def layer_deltas(specialist):
    """What the signals ask a specialist for: the deltas of a layer."""
    return lambda number: {
        weight.split(".", 2)[2]: specialist.lora_delta(weight)
        for weight in specialist.modules
        if weight.startswith(f"layers.{number}.")
    }


class Case:
    """A base, its adapters and a probe on which the engine and the reference run."""

    def __init__(self, base, adapters, probe):
        self.base, self.adapters, self.probe = base, adapters, probe

    @property
    def names(self):
        return list(self.adapters)

    def engine(self, dtype=None, **settings):
        backbone = Backbone(self.base, dtype)
        specialists = [LoraSpecialist(name, folder) for name, folder in self.adapters.items()]
        embeds, attention, masks = self.probe
        probe = batched(embeds, attention, masks, BATCH_SIZE, "the probe")
        settings = SignalSettings(projections=8, keep_responses=True, **settings)
        with Scratch() as scratch:
            probed = [ProbedSpecialist(specialist.name, layer_deltas(specialist)) for specialist in specialists]
            signals = embedding_signals(backbone, probed, [probe], settings, scratch, progress=False)
            self.inputs = {
                (positions, name, tensor): own.rows(0, own.shape[0])
                for positions, by_tensor in signals.inputs.items()
                for tensor, found in by_tensor.items()
                for name, own in zip(self.names, found, strict=True)
            }
            scores = {
                f"{name}.{tensor}": score.rows(0, score.shape[0])
                for tensor, found in signals.scores.items()
                for name, score in zip(self.names, found, strict=True)
            }
        responses = {
            f"{model}.{modality}.{layer}": rows
            for (modality, layer), response in signals.responses.items()
            for model, rows in zip(["base", *self.names], response, strict=True)
        }
        return responses, scores

    def reference(self, space="weights", distance="mse", tokens="primary"):
        """Pooled responses and scores, each model run as a whole by transformers and PEFT."""
        embeds, attention, masks = self.probe
        base = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(embeds), BATCH_SIZE)]
        with torch.no_grad():
            base_runs = [run(base, embeds[rows], attention[rows]) for rows in batches]
        touched = self.touched()
        pooled = self.pool("base", base_runs, batches)
        scores = {}
        for name, adapter in self.adapters.items():
            base = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, adapter).eval()
            leaves = leaves_of(model, touched, space)
            runs = []
            for rows, (base_normed, _) in zip(batches, base_runs, strict=True):
                normed, raw = run(model, embeds[rows], attention[rows])
                runs.append((normed, raw))
                measured = [masks[name]] if tokens == "primary" else masks.values()
                for layer, (state, other) in enumerate(zip(normed, base_normed, strict=True)):
                    gaps = [(state - other)[mask[rows]] for mask in measured]
                    total = sum(gap.square().mean() if distance == "mse" else gap.norm() for gap in gaps)
                    own = {tensor: leaf for tensor, leaf in leaves.items() if tensor.startswith(f"layers.{layer}.")}
                    gradients = torch.autograd.grad(total, list(own.values()), retain_graph=True) if own else ()
                    for tensor, gradient in zip(own, gradients, strict=True):
                        key = f"{name}.{tensor}"
                        scores[key] = scores.get(key, 0) + gradient.abs()
            pooled |= self.pool(name, runs, batches)
        return pooled, scores

    def touched(self):
        return {
            weight.removesuffix(".weight")
            for name, folder in self.adapters.items()
            for weight in LoraSpecialist(name, folder).modules
        }

    def pool(self, model, runs, batches):
        _, _, masks = self.probe
        pooled = {}
        for modality, mask in masks.items():
            for layer in range(len(runs[0][1])):
                rows = [
                    state[layer][row][mask[batch][row]].mean(dim=0)
                    for batch, (_, state) in zip(batches, runs, strict=True)
                    for row in range(len(state[layer]))
                ]
                pooled[f"{model}.{modality}.{layer}"] = torch.stack(rows).detach()
        return pooled


def run(model, embeds, attention):
    """Each layer's output: the last one after the final norm, and before it."""
    count = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    raw = []

    def take(layer, arguments, output):
        raw.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(take) for layer in layers]
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    given = {"inputs_embeds": embeds, "attention_mask": attention, "output_hidden_states": True}
    if "position_ids" in inspect.signature(plain.forward).parameters:
        # They count from the first token, as `generate` has it.
        given["position_ids"] = (attention.cumsum(dim=-1) - 1).clamp_min(0)
    normed = model(**given).hidden_states[-1]
    for handle in handles:
        handle.remove()
    return [*raw[:-1], normed], raw


def leaves_of(model, touched, space):
    """The parameters that get scores: LoRA factors, or the base's weights that any adapter changes."""
    leaves = {}
    for name, parameter in model.named_parameters():
        match = re.search(r"(?:layers|h)(\.\d+\..+)$", name)
        short = f"layers{match[1]}".replace(".base_layer", "").replace(".default", "") if match else ""
        short = short.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        wanted = "lora_" in short if space == "factors" else short.removesuffix(".weight") in touched
        parameter.requires_grad_(wanted)
        if wanted:
            leaves[short] = parameter
    return leaves


def random_probe(names, count=5, length=11, hidden=32, seed=0):
    """Left-padded inputs of different lengths, some positions of which are each modality's."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(count, length, hidden, generator=generator)
    attention = torch.ones(count, length, dtype=torch.long)
    masks = {name: torch.zeros(count, length, dtype=torch.bool) for name in names}
    for row in range(count):
        padding = row % 3
        attention[row, :padding] = 0
        for index, name in enumerate(names):
            start = padding + 1 + 2 * index
            masks[name][row, start : start + 1 + (row + index) % 2] = True
    return embeds, attention, masks


def assert_same(actual, expected, rounding=1e-5):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=rounding,
            atol=rounding * float(tensor.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.fixture(scope="module")
def build(tmp_path_factory, make_base, make_adapter):
    """A function that saves the base and adapters of an architecture, once each, and makes a probe."""
    saved = {}

    def build(architecture, space, **changes):
        kind, settings, count, all_modules, few_modules = ARCHITECTURES[architecture]
        names = [f"modality{index}" for index in range(changes.pop("count", count))]
        key = (architecture, space, len(names), *changes.items())
        if key not in saved:
            folder = tmp_path_factory.mktemp(architecture)
            fields = {**COMMON, **settings, **changes}
            # Some configurations compute what others are given.
            config = getattr(transformers, kind)(**{key: value for key, value in fields.items() if value is not None})
            make_base(config, folder / "base")
            for index, name in enumerate(names):
                lora = {"r": 4, "lora_alpha": 4 * (index + 1), "target_modules": all_modules}
                if space == "weights":
                    # Every specialist has its own rank, scaling and modules.
                    lora = {
                        "r": 2 + index,
                        "lora_alpha": 5,
                        "use_rslora": index == 1,
                        "target_modules": few_modules if index == 1 else all_modules,
                    }
                make_adapter(folder / "base", folder / name, index + 1, **lora)
            saved[key] = folder
        hidden = changes.get("word_embed_proj_dim", changes.get("hidden_size", COMMON["hidden_size"]))
        adapters = {name: saved[key] / name for name in names}
        return Case(saved[key] / "base", adapters, random_probe(names, hidden=hidden))

    return build


@pytest.mark.parametrize("space", ["factors", "weights"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_responses_and_scores(build, architecture, space):
    case = build(architecture, space)
    responses, scores = case.engine(scores=space)
    expected_responses, expected_scores = case.reference(space)
    assert_same(responses, expected_responses)
    # Mamba's states are sums over all positions before.
    assert_same(scores, expected_scores, 1e-4 if architecture == "mamba" else 1e-5)


def test_embeddings_narrower_than_hidden_states(build):
    case = build("opt", "weights", word_embed_proj_dim=16, do_layer_norm_before=False)
    found, expected = case.engine(), case.reference()
    for ours, theirs in zip(found, expected, strict=True):
        # What comes out of the last layer is made narrow again before transformers hands it out.
        wanted = {name: own for name, own in theirs.items() if "layers.3." not in name and not name.endswith(".3")}
        assert_same({name: ours[name] for name in wanted}, wanted)


def test_a_linear_layer_that_is_read_without_being_called(tmp_path, make_base, make_adapter, merge):
    """Mamba's `dt_proj`: an adapter of it does in the probe what the checkpoint does that it is merged into."""
    base = make_base(transformers.MambaConfig(**COMMON, state_size=4, time_step_rank=4), tmp_path / "base")
    names = ("a", "b")
    adapters = {
        name: str(make_adapter(base, tmp_path / name, seed, r=3, lora_alpha=90, target_modules=["dt_proj"]))
        for seed, name in enumerate(names)
    }
    content = {"base": str(base), "output": {"format": "full"}}
    checkpoints = {
        name: str(
            merge(
                {**content, "specialists": adapters, "coefficients": {own: float(own == name) for own in names}},
                f"full-{name}",
            )
        )
        for name in names
    }
    embeds, attention, masks = random_probe(names)
    tensors = {"inputs_embeds": embeds, "attention_mask": attention}
    save_file(tensors | {f"mask.{name}": mask.long() for name, mask in masks.items()}, tmp_path / "probe.safetensors")
    content["coefficients"] = {"from": "embedding_signals"}
    content["probe"] = {"tensors": str(tmp_path / "probe.safetensors")}
    merged = [
        merge({**content, "specialists": specialists}, f"merged-{number}")
        for number, specialists in enumerate((adapters, checkpoints))
    ]
    for file in ("coefficients.safetensors", "model.safetensors"):
        found, expected = (load_file(folder / file) for folder in merged)
        # Full checkpoints have scores of all tensors, of which all but one are those of the base.
        wanted = [name for name in found if name in expected and not name.startswith("lambda")]
        assert wanted
        for name in wanted:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    distances = load_file(merged[0] / "coefficients.safetensors")["distances"]
    assert (distances > 0).all()
    with pytest.raises(InputError, match=r"dt_proj.weight is a linear layer's that MambaBlock reads without"):
        merge({**content, "specialists": adapters, "space": "factors"}, "factors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_linear_layers_read(build, architecture):
    """Also of layers that get the positions of all inputs in one go."""
    case = build(architecture, "factors")
    case.engine(inputs=["own", "all"])
    embeds, attention, masks = case.probe
    expected = {}
    for name, adapter in case.adapters.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter).eval()
        for key, module in model.named_modules():
            if hasattr(module, "lora_A"):
                tensor = re.search(r"(?:layers|h)(\.\d+\..+)$", key)[1]
                module.register_forward_pre_hook(
                    lambda _, args, key=(name, f"layers{tensor}.weight"): expected.setdefault(key, []).append(args[0])
                )
        with torch.no_grad():
            for start in range(0, len(embeds), BATCH_SIZE):
                run(model, embeds[start : start + BATCH_SIZE], attention[start : start + BATCH_SIZE])
    read = {}
    last_items = [max(int(mask[row].nonzero().max()) for mask in masks.values()) for row in range(len(embeds))]
    up_to_last_item = attention.bool() & (torch.arange(embeds.shape[1]) <= torch.tensor(last_items)[:, None])
    for (name, tensor), parts in expected.items():
        rows = torch.cat([part.flatten(0, -2) for part in parts])
        for positions, mask in (("own", masks[name]), ("all", up_to_last_item)):
            read[positions, name, tensor] = rows[mask.flatten()]
    assert_same(case.inputs, read)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_adapter_and_full_checkpoint_agree(build, merge, architecture):
    case = build(architecture, "weights")
    content = {
        "base": str(case.base),
        "specialists": {name: str(folder) for name, folder in case.adapters.items()},
        "coefficients": dict.fromkeys(case.names, 1.0),
        "method": {"normalize": False},
    }
    embeds, attention, _ = case.probe
    base, full = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (case.base, merge(content | {"output": {"format": "full"}}, "full"))
    )
    inputs = {"inputs_embeds": embeds, "attention_mask": attention}
    plain = base(**inputs).logits
    adapted = PeftModel.from_pretrained(base, merge(content)).eval()(**inputs).logits
    tokens = attention.bool()
    torch.testing.assert_close(adapted[tokens], full(**inputs).logits[tokens], rtol=1e-4, atol=1e-4)
    assert (adapted - plain)[tokens].abs().max() > 1e-2


@pytest.mark.parametrize("tokens", ["primary", "all"])
@pytest.mark.parametrize("distance", ["mse", "frobenius"])
@pytest.mark.parametrize("space", ["factors", "weights"])
def test_distances_and_tokens_of_scores(build, space, distance, tokens):
    case = build("gemma3", space)
    _, scores = case.engine(scores=space, distance=distance, tokens=tokens)
    assert_same(scores, case.reference(space, distance, tokens)[1])


def test_scores_of_weights_that_outnumber_the_tokens(build):
    """Few tokens and wide layers: the engine then keeps inputs and output gradients instead of matrices."""
    case = build("llama", "weights", count=2, hidden_size=96, intermediate_size=160)
    case.probe = tuple(
        {name: mask[:3] for name, mask in part.items()} if isinstance(part, dict) else part[:3] for part in case.probe
    )
    _, scores = case.engine(scores="weights")
    assert_same(scores, case.reference("weights")[1])


@pytest.mark.parametrize("space", ["factors", "weights"])
def test_gradients_of_long_prompts_are_no_numbers_too_small_for_float16(build, space):
    """A mean over many positions has a small gradient at each, below what float16 can tell from zero."""
    case = build("llama", space)
    embeds, _, masks = random_probe(case.names, count=2, length=3000)
    case.probe = 30 * embeds, torch.ones(2, 3000, dtype=torch.long), {name: mask | True for name, mask in masks.items()}
    expected = case.engine(scores=space)[1]
    found = case.engine(torch.float16, scores=space)[1]
    for name, score in expected.items():
        standard = [(own - own.mean()) / own.std() for own in (score, found[name])]
        assert (standard[0] - standard[1]).abs().mean() < 0.2, name
        assert 0.8 < found[name].mean() / score.mean() < 1.25, name


@pytest.mark.parametrize("kind", ["Qwen3MoeConfig", "MixtralConfig"])
def test_mixtures_of_experts_are_refused_for_what_they_are(tmp_path, make_base, kind):
    config = getattr(transformers, kind)(**COMMON, num_experts=4, num_local_experts=4, moe_intermediate_size=16)
    folder = make_base(config, tmp_path / "base")
    with pytest.raises(InputError, match="such mixtures of experts cannot be probed; use coefficients"):
        list(Backbone(folder).iterate_layers())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
        ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 8}),
        ("XGLMConfig", {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4}),
        ("BioGptConfig", {}),
        ("MambaConfig", {}),
    ],
)
def test_the_norm_after_the_last_layer_is_found(tmp_path, make_base, kind, settings):
    folder = make_base(getattr(transformers, kind)(**COMMON, **settings), tmp_path / "base")
    backbone = Backbone(folder)
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 5, dtype=torch.long)
    with torch.no_grad():
        state, arguments = backbone.layer_arguments(hidden, mask)
        for layer, own in zip(backbone.iterate_layers(), arguments, strict=True):
            state = run_layer(layer, state, own)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder).base_model
        expected = plain(inputs_embeds=hidden, use_cache=False).last_hidden_state
        torch.testing.assert_close(backbone.final_norm()[1](state), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_read_more_than_the_layer_before_hands_on_are_refused(tmp_path, make_base):
    config = transformers.Gemma3nTextConfig(
        **{**COMMON, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
        layer_types=["full_attention"] * 4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    config.save_pretrained(tmp_path / "base")
    make_base(transformers.LlamaConfig(**COMMON), tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path / "base")
    with pytest.raises(InputError, match=r"hidden_size_per_layer_input in its config.json.*use coefficients"):
        Backbone(tmp_path / "base")


def test_a_base_in_float16_is_probed_in_float32_where_there_is_no_arithmetic_for_it(tmp_path, make_base):
    folder = make_base(transformers.LlamaConfig(**COMMON), tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert Backbone(tmp_path / "half").dtype == torch.float32
    assert Backbone(tmp_path / "half", torch.float16).dtype == torch.float16


@pytest.mark.parametrize("space", ["factors", "weights"])
def test_layers_without_adapters(tmp_path, make_base, make_adapter, space):
    config = transformers.LlamaConfig(**COMMON)
    make_base(config, tmp_path / "base")
    adapters = {}
    for seed, name in enumerate(("one", "two"), start=1):
        adapters[name] = make_adapter(
            tmp_path / "base", tmp_path / name, seed, r=4, target_modules=["q_proj"], layers_to_transform=[1, 3]
        )
    case = Case(tmp_path / "base", adapters, random_probe(adapters))
    responses, scores = case.engine(scores=space)
    expected_responses, expected_scores = case.reference(space)
    assert_same(responses, expected_responses)
    assert_same(scores, expected_scores)

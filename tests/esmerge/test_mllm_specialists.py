"""Specialists that bring an encoder, in the layouts of their public checkpoints at tiny sizes."""

import json
import logging
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import gelu, linear, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, EsmConfig, EsmModel

from esmerge.errors import InputError
from esmerge.mllm.loading import load_model
from esmerge.modalities.esm import ALPHABET
from esmerge.plan import make_plan
from esmerge.recipe import parse_recipe
from esmerge.specialists import FullSpecialist, LoraSpecialist, open_specialist

HIDDEN, ESM_HIDDEN, INTERMEDIATE, QFORMER = 32, 16, 24, 12
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ESM = EsmConfig(
    vocab_size=33,
    hidden_size=ESM_HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=1026,
    position_embedding_type="rotary",
    token_dropout=True,
    emb_layer_norm_before=False,
    pad_token_id=1,
    mask_token_id=32,
)
PLACEHOLDERS = {"protein": "<|reserved_special_token_1|>", "molecule": "<mol>", "cell": "<cell>"}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def move(module, seed, scale=0.05, only=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def save(tensors, folder, config=None, name="model.safetensors", config_name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, folder / name)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))
    return folder


def change(folder, function, name="model.safetensors"):
    tensors = load_file(folder / name)
    function(tensors)
    save_file(tensors, folder / name)


def change_json(file, function):
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def put(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


def drop(prefix):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)]


class Prot2Text(nn.Module):
    """The modules of Prot2Text-V2 under their names."""

    def __init__(self, base, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.esm_encoder = EsmModel(ESM, add_pooling_layer=False)
        self.adapter = nn.Module()
        self.adapter.fc1 = nn.Linear(ESM_HIDDEN, INTERMEDIATE)
        self.adapter.fc2 = nn.Linear(INTERMEDIATE, HIDDEN)
        self.adapter.ln1 = nn.LayerNorm(INTERMEDIATE)
        self.adapter.ln2 = nn.LayerNorm(HIDDEN)
        self.llama_decoder = load(base)
        move(self.esm_encoder, seed)

    def published_config(self):
        return {
            "architectures": ["Esm2LlamaInstructForCausalLM"],
            "model_type": "esm2llama_instruct",
            "placeholder_id": 128003,
            "esm_config": self.esm_encoder.config.to_dict(),
            "adapter_config": {
                "model_type": "modality_adapter",
                "input_dim": ESM_HIDDEN,
                "intermediate_dim": INTERMEDIATE,
                "output_dim": HIDDEN,
                "dropout_rate": 0.2,
            },
            "llama_config": self.llama_decoder.config.to_dict(),
        }

    def tensors(self):
        """As transformers 4 saved them: with positions that nothing looks up, and frequencies for each layer."""
        frequencies = "rotary_embeddings.inv_freq"
        found = {key: value for key, value in self.state_dict().items() if not key.endswith(frequencies)}
        found["esm_encoder.embeddings.position_embeddings.weight"] = torch.randn(1026, ESM_HIDDEN)
        width = ESM_HIDDEN // ESM.num_attention_heads
        for layer in range(ESM.num_hidden_layers):
            name = f"esm_encoder.encoder.layer.{layer}.attention.self.{frequencies}"
            found[name] = 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width))
        return found


ADAPTER_SETTINGS = {
    "target_modules": [f"self_attn.{name}" for name in PROJECTIONS[:4]] + [f"mlp.{name}" for name in PROJECTIONS[4:]],
    "modules_to_save": ["adapter.fc1", "adapter.fc2"],
}


def mol_encoder():
    """Some of the tensors of Mol-LLaMA's encoder and its projector, under their names."""
    torch.manual_seed(5)
    shapes = {
        "graph_encoder.unimol.encoder.layers.0.self_attn.in_proj.weight": (18, 6),
        "graph_encoder.unimol.embed_tokens.weight": (31, 6),
        "graph_encoder.moleculestm.gnns.0.mlp.0.weight": (8, 4),
        "ln_graph.unimol.weight": (6,),
        "ln_graph.moleculestm.weight": (4,),
        "blending_module.cross_attn_blocks.0.self_attn_block_2D.attn.in_proj_weight": (18, 6),
        "blending_module.mlp.unimol.0.weight": (6, 6),
        "Qformer.bert.encoder.layer.0.attention.self.query.weight": (QFORMER, QFORMER),
        "query_tokens": (1, 8, QFORMER),
    }
    found = {f"encoder.{name}": torch.randn(shape) for name, shape in shapes.items()}
    found["encoder.Qformer.bert.embeddings.position_ids"] = torch.arange(8)[None]
    return found | {"llm_proj.weight": torch.randn(HIDDEN, QFORMER), "llm_proj.bias": torch.randn(HIDDEN)}


MOL_CONFIG = {
    "model_type": "mol_llama",
    "qformer_config": {"num_query_tokens": 8},
    "blending_module_config": {"num_layers": 4, "num_heads": 8},
    "graph_encoder_config": {"encoder_types": ["unimol", "moleculestm"]},
    "llm_config": {
        "llm_model": "unsloth/Llama-3.1-8B-Instruct",
        "lora_config": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
    },
}


@pytest.fixture(scope="module")
def built(llama, make_adapter, tmp_path_factory):
    """Specialists in all formats, each also with its LLM alone in a folder named `<format>-llm`.

    Formats: `prot2text`, `prot2text-adapter`, `mol_llama`, `mol_llama-full`, `cell` (esmerge's, text).
    """
    folder, base = tmp_path_factory.mktemp("mllm"), llama / "base"
    prot = Prot2Text(base)
    move(prot.llama_decoder, 4)
    save(prot.tensors(), folder / "prot2text", prot.published_config())
    prot.llama_decoder.save_pretrained(folder / "prot2text-llm")

    whole = Prot2Text(base)
    save(whole.tensors(), folder / "prot2text-untrained", whole.published_config())
    whole.esm_encoder.save_pretrained(folder / "esm")
    peft = get_peft_model(whole, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **ADAPTER_SETTINGS))
    move(peft, 5, 0.1, "lora_")
    move(peft, 6, 0.1, "modules_to_save")
    peft.save_pretrained(folder / "prot2text-adapter")
    merged = peft.merge_and_unload()
    merged.llama_decoder.save_pretrained(folder / "prot2text-adapter-llm")
    save(merged.adapter.state_dict(), folder / "prot2text-adapter-projector")

    llm = load(base)
    llm.resize_token_embeddings(llm.config.vocab_size + 2, mean_resizing=False)
    tuned = get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=PROJECTIONS))
    move(tuned, 7, 0.05, "lora_")
    everything = mol_encoder() | {f"llm.{key}": value for key, value in tuned.state_dict().items()}
    save(everything, folder / "mol_llama-full", MOL_CONFIG)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]", "<mol>"]})
    tokenizer.save_pretrained(folder / "mol_llama-full")
    kept = {key: value for key, value in everything.items() if not key.startswith("llm.") or ".lora_" in key}
    save(kept, folder / "mol_llama", MOL_CONFIG)
    tuned.save_pretrained(folder / "mol_llama-llm", save_embedding_layers=False)

    make_adapter(base, folder / "cell-llm", 8, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    shutil.copytree(folder / "cell-llm", folder / "cell")
    settings = {"kind": "text", "placeholder": "<cell>", "template": "{item}"}
    (folder / "cell/modalities/cell").mkdir(parents=True)
    (folder / "cell/modalities/cell/config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def copied(built, tmp_path):
    """A function that copies a specialist, to be spoilt."""

    def copy(name):
        return shutil.copytree(built / name, tmp_path / "copies" / name)

    return copy


def dense(specialist, base):
    """The specialist's deltas of all tensors that it changes."""
    tensors = load_file(base / "model.safetensors")
    stored = {name.removeprefix("model."): value for name, value in tensors.items()}
    found = {}
    for name in specialist.names:
        delta = specialist.delta(name, tuple(stored[name].shape))
        found[name] = delta.rows(0, len(stored[name]), stored[name])
    return found


def differences(folder, base):
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): after[name] - before[name] for name in before}


def accounted(specialist):
    """How many tensors of the specialist's own files are merged, frozen, copied or left out."""
    files = {specialist.checkpoint.files[0]}
    encoder = [specialist.encoder.checkpoint.info(tensor) for tensor in specialist.encoder.tensors.values()]
    return sum(info.file in files for info in encoder) + sum(specialist.left_out.values())


def modality(folder, name, settings, tensors=None):
    target = folder / "modalities" / name
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        save_file(tensors, target / "model.safetensors")
    return target


PROT2TEXT_FAULTS = {
    "unknown part": (put("structure_adapter.fc1.weight", torch.ones(2, 2)), "structure_adapter.fc1.weight"),
    "unknown in ESM": (put("esm_encoder.pooler.dense.weight", torch.ones(2, 2)), "esm_encoder.pooler"),
    "unknown in projector": (put("adapter.fc3.weight", torch.ones(2, 2)), "adapter.fc3.weight"),
    "no ESM": (drop("esm_encoder."), "esm_encoder"),
    "no projector": (drop("adapter.fc2.bias"), "adapter.fc2.bias"),
    "another ESM": (put("adapter.fc1.weight", torch.ones(INTERMEDIATE, 9)), "adapter.fc1.weight"),
}


class TestProt2Text:
    def test_decoder_is_a_full_checkpoint(self, built, llama):
        specialist = open_specialist("protein", built / "prot2text")
        assert isinstance(specialist, FullSpecialist)
        expected = differences(built / "prot2text-llm", llama / "base")
        found = dense(specialist, llama / "base")
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=0, atol=0)

    def test_encoder_is_whole(self, built):
        encoder = open_specialist("protein", built / "prot2text").encoder
        assert encoder.settings == {
            "kind": "esm",
            "placeholder": PLACEHOLDERS["protein"],
            "encoder": json.loads((built / "prot2text/config.json").read_text())["esm_config"],
            "intermediate_size": INTERMEDIATE,
            "dropout": 0.2,
            "max_residues": 1022,
        }
        assert not encoder.made and encoder.folder is None
        assert encoder.projection == ("adapter.fc2.weight", HIDDEN)
        weights = {name: encoder.checkpoint.read(stored) for name, stored in encoder.tensors.items()}
        original = Prot2Text(built / "prot2text-llm")
        esm = EsmModel(EsmConfig.from_dict(encoder.settings["encoder"]), add_pooling_layer=False)
        inner = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
        missing, unexpected = esm.load_state_dict(inner, strict=False)
        assert set(missing) <= {"rotary_embeddings.inv_freq"} and not unexpected
        residues = torch.tensor([[0, 5, 9, 20, 2]])
        with torch.no_grad():
            expected = original.esm_encoder.eval()(residues).last_hidden_state
            torch.testing.assert_close(esm.eval()(residues).last_hidden_state, expected, rtol=0, atol=0)
        for name, value in original.adapter.state_dict().items():
            assert torch.equal(weights[f"projector.{name}"], value)

    def test_every_tensor_is_accounted_for(self, built):
        specialist = open_specialist("protein", built / "prot2text")
        assert specialist.left_out == {
            "positions and rotary frequencies of ESM, which its config determines": 1 + ESM.num_hidden_layers
        }
        assert accounted(specialist) + len(specialist.names) == len(specialist.checkpoint.tensors)

    def test_frequencies_rounded_to_half_precision_are_kept(self, copied):
        folder = copied("prot2text")
        names = [f"esm_encoder.encoder.layer.{n}.attention.self.rotary_embeddings.inv_freq" for n in range(2)]
        change(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16() for name in names}))
        specialist = open_specialist("protein", folder)
        assert specialist.encoder.settings["frequencies"] == "bfloat16"
        assert sum(specialist.left_out.values()) == 3
        change(folder, put(names[0], torch.ones(4)))
        with pytest.raises(InputError, match="other rotary frequencies than those of ESM-2"):
            open_specialist("protein", folder)
        change(folder, put(names[0], torch.ones(7)))
        with pytest.raises(InputError, match=r"has shape \[7\], expected \[4\]"):
            open_specialist("protein", folder)
        change(folder, put(names[0], (10000 ** -(torch.arange(0, 8, 2) / 8))))
        with pytest.raises(InputError, match=r"layer\.0\..* and .*layer\.1\..* hold different rotary frequencies"):
            open_specialist("protein", folder)

    def test_placeholder_of_another_id_is_looked_up(self, copied, llama):
        folder = copied("prot2text")
        change_json(folder / "config.json", lambda config: config.update(placeholder_id=3))
        with pytest.raises(InputError, match=r"placeholder_id is 3, .* put the specialist's tokenizer there"):
            open_specialist("protein", folder)
        shutil.copy(llama / "base/tokenizer.json", folder)
        assert open_specialist("protein", folder).encoder.placeholder == "<|assistant|>"

    def test_of_another_architecture_is_named(self, copied, llama, merge):
        folder = copied("prot2text")
        change_json(folder / "config.json", lambda config: config["llama_config"].update(model_type="qwen2"))
        change_json(folder / "config.json", lambda config: config["llama_config"].update(architectures=["Qwen2Lm"]))
        with pytest.raises(InputError, match="protein is Qwen2Lm, the base is Llama"):
            merge(recipe({"protein": folder, "cell": llama / "cell"}))

    @pytest.mark.parametrize(("spoil", "culprit"), PROT2TEXT_FAULTS.values(), ids=PROT2TEXT_FAULTS)
    def test_faulty_is_refused(self, copied, spoil, culprit):
        folder = copied("prot2text")
        change(folder, spoil)
        with pytest.raises(InputError, match=culprit):
            open_specialist("protein", folder)

    @pytest.mark.parametrize("section", ["esm_config", "adapter_config", "llama_config"])
    def test_config_needs_all_sections(self, copied, section):
        folder = copied("prot2text")
        change_json(folder / "config.json", lambda config: config.pop(section))
        with pytest.raises(InputError, match=f"{section} is missing"):
            open_specialist("protein", folder)

    def test_second_encoder_is_refused(self, copied, built):
        folder = copied("prot2text")
        with pytest.raises(InputError, match="encoder is given, but protein is a full checkpoint"):
            open_specialist("protein", folder, built / "esm")
        modality(folder, "protein", {"kind": "text", "placeholder": "<p>"})
        with pytest.raises(InputError, match="remove modalities/protein"):
            open_specialist("protein", folder)


class TestProt2TextAdapter:
    def test_deltas_are_what_peft_merges(self, built, llama):
        specialist = open_specialist("protein", built / "prot2text-adapter", built / "prot2text-untrained")
        assert isinstance(specialist, LoraSpecialist) and specialist.low_rank
        expected = differences(built / "prot2text-adapter-llm", llama / "base")
        found = dense(specialist, llama / "base")
        assert len(found) == 3 * len(PROJECTIONS)
        for name, delta in expected.items():
            torch.testing.assert_close(found.get(name, torch.zeros_like(delta)), delta, rtol=1e-4, atol=1e-6)
        assert all(specialist.scaling(name) == 2 for name in specialist.modules)
        assert specialist.modules["layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj"

    @pytest.mark.parametrize("source", ["prot2text-untrained", "esm", "modality", "folder"])
    def test_encoder_has_the_trained_projector(self, built, copied, tmp_path, source):
        folder, given = built / "prot2text-adapter", built / source
        if source in ("modality", "folder"):
            full = open_specialist("protein", built / "prot2text-untrained").encoder
            weights = {name: full.checkpoint.read(stored) for name, stored in full.tensors.items()}
            folder = copied("prot2text-adapter") if source == "folder" else folder
            place = folder if source == "folder" else tmp_path
            given = modality(place, "protein", full.settings | {"placeholder": "<prot>"}, weights)
        specialist = open_specialist("protein", folder, None if source == "folder" else given)
        encoder = specialist.encoder
        trained = load_file(built / "prot2text-adapter-projector/model.safetensors")
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            assert torch.equal(encoder.checkpoint.read(encoder.tensors[f"projector.{name}"]), trained[name])
        for name in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"):
            key = f"projector.{name}"
            found = encoder.made[key] if source == "esm" else encoder.checkpoint.read(encoder.tensors[key])
            assert torch.equal(found, trained[name])
        esm = Prot2Text(built / "prot2text-llm").esm_encoder.state_dict()
        esm.pop("rotary_embeddings.inv_freq", None)
        for name, value in esm.items():
            assert torch.equal(encoder.checkpoint.read(encoder.tensors[f"encoder.{name}"]), value)
        assert encoder.placeholder == ("<prot>" if source in ("modality", "folder") else PLACEHOLDERS["protein"])
        assert encoder.settings["intermediate_size"] == INTERMEDIATE
        adapter = [info for info in specialist.checkpoint.tensors if ".adapter." in info]
        assert len(adapter) == 4 and all(tensor in encoder.tensors.values() for tensor in adapter)

    def test_tensors_as_in_memory(self, copied, built):
        folder = copied("prot2text-adapter")

        def rename(tensors):
            for name in [name for name in tensors if ".adapter." in name]:
                module, _, leaf = name.rpartition(".")
                tensors[f"{module}.original_module.{leaf}"] = torch.zeros_like(tensors[name])
                tensors[f"{module}.modules_to_save.default.{leaf}"] = tensors.pop(name)

        change(folder, rename, "adapter_model.safetensors")
        specialist = open_specialist("protein", folder, built / "esm")
        stored = "base_model.model.adapter.fc1.modules_to_save.default.weight"
        assert specialist.encoder.tensors["projector.fc1.weight"] == stored
        assert specialist.left_out["modules as they were before training"] == 4

    def test_esm_with_one_tensor_twice_is_refused(self, copied, built):
        folder = copied("esm")
        change(folder, put("encoder.layer.0.LayerNorm.weight", torch.ones(ESM_HIDDEN)))
        change(folder, put("encoder.layer.0.LayerNorm.gamma", torch.ones(ESM_HIDDEN)))
        with pytest.raises(InputError, match="in two places"):
            open_specialist("protein", built / "prot2text-adapter", folder)

    def test_heads_of_esm_are_counted(self, copied, built):
        folder = copied("esm")

        def as_masked_lm(tensors):
            for name in list(tensors):
                tensors[f"esm.{name}"] = tensors.pop(name)
            tensors["lm_head.bias"] = torch.zeros(33)

        change(folder, as_masked_lm)
        specialist = open_specialist("protein", built / "prot2text-adapter", folder)
        assert specialist.left_out["heads of the EsmModel, which the projector replaces"] == 1

    def test_needs_an_encoder(self, built):
        with pytest.raises(InputError, match=r"without its ESM encoder: set specialists\.protein\.encoder"):
            open_specialist("protein", built / "prot2text-adapter")

    def test_encoder_of_another_kind_is_refused(self, built, tmp_path):
        with pytest.raises(InputError, match="is 'llama', expected an EsmModel"):
            open_specialist("protein", built / "prot2text-adapter", built / "prot2text-llm")
        given = modality(tmp_path, "x", {"kind": "text", "placeholder": "<x>"})
        with pytest.raises(InputError, match="kind is text"):
            open_specialist("protein", built / "prot2text-adapter", given)

    @pytest.mark.parametrize(
        ("key", "message"),
        {
            "base_model.model.esm_encoder.encoder.layer.0.output.dense.lora_A.weight": "neither of llama_decoder",
            "base_model.model.adapter.fc1.modules_to_save.weight": "in two places",
        }.items(),
    )
    def test_unknown_tensor_is_refused(self, copied, built, key, message):
        folder = copied("prot2text-adapter")
        change(folder, put(key, torch.ones(2, 2)), "adapter_model.safetensors")
        with pytest.raises(InputError, match=message) as caught:
            open_specialist("protein", folder, built / "esm")
        assert key in str(caught.value)

    def test_projector_must_be_somewhere(self, copied, built):
        folder = copied("prot2text-adapter")
        change(folder, drop("base_model.model.adapter.fc2"), "adapter_model.safetensors")
        with pytest.raises(InputError, match=r"projector\.fc2\.weight"):
            open_specialist("protein", folder, built / "esm")
        assert open_specialist("protein", folder, built / "prot2text-untrained").encoder.projection[1] == HIDDEN


MOL_LLAMA_FAULTS = {
    "unknown part": (put("mol_llama.x", torch.ones(1)), "mol_llama.x belongs to no part"),
    "unknown encoder": (put("encoder.graph_proj.weight", torch.ones(1, 1)), "encoder.graph_proj.weight"),
    "no projector": (drop("llm_proj.bias"), "no tensor llm_proj.bias"),
    "no Q-Former": (drop("encoder.Qformer"), "no tensors encoder.Qformer"),
    "no LoRA": (drop("llm."), "no LoRA factors"),
    "half a LoRA": (
        drop("llm.base_model.model.model.layers.0.mlp.up_proj.lora_B"),
        "layers.0.mlp.up_proj.lora_A.default.weight has no lora_B.weight",
    ),
}


class TestMolLlama:
    @pytest.mark.parametrize("kind", ["mol_llama", "mol_llama-full"])
    def test_deltas_are_what_peft_merges(self, built, llama, kind):
        specialist = open_specialist("molecule", built / kind)
        assert all(specialist.scaling(name) == 4 for name in specialist.modules)
        assert specialist.modules["layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj"
        merged = PeftModel.from_pretrained(load(llama / "base"), built / "mol_llama-llm").merge_and_unload()
        before = load(llama / "base").state_dict()
        for name in specialist.modules:
            expected = merged.state_dict()[f"model.{name}"] - before[f"model.{name}"]
            found = specialist.delta(name, tuple(expected.shape)).rows(0, len(expected))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_encoder_is_whole(self, built):
        specialist = open_specialist("molecule", built / "mol_llama")
        encoder = specialist.encoder
        sections = ("qformer_config", "blending_module_config", "graph_encoder_config")
        published = {section: MOL_CONFIG[section] for section in sections}
        assert encoder.settings == {"kind": "mol_llama", "placeholder": "<mol>", **published}
        assert encoder.projection == ("llm_proj.weight", HIDDEN)
        original = mol_encoder()
        positions = original.pop("encoder.Qformer.bert.embeddings.position_ids")
        assert torch.equal(positions, torch.arange(8)[None])
        assert encoder.tensors == {name: name for name in original}
        for name, value in original.items():
            assert torch.equal(encoder.checkpoint.read(name), value)
        assert specialist.low_rank
        assert specialist.left_out == {"positions of Mol-LLaMA's Q-Former, which count up": 1}
        assert accounted(specialist) + 2 * len(specialist.modules) == len(specialist.checkpoint.tensors)

    def test_frozen_weights_are_counted(self, built, llama):
        specialist = open_specialist("molecule", built / "mol_llama-full")
        base = {name.removeprefix("model.") for name in load_file(llama / "base/model.safetensors")}
        assert set(specialist.frozen) == base - {"embed_tokens.weight", "lm_head.weight"}
        assert specialist.left_out.pop("frozen weights of the base") == len(specialist.frozen)
        assert sum(specialist.left_out.values()) == 1
        assert set(specialist.names) - set(specialist.modules) == {"embed_tokens.weight", "lm_head.weight"}
        values = len(specialist.names) + len(specialist.modules) + len(specialist.frozen)
        assert accounted(specialist) + values == len(specialist.checkpoint.tensors)

    @pytest.mark.parametrize("given", [False, True])
    def test_cached_features_replace_the_encoder(self, copied, tmp_path, given):
        folder = copied("mol_llama")
        place = tmp_path if given else folder / "modalities/molecule"
        place.mkdir(parents=True, exist_ok=True)
        save_file({"CCO": torch.randn(8, QFORMER)}, place / "features.safetensors")
        specialist = open_specialist("molecule", folder, features=place / "features.safetensors" if given else None)
        encoder = specialist.encoder
        settings = {"kind": "cached", "placeholder": "<mol>", "features_file": "features.safetensors"}
        assert encoder.settings == settings | {"projector": "linear", "width": QFORMER} and encoder.folder == place
        assert encoder.tensors == {"projector.weight": "llm_proj.weight", "projector.bias": "llm_proj.bias"}
        (count,) = specialist.left_out.values()
        assert count == len(mol_encoder()) - 2

    def test_settings_beside_it_are_the_modality(self, copied):
        folder = copied("mol_llama")
        modality(folder, "molecule", {"kind": "cached", "placeholder": "<m>", "projector": "none", "width": HIDDEN})
        specialist = open_specialist("molecule", folder)
        assert specialist.encoder.placeholder == "<m>" and not specialist.encoder.tensors
        assert sum(specialist.left_out.values()) == len(mol_encoder())
        with pytest.raises(InputError, match=r"specialists\.molecule\.features gives another"):
            open_specialist("molecule", folder, features=folder / "model.safetensors")

    @pytest.mark.parametrize(("spoil", "culprit"), MOL_LLAMA_FAULTS.values(), ids=MOL_LLAMA_FAULTS)
    def test_faulty_is_refused(self, copied, spoil, culprit):
        folder = copied("mol_llama")
        change(folder, spoil)
        with pytest.raises(InputError, match=culprit.replace(".", r"\.")):
            open_specialist("molecule", folder)

    def test_scaling_must_be_known(self, copied):
        folder = copied("mol_llama")
        change_json(folder / "config.json", lambda config: config["llm_config"]["lora_config"].update(r=4))
        with pytest.raises(InputError, match=r"has rank 8, config\.json says 4"):
            open_specialist("molecule", folder)
        change_json(folder / "config.json", lambda config: config["llm_config"]["lora_config"].pop("lora_alpha"))
        with pytest.raises(InputError, match=r"llm_config\.lora_config with r and lora_alpha is missing"):
            open_specialist("molecule", folder)

    def test_pickle_is_refused(self, copied):
        folder = copied("mol_llama")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(InputError, match="as a pickle"):
            open_specialist("molecule", folder)

    def test_encoder_of_another_folder_is_refused(self, built):
        with pytest.raises(InputError, match=r"specialists\.molecule\.encoder is given, but molecule is Mol-LLaMA"):
            open_specialist("molecule", built / "mol_llama", built / "esm")


class TestOwnLayout:
    def test_text_has_settings_alone(self, built):
        specialist = open_specialist("cell", built / "cell")
        assert specialist.encoder.settings["kind"] == "text" and not specialist.encoder.tensors
        assert specialist.encoder.folder == built / "cell/modalities/cell" and not specialist.left_out

    def test_without_modalities_there_is_no_encoder(self, built):
        assert open_specialist("cell", built / "cell-llm").encoder is None
        assert open_specialist("protein", built / "prot2text-llm").encoder is None

    @pytest.mark.parametrize("kind", ["cell-llm", "prot2text-llm"])
    @pytest.mark.parametrize("inside", [True, False])
    def test_encoder_beside_adapter_or_checkpoint(self, copied, tmp_path, kind, inside):
        folder = copied(kind)
        weights = {"fc1.weight": torch.randn(4, 6), "projector.weight": torch.randn(2 * HIDDEN, 4)}
        settings = {"kind": "fingerprint", "placeholder": "<mol>", "tokens": 2}
        place = modality(folder if inside else tmp_path, "x", settings, weights)
        encoder = open_specialist("x", folder, None if inside else place).encoder
        assert encoder.settings == settings and encoder.folder == place
        assert encoder.tensors == {name: name for name in weights}
        assert encoder.projection == ("projector.weight", HIDDEN)
        if inside:
            with pytest.raises(InputError, match=r"specialists\.x\.encoder gives another"):
                open_specialist("x", folder, place)

    def test_name_must_be_the_modality(self, built):
        with pytest.raises(InputError, match=r"no modality protein, only cell: name the specialist cell"):
            open_specialist("protein", built / "cell")

    def test_encoders_of_other_modalities_are_counted(self, copied):
        folder = copied("cell")
        modality(folder, "drug", {"kind": "cached", "placeholder": "<d>"}, {"projector.weight": torch.ones(2, 2)})
        assert open_specialist("cell", folder).left_out == {"the encoder of drug, which is another modality": 1}

    @pytest.mark.parametrize(
        ("settings", "tensors", "message"),
        [
            ({"placeholder": "<p>"}, None, "kind is None, expected text"),
            ({"kind": "esm"}, None, "placeholder is None, expected text"),
            ({"kind": "esm", "placeholder": "<p>"}, None, r"has no model\.safetensors"),
            ({"kind": "text", "placeholder": "<p>"}, {"x": torch.ones(1)}, r"model\.safetensors holds x"),
        ],
    )
    def test_faulty_is_refused(self, copied, settings, tensors, message):
        folder = copied("cell-llm")
        modality(folder, "protein", settings, tensors)
        with pytest.raises(InputError, match=message):
            open_specialist("protein", folder)

    def test_features_are_mol_llamas(self, built):
        for name in ("cell", "prot2text", "prot2text-llm"):
            with pytest.raises(InputError, match=r"specialists\.cell\.features is given"):
                open_specialist("cell", built / name, features=built / "x.safetensors")


def recipe(specialists, **changes):
    entries = {k: v if isinstance(v, dict) else {"model": str(v)} for k, v in specialists.items()}
    content = {"base": "base", "specialists": entries, "coefficients": "uniform", "output": {"format": "full"}}
    return content | changes


def plan_of(llama, specialists, **changes):
    return make_plan(parse_recipe(recipe(specialists, **changes), llama))


class TestMerge:
    def test_is_that_of_the_llms_alone(self, built, merge):
        kinds = {"protein": "prot2text", "molecule": "mol_llama", "cell": "cell"}
        whole = merge(recipe({name: built / kind for name, kind in kinds.items()}), "whole")
        alone = merge(recipe({name: built / f"{kind}-llm" for name, kind in kinds.items()}), "alone")
        found, expected = (load_file(folder / "model.safetensors") for folder in (whole, alone))
        llm = {name: value for name, value in found.items() if name.startswith("language_model.")}
        assert llm.keys() == {f"language_model.{name}" for name in expected}
        assert {name.split(".")[1] for name in found.keys() - llm.keys()} == {"molecule", "protein"}
        for name, value in expected.items():
            assert torch.equal(found[f"language_model.{name}"], value), name
        record = yaml.safe_load((whole / "esmerge.yaml").read_text())
        assert {name: sum(own.values()) for name, own in record["left_out"].items()} == {"protein": 3, "molecule": 1}
        assert "left_out" not in yaml.safe_load((alone / "esmerge.yaml").read_text())

    @pytest.mark.parametrize("space", ["weights", "factors"])
    def test_of_adapters_is_an_adapter_of_the_base(self, built, copied, llama, merge, space):
        molecule = copied("mol_llama")
        other = built / "prot2text-adapter"
        if space == "factors":
            # Equal ranks are needed there.
            other = copied("mol_llama-llm")
        entry = {"model": str(other)} | ({"encoder": str(built / "esm")} if space == "weights" else {})
        content = recipe({"molecule": molecule, "protein": entry}, space=space, output={"format": "adapter"})
        folder = merge(content)
        model = PeftModel.from_pretrained(load(llama / "base"), folder).merge_and_unload()
        specialists = [
            PeftModel.from_pretrained(load(llama / "base"), built / "mol_llama-llm").merge_and_unload(),
            load(built / "prot2text-adapter-llm"),
        ]
        weight = "model.layers.1.self_attn.v_proj.weight"
        first, second = (specialist.state_dict()[weight] for specialist in specialists)
        expected = (first + second) / 2 if space == "weights" else first
        torch.testing.assert_close(model.state_dict()[weight], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("output", ["full", "adapter"])
    @pytest.mark.parametrize("names", ["layers", "one", "literal"])
    def test_encoder_computes_what_the_specialists_does(self, built, copied, llama, merge, output, names):
        """With frequencies rounded to bfloat16, as old versions and new ones name them."""
        folder = copied("prot2text" if output == "full" else "prot2text-untrained")
        rounded = (1 / 10000 ** (torch.arange(0, 8, 2) / 8)).bfloat16()
        layer = "encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
        new = {"layers": [layer.format(0), layer.format(1)], "one": ["rotary_embeddings.inv_freq"]}
        new["literal"] = [layer.format("*")]
        change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "inv_freq" in name])
        change(folder, lambda tensors: tensors.update({f"esm_encoder.{name}": rounded.clone() for name in new[names]}))
        entry = {"model": str(folder)}
        if output == "adapter":
            entry = {"model": str(built / "prot2text-adapter"), "encoder": str(folder)}
        content = recipe({"protein": entry, "cell": built / "cell"}, output={"format": output})
        model, processor = load_model(merge(content), llama / "base", dtype=torch.float32)

        tensors = load_file(folder / "model.safetensors")
        reference = EsmModel(ESM, add_pooling_layer=False).eval()
        inner = {k.removeprefix("esm_encoder."): v for k, v in tensors.items() if k.startswith("esm_encoder.")}
        own = {name: tensor for name, tensor in inner.items() if "inv_freq" not in name and "position_emb" not in name}
        reference.load_state_dict(own, strict=False)
        reference.rotary_embeddings.inv_freq.copy_(rounded)
        projector = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
        if output == "adapter":
            projector = load_file(built / "prot2text-adapter-projector/model.safetensors")
        inputs = processor(text="<|reserved_special_token_1|>", protein=["ACDEFGHIKLMNPQRSTVWY" * 20])
        features = {key.removeprefix("protein_"): inputs[key] for key in inputs if key.startswith("protein_")}
        with torch.no_grad():
            states = reference(**features).last_hidden_state
            for layer in ("fc1", "fc2"):
                states = gelu(linear(states, projector[f"{layer}.weight"], projector[f"{layer}.bias"]))
            expected = normalize(states, dim=-1)[0]
            found = model.get_protein_features(**features)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_logits_are_those_of_the_specialists_own_model(self, built, llama, merge):
        """Merged with weight 1 alone it is the specialist, on proteins that are cut off too."""
        content = recipe({"protein": built / "prot2text", "cell": built / "cell"}, method="task_arithmetic")
        folder = merge(content | {"coefficients": {"protein": 1.0, "cell": 0.0}})
        model, processor = load_model(folder, dtype=torch.float32)
        placeholder = PLACEHOLDERS["protein"]

        tensors = load_file(built / "prot2text/model.safetensors")
        esm = EsmModel(ESM, add_pooling_layer=False).eval()
        inner = {key.removeprefix("esm_encoder."): t for key, t in tensors.items() if key.startswith("esm_encoder.")}
        unknown = esm.load_state_dict(inner, strict=False).unexpected_keys
        assert all("inv_freq" in name or "position_embeddings" in name for name in unknown)
        decoder = load(built / "prot2text-llm")

        def soft_tokens(sequence):
            ids = [0, *(ALPHABET.index(letter) for letter in sequence[:1022]), 2]
            states = esm(torch.tensor([ids])).last_hidden_state[0]
            for layer in ("fc1", "fc2"):
                states = gelu(linear(states, tensors[f"adapter.{layer}.weight"], tensors[f"adapter.{layer}.bias"]))
            return normalize(states, dim=-1)

        proteins = ["MKTAYIAKQR", "ACDEFGHIKLMNPQRSTVWY" * 60, "GSHM"]
        text = f"First {placeholder} then {placeholder} last {placeholder}: what for?"
        inputs = processor(text=text, protein=proteins)
        counts = [len(protein) + 2 if len(protein) < 1022 else 1024 for protein in proteins]
        assert (inputs["input_ids"] == processor.placeholder_ids["protein"]).sum() == sum(counts) == 12 + 1024 + 6
        parts = text.split(placeholder)
        embeds = []
        with torch.no_grad():
            for index, part in enumerate(parts):
                ids = processor.tokenizer(part, add_special_tokens=False)["input_ids"]
                embeds.append(decoder.get_input_embeddings()(torch.tensor(ids)))
                if index < len(proteins):
                    embeds.append(soft_tokens(proteins[index]))
            expected = decoder(inputs_embeds=torch.cat(embeds)[None]).logits
            found = model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_own_tokens_are_kept(self, built, llama, merge, caplog):
        with caplog.at_level(logging.WARNING):
            folder = merge(recipe({"molecule": built / "mol_llama-full", "cell": built / "cell"}))
        assert "is not the base's" not in caplog.text
        rows = len(load_file(llama / "base/model.safetensors")["lm_head.weight"])
        found, own = load_file(folder / "model.safetensors"), load_file(built / "mol_llama-full/model.safetensors")
        for name, stored in {"model.embed_tokens.weight": "model.embed_tokens", "lm_head.weight": "lm_head"}.items():
            merged = found[f"language_model.{name}"]
            assert len(merged) == rows + 2
            assert torch.equal(merged[rows:], own[f"llm.base_model.model.{stored}.weight"][rows:])
        assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["[PAD]", "<mol>"]) == [rows, rows + 1]

    def test_fields_of_the_recipe(self, built, llama, tmp_path):
        save_file({"CCO": torch.randn(8, QFORMER)}, tmp_path / "mol.safetensors")
        entries = {
            "molecule": {"model": str(built / "mol_llama"), "features": str(tmp_path / "mol.safetensors")},
            "protein": {"model": str(built / "prot2text-adapter"), "encoder": str(built / "esm")},
        }
        plan = plan_of(llama, entries)
        assert [s.encoder.settings["kind"] for s in plan.specialists] == ["cached", "esm"]
        entries["molecule"]["features"] = "nowhere.safetensors"
        with pytest.raises(InputError, match=r"specialists\.molecule\.features: the file .*nowhere"):
            plan_of(llama, entries)

    def test_same_placeholder_is_refused(self, built, copied, llama):
        folder = copied("cell")
        change_json(folder / "modalities/cell/config.json", lambda config: config.update(placeholder="<mol>"))
        with pytest.raises(InputError, match="molecule and cell have the same placeholder, <mol>"):
            plan_of(llama, {"molecule": built / "mol_llama", "cell": folder})

    @pytest.mark.parametrize(
        ("kind", "tensor"), [("mol_llama", "llm_proj.weight"), ("prot2text", "adapter.fc2.weight")]
    )
    def test_projector_of_another_base_is_refused(self, built, copied, llama, kind, tensor):
        folder = copied(kind)
        change(folder, lambda tensors: tensors.update({tensor: tensors[tensor][:20].clone()}))
        message = f"{tensor} makes soft tokens of size 20, the base base has hidden_size {HIDDEN}"
        with pytest.raises(InputError, match=message):
            plan_of(llama, {"x": folder, "cell": built / "cell"})

    def test_frozen_weights_must_be_the_bases(self, built, copied, llama, caplog):
        folder = copied("mol_llama-full")
        prefix = "llm.base_model.model.model.layers"

        def other(tensors):
            for name in tensors:
                if ".base_layer." in name:
                    tensors[name] = tensors[name] * 1.1

        change(folder, other)
        with caplog.at_level(logging.WARNING):
            plan_of(llama, {"molecule": folder, "cell": built / "cell"})
        assert "is not the base's (relative distance 0.10)" in caplog.text
        change(folder, put(f"{prefix}.7.foo.weight", torch.ones(3, 3)))
        with pytest.raises(InputError, match=r"layers\.7\.foo\.weight is neither part of the adapter nor"):
            plan_of(llama, {"molecule": folder, "cell": built / "cell"})
        change(folder, drop(f"{prefix}.7"))
        change(folder, put(f"{prefix}.0.self_attn.q_proj.base_layer.weight", torch.ones(3, 3)))
        with pytest.raises(InputError, match=r"q_proj\.base_layer\.weight has shape \[3, 3\]"):
            plan_of(llama, {"molecule": folder, "cell": built / "cell"})

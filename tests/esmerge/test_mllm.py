"""The multimodal model: prompts with items of any modality, in any order, in any batch."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from esmerge.errors import InputError
from esmerge.mllm import MllmForConditionalGeneration, MllmProcessor
from esmerge.mllm.loading import assemble, load_model
from esmerge.modalities import modality_from_settings
from esmerge.modalities.registry import save_encoder

# Prompts with any number of items in any order, and their items.
PROMPTS = {
    "Is <mol> a drug?": {"molecule": ["CCO"]},
    "<protein> and <mol>, then <mol> in <cell>: which?": {
        "molecule": ["c1ccccc1", "CC(=O)O"],
        "protein": ["MKTAYIAK"],
        "cell": ["CD3D, CD8A"],
    },
    "No items at all.": {},
    "Like <protein>: yes\nLike <protein>: no\n<protein>?": {"protein": ["GSHM", "MALWMRLLPLACDEFGHIKL", "KK"]},
}


@pytest.fixture(scope="module")
def parts(llama, modality_settings):
    """An LLM's folder, modalities and encoders."""
    torch.manual_seed(0)
    modalities = {name: modality_from_settings(settings, name) for name, settings in modality_settings.items()}
    return llama / "base", modalities, {name: modalities[name].build(32).eval() for name in ("molecule", "protein")}


@pytest.fixture(scope="module")
def model_and_processor(parts):
    base, modalities, encoders = parts
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    processor = MllmProcessor(AutoTokenizer.from_pretrained(base), modalities)
    return assemble(llm, processor, encoders).eval(), processor


def together(processor, prompts):
    """One batch of several prompts with all their items."""
    rows = [PROMPTS[prompt] for prompt in prompts]
    names = {name for row in rows for name in row}
    return processor(text=prompts, **{name: [row.get(name, []) for row in rows] for name in names})


def last_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_soft_tokens_take_the_places_of_placeholders(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text="a <mol> b", molecule=["CCO"])
    places = inputs["input_ids"][0] == processor.placeholder_ids["molecule"]
    assert places.sum() == 3
    features = {key.removeprefix("molecule_"): inputs[key] for key in inputs if "molecule" in key}
    soft = model.get_molecule_features(**features)
    embeds = model.embed_inputs(inputs["input_ids"], {"molecule": features})[0]
    assert torch.equal(embeds[places], soft)
    own = model.get_input_embeddings()(inputs["input_ids"][0][~places])
    assert torch.equal(embeds[~places], own)


def test_batches_and_padding_do_not_change_the_result(model_and_processor):
    model, processor = model_and_processor
    prompts = list(PROMPTS)
    alone = torch.cat([last_logits(model, together(processor, [prompt])) for prompt in prompts])
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3]):
        batch = last_logits(model, together(processor, [prompts[i] for i in order]))
        torch.testing.assert_close(batch, alone[order], rtol=0, atol=1e-5)


def test_every_item_counts_in_its_place(model_and_processor):
    model, processor = model_and_processor
    prompt = "<mol> before <mol>"
    one, two = (last_logits(model, processor(text=prompt, molecule=items)) for items in (["CCO", "CN"], ["CN", "CCO"]))
    assert not torch.allclose(one, two, atol=1e-4)


def test_ready_soft_tokens_are_accepted(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text="a <mol> b", molecule=["CCO"])
    features = {key.removeprefix("molecule_"): inputs.pop(key) for key in list(inputs) if "molecule" in key}
    expected = last_logits(model, {**inputs, **{f"molecule_{key}": value for key, value in features.items()}})
    ready = last_logits(model, {**inputs, "molecule_soft_tokens": model.get_molecule_features(**features)})
    assert torch.equal(ready, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_that_of_the_llm_on_the_same_embeddings(model_and_processor, beams):
    model, processor = model_and_processor
    inputs = together(processor, list(PROMPTS))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(found[:, :length], inputs["input_ids"])
    features = {
        name: {key.removeprefix(f"{name}_"): inputs[key] for key in inputs if key.startswith(f"{name}_")}
        for name in ("molecule", "protein")
    }
    embeds = model.embed_inputs(inputs["input_ids"], features)
    expected = model.language_model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(found[:, length:], expected)


def test_saved_and_loaded(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = together(processor, list(PROMPTS))
    expected = last_logits(model, inputs)
    for auto in (AutoModel, AutoModelForCausalLM, MllmForConditionalGeneration):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert torch.equal(last_logits(loaded.eval(), inputs), expected)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MllmProcessor
    repeated = together(again, list(PROMPTS))
    assert all(torch.equal(repeated[key], inputs[key]) for key in inputs)
    placed = AutoModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(last_logits(placed.eval(), inputs), expected)


def test_tied_embeddings_stay_tied(parts, tmp_path):
    base, modalities, encoders = parts
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    processor = MllmProcessor(AutoTokenizer.from_pretrained(base), modalities)
    model = assemble(llm, processor, encoders).eval()
    model.save_pretrained(tmp_path)
    loaded = MllmForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    inputs = together(processor, list(PROMPTS))
    assert torch.equal(last_logits(loaded.eval(), inputs), last_logits(model, inputs))


def test_chat_with_parts(model_and_processor):
    _, processor = model_and_processor
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Does "},
                {"type": "molecule", "molecule": "CCO"},
                {"type": "text", "text": " bind "},
                {"type": "protein", "protein": "MKT"},
                {"type": "text", "text": "?"},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert "Does <mol> bind <protein>?" in text
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    expected = processor(text=text, molecule=["CCO"], protein=["MKT"], add_special_tokens=False)
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[key], expected[key]) for key in inputs)


def test_adapter_folder_with_encoders_loads_in_one_call(llama, parts, tmp_path):
    base, modalities, encoders = parts
    shutil.copytree(llama / "molecule", tmp_path / "adapter")
    save_encoder(modalities["molecule"], encoders["molecule"], tmp_path / "adapter" / "modalities" / "molecule")
    model, processor = load_model(tmp_path / "adapter", base)
    inputs = processor(text="a <mol> b", molecule=["CCO"])
    llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), llama / "molecule")
    features = {key: value for key, value in inputs.items() if key.startswith("molecule_")}
    embeds = model.embed_inputs(
        inputs["input_ids"], {"molecule": {key.removeprefix("molecule_"): value for key, value in features.items()}}
    )
    with torch.no_grad():
        expected = llm(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[:, -1]
    torch.testing.assert_close(last_logits(model, inputs), expected)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_gradients_reach_encoders_and_adapters(parts):
    base, modalities, encoders = parts
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    processor = MllmProcessor(AutoTokenizer.from_pretrained(base), modalities)
    model = assemble(get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"])), processor, encoders)
    inputs = processor(text="<mol> <protein>", molecule=["CCO"], protein=["MKT"])
    model(**inputs, labels=inputs["input_ids"].clamp_max(100)).loss.backward()
    for part in ("encoders.molecule", "encoders.protein", "language_model"):
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.startswith(part)), part
    model.zero_grad()


@pytest.mark.parametrize(
    ("text", "items", "culprit"),
    [
        ("a <mol>", {}, "no items of molecule"),
        ("a <mol>", {"molecule": ["C", "N"]}, "1 placeholders <mol> for 2 items"),
        (["<mol>", "b"], {"molecule": [[], ["C"]]}, "prompt 0"),
        ("a", {"rna": ["ACGU"]}, "'rna'"),
        ("a <mol>", {"molecule": ["C1CC"]}, "C1CC"),
        ("a <protein>", {"protein": ["MK7T"]}, "MK7T"),
        ("a <cell>", {"cell": [" "]}, "an item for <cell> is empty"),
        ("<cell> <mol>", {"cell": ["<mol>"], "molecule": ["C"]}, "has the placeholder <mol>"),
    ],
)
def test_items_that_do_not_fit(model_and_processor, text, items, culprit):
    _, processor = model_and_processor
    with pytest.raises(InputError, match=culprit):
        processor(text=text, **items)


def test_count_mismatch_in_the_model(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text="a <mol> b", molecule=["CCO"])
    place = (inputs["input_ids"][0] == processor.placeholder_ids["molecule"]).nonzero()[0]
    inputs["input_ids"][0, place] = 0
    with pytest.raises(InputError, match="2 positions for molecule, its items make 3 soft tokens"):
        model(**inputs)


def test_two_modalities_with_one_placeholder(parts):
    base, modalities, _ = parts
    settings = {"kind": "text", "placeholder": "<mol>"}
    twice = {**modalities, "cell": modality_from_settings(settings, "cell")}
    with pytest.raises(InputError, match="<mol>"):
        MllmProcessor(AutoTokenizer.from_pretrained(base), twice)

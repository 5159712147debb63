"""The multimodal model: prompts with items of any modality, in any order, in any batch."""

import copy
import pickle
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


@pytest.fixture
def saved(model_and_processor, tmp_path):
    """A folder, and the model and the processor from it."""
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    return tmp_path / "saved", loaded, AutoProcessor.from_pretrained(tmp_path / "saved")


def features_of(inputs, *names):
    return {
        name: {key.removeprefix(f"{name}_"): inputs[key] for key in inputs if key.startswith(f"{name}_")}
        for name in names
    }


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
    ],
    ids=["samples", "beams", "sampled beams", "no cache", "static cache", "warpers"],
)
def test_every_way_to_generate(model_and_processor, options):
    model, processor = model_and_processor
    inputs = together(processor, list(PROMPTS))
    length = inputs["input_ids"].shape[1]
    embeds = model.embed_inputs(inputs["input_ids"], features_of(inputs, "molecule", "protein"))
    torch.manual_seed(0)
    found = model.generate(**inputs, max_new_tokens=4, **options)
    torch.manual_seed(0)
    expected = model.language_model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=4, **options
    )
    assert torch.equal(found[:, length:], expected)
    assert len(found) == len(PROMPTS) * options.get("num_return_sequences", 1)


def test_penalties_that_look_at_the_prompt(model_and_processor):
    """Placeholders are no tokens that the LLM has logits for."""
    model, processor = model_and_processor
    inputs = together(processor, list(PROMPTS))
    assert inputs["input_ids"].max() >= model.get_output_embeddings().weight.shape[0]
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False}
    found = model.generate(**inputs, max_new_tokens=4, **options)
    assert torch.equal(found[:, :-4], inputs["input_ids"])


def test_going_on_from_a_cache(model_and_processor):
    """Token by token as a user writes it, with more items in what follows."""
    model, processor = model_and_processor
    start = together(processor, list(PROMPTS)[:2])
    more = processor(text=["then <mol>?", "or <mol>!"], molecule=["CN", "CCN"], add_special_tokens=False)
    with torch.no_grad():
        cache = model(**start, use_cache=True).past_key_values
        mask = torch.cat([start["attention_mask"], more["attention_mask"]], dim=1)
        found = model(**{**more, "attention_mask": mask, "past_key_values": cache}).logits[:, -1]
    whole = {"input_ids": torch.cat([start["input_ids"], more["input_ids"]], dim=1), "attention_mask": mask}
    # The first prompt's molecule and what follows in its row, then the second prompt's.
    values = torch.cat([start["molecule_values"], more["molecule_values"]])
    rows = [values[0], values[3], values[1], values[2], values[4]]
    protein = {key: start[key] for key in start if key.startswith("protein_")}
    expected = last_logits(model, {**whole, **protein, "molecule_values": torch.stack(rows)})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_padding_on_the_right(model_and_processor):
    model, processor = model_and_processor
    inputs = together(processor, list(PROMPTS))
    expected = last_logits(model, inputs)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    padded = {**inputs}
    for key in ("input_ids", "attention_mask"):
        moved = [row.roll(length - len(row)) for row, length in zip(inputs[key], lengths, strict=True)]
        padded[key] = torch.stack(moved)
    with torch.no_grad():
        logits = model(**padded).logits
    found = torch.stack([row[length - 1] for row, length in zip(logits, lengths, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_examples_with_their_own_items(model_and_processor):
    """Items of examples in one prompt stand where the same text has them, whatever batch they come in."""
    model, processor = model_and_processor
    text = "<mol> on <protein>: yes\n" * 2 + "<mol> on <protein>:"
    rows = [(["CCO", "CN", "C"], ["MKT", "GG", "KKLL"]), (["C", "CCO", "CN"], ["KKLL", "MKT", "GG"])]
    molecules, proteins = ([row[index] for row in rows] for index in range(2))
    batch = last_logits(model, processor(text=[text, text], molecule=molecules, protein=proteins))
    for row, (molecule, protein) in zip(batch, rows, strict=True):
        alone = last_logits(model, processor(text=text, molecule=molecule, protein=protein))[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(batch[0], batch[1], atol=1e-3)


@pytest.mark.parametrize("device_map", ["auto", "cpu", "sequential", {"": "cpu"}], ids=str)
def test_device_maps(saved, device_map):
    folder, model, processor = saved
    inputs = together(processor, list(PROMPTS))
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()
    assert torch.equal(last_logits(placed, inputs), last_logits(model, inputs))
    one_call, _ = load_model(folder, device_map=device_map)
    assert torch.equal(last_logits(one_call, inputs), last_logits(model, inputs))


def test_parts_on_the_disk(saved, tmp_path):
    folder, model, processor = saved
    inputs = together(processor, list(PROMPTS))
    places = {"language_model": "cpu", "encoders.molecule": "cpu", "encoders.protein": "disk"}
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path)).eval()
    assert torch.equal(last_logits(placed, inputs), last_logits(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved, dtype):
    folder, model, processor = saved
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    inputs = together(processor, list(PROMPTS))
    soft = features_of(inputs, "protein")["protein"]
    with torch.no_grad():
        found, expected = half.get_protein_features(**soft), model.get_protein_features(**soft)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
    assert half.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(saved, tmp_path, tied):
    _, model, processor = saved
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    inputs = together(processor, list(PROMPTS))
    before = last_logits(model, inputs)
    rows = before.shape[1]
    model.resize_token_embeddings(rows + 7, mean_resizing=False)
    after = last_logits(model, inputs)
    assert after.shape[1] == rows + 7
    torch.testing.assert_close(after[:, :rows], before)
    model.save_pretrained(tmp_path / "resized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resized").eval()
    assert torch.equal(last_logits(again, inputs), after)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_gradient_checkpointing_gives_the_same_gradients(saved):
    _, model, processor = saved
    inputs = together(processor, list(PROMPTS))
    model.train().encoders.eval()  # without dropout

    def gradients():
        model.zero_grad()
        # Placeholders are no labels.
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.language_model.modules())
    found = gradients()
    assert found.keys() == expected.keys() and any("encoders.protein" in name for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_peft_on_top(saved, tmp_path):
    folder, model, processor = saved
    inputs = together(processor, list(PROMPTS))
    before = last_logits(model, inputs)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(last_logits(tuned.eval(), inputs), before)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                assert parameter.grad.any()
                parameter.normal_()
    expected, written = last_logits(tuned, inputs), tuned.generate(**inputs, max_new_tokens=3)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert torch.equal(last_logits(again, inputs), expected)
    assert torch.equal(again.generate(**inputs, max_new_tokens=3), written)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(last_logits(reloaded, inputs), expected, rtol=1e-4, atol=1e-4)


def test_adapter_inside_is_merged_before_it_is_saved(llama, parts, tmp_path):
    base, modalities, encoders = parts
    shutil.copytree(llama / "molecule", tmp_path / "adapter")
    save_encoder(modalities["molecule"], encoders["molecule"], tmp_path / "adapter" / "modalities" / "molecule")
    model, processor = load_model(tmp_path / "adapter", base)
    with pytest.raises(InputError, match="merge_and_unload"):
        model.save_pretrained(tmp_path / "saved")
    inputs = processor(text="a <mol> b", molecule=["CCO"])
    expected = last_logits(model, inputs)
    model.merge_and_unload().save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(last_logits(loaded, inputs), expected, rtol=1e-4, atol=1e-4)


def test_chat_template_is_saved_and_loaded(saved, tmp_path):
    _, _, processor = saved
    messages = [{"role": "user", "content": [{"type": "molecule", "molecule": "CCO"}]}]
    processor.chat_template = "{{ messages[0]['content'] }}?"
    processor.save_pretrained(tmp_path / "processor")
    again = AutoProcessor.from_pretrained(tmp_path / "processor")
    assert again.chat_template == processor.chat_template
    assert again.apply_chat_template(messages) == "<mol>?"
    several = again.apply_chat_template([messages, messages], tokenize=True)
    assert several["input_ids"].shape == (2, 4) and len(several["molecule_values"]) == 2


def test_copies_and_pickles(saved):
    _, model, processor = saved
    inputs = together(processor, list(PROMPTS))
    again = pickle.loads(pickle.dumps(processor))
    assert all(torch.equal(value, inputs[key]) for key, value in together(again, list(PROMPTS)).items())
    assert torch.equal(last_logits(copy.deepcopy(model), inputs), last_logits(model, inputs))
    assert torch.equal(last_logits(pickle.loads(pickle.dumps(model)), inputs), last_logits(model, inputs))


@pytest.mark.parametrize("name", ["input", "past_drug", "text", "items", "modality", "a-b"])
def test_names_that_models_need_for_other_things(parts, name):
    base, modalities, _ = parts
    with pytest.raises(InputError, match=f"{name!r} is no name for a modality"):
        MllmProcessor(AutoTokenizer.from_pretrained(base), {name: modalities["molecule"]})


def test_pad_token_that_is_a_placeholder(parts):
    base, modalities, _ = parts
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<mol>"
    with pytest.raises(InputError, match=r"<mol> is the tokenizer's pad_token and the placeholder of molecule"):
        MllmProcessor(tokenizer, modalities)

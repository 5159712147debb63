"""A merged adapter names a base that is there, with modules that the base has: PEFT loads it as it lies."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from esmerge.pipeline import merge as run_merge
from esmerge.recipe import parse_recipe

NAMES = ["molecule", "protein", "cell"]
INPUTS = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model):
    return model.eval()(INPUTS).logits


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def world(llama, tmp_path):
    """A copy of `llama` to change."""
    return shutil.copytree(llama, tmp_path / "world")


@pytest.fixture
def trained_on(world):
    """A function that has the adapters say that they were trained on a base of some name each."""

    def say(*bases):
        for name, base in zip(NAMES, bases * 3 if len(bases) == 1 else bases, strict=False):
            file = world / name / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))

    return say


@pytest.fixture
def merged(world, tmp_path):
    """A function that merges the adapters uniformly, in a recipe in the folder `cfg`, and returns the result's."""
    (world / "cfg").mkdir()

    def run(base="../base", name="merged", **fields):
        content = {
            "base": base,
            "specialists": {name: f"../{name}" for name in NAMES},
            "coefficients": "uniform",
            **fields,
        }
        run_merge(parse_recipe(content, world / "cfg"), tmp_path / name, progress=False)
        return tmp_path / name

    return run


@pytest.fixture
def assert_loads(world, monkeypatch, tmp_path):
    """A function that asserts that a result loads with its base wherever one stands, and is what was merged."""

    def check(folder):
        base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, world / NAMES[0], adapter_name=NAMES[0])
        for name in NAMES[1:]:
            model.load_adapter(world / name, adapter_name=name)
        model.add_weighted_adapter(NAMES, [1 / 3] * 3, "all", combination_type="cat")
        model.set_adapter("all")
        expected = logits(model)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        found = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-5)

    return check


class TestName:
    @pytest.mark.parametrize(
        "bases",
        [
            ["/scratch/me/Llama-3.1-8B-Instruct"],
            ["/scratch/me/base", "/scratch/you/base", "/scratch/me/base"],
            ["meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"],
            ["meta-llama/Llama-3.1-8B", None, None],
            ["base"],
            [None],
        ],
        ids=["another machine", "other machines", "spellings", "some silent", "relative", "silent"],
    )
    def test_is_the_folder_of_the_base(self, world, trained_on, merged, assert_loads, bases):
        trained_on(*bases)
        folder = merged()
        assert config_of(folder)["base_model_name_or_path"] == str(world / "base")
        assert_loads(folder)

    def test_is_the_folder_that_the_adapters_name_like_a_repository(self, world, trained_on, merged, assert_loads):
        (world / "models").mkdir()
        (world / "base").rename(world / "models" / "base")
        (world / "base").symlink_to(world / "models" / "base")
        trained_on("models/base")
        folder = merged()
        assert config_of(folder)["base_model_name_or_path"] == str(world / "base")
        assert_loads(folder)

    def test_is_what_all_adapters_call_it_on_the_hub(self, world, trained_on, merged, assert_loads, on_hub, connected):
        on_hub(world / "base", "lab/base")
        trained_on("lab/base")
        folder = merged()
        assert config_of(folder)["base_model_name_or_path"] == "lab/base"
        assert_loads(folder)

    def test_does_not_depend_on_the_current_folder(self, world, trained_on, merged, monkeypatch):
        trained_on("lab/base")
        first = merged()
        (world / "elsewhere" / "lab" / "base").mkdir(parents=True)
        monkeypatch.chdir(world / "elsewhere")
        for file in merged(name="second").iterdir():
            assert file.read_bytes() == (first / file.name).read_bytes()


class TestWarnings:
    @pytest.fixture
    def warnings(self, world, merged, on_hub, connected, caplog):
        on_hub(world / "base", "lab/base")

        def warned(base):
            merged(base)
            return [record.getMessage() for record in caplog.records]

        return warned

    def test_of_another_base_than_the_recipes(self, trained_on, warnings):
        trained_on("lab/other")
        assert warnings("lab/base") == [
            "the base is lab/base, but some adapters say that they were trained from another "
            "(molecule: lab/other, protein: lab/other, cell: lab/other); their shapes fit"
        ]

    def test_of_one_adapter(self, trained_on, warnings):
        trained_on("lab/base", "Lab/Base", "lab/other")
        [sentence] = warnings("lab/base")
        assert "another (cell: lab/other);" in sentence

    @pytest.mark.parametrize(("own", "base"), [("lab/base", "lab/base"), ("lab/other", "../base")])
    def test_none_without_cause(self, trained_on, warnings, own, base):
        trained_on(own)
        assert not warnings(base)


@pytest.fixture
def trained_in_llava(world):
    """A function that replaces the adapters by those of a vision-language model with the base in it.

    Args of the function: what comes before `layers` in the names of the base's modules.
    """

    def train(prefix):
        text = LlamaConfig.from_pretrained(world / "base")
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
        AutoModelForImageTextToText.from_config(config).save_pretrained(world / "llava")
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_pretrained(world / "llava")
            settings = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|up_proj)", task_type="CAUSAL_LM")
            adapted = get_peft_model(model, settings)
            with torch.no_grad():
                for parameter_name, parameter in adapted.named_parameters():
                    if "lora_" in parameter_name:
                        parameter.copy_(torch.randn_like(parameter) * 0.1)
            shutil.rmtree(world / name)
            adapted.save_pretrained(world / name)
            file = world / name / "adapter_model.safetensors"
            trained = {key.replace("model.language_model.", prefix): value for key, value in load_file(file).items()}
            save_file(trained, file, metadata={"format": "pt"})

    return train


class TestModules:
    # As PEFT saves them from transformers 5 and from 4.
    @pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
    def test_of_adapters_trained_in_a_vision_language_model(
        self, world, trained_in_llava, merged, assert_loads, prefix
    ):
        trained_in_llava(prefix)
        for name in NAMES:
            assert any(f".{prefix}layers.0." in key for key in load_file(world / name / "adapter_model.safetensors"))
        folder = merged()
        # PEFT finds the text model's adapters by the names that it has for its modules.
        for name in NAMES:
            file = world / name / "adapter_model.safetensors"
            save_file({k.replace(prefix, "model."): v for k, v in load_file(file).items()}, file)
            config = {**config_of(world / name), "target_modules": ["q_proj", "up_proj"]}
            (world / name / "adapter_config.json").write_text(json.dumps(config))
        assert_loads(folder)

    def test_of_a_base_whose_checkpoint_calls_them_otherwise(self, world, merged, assert_loads):
        """Saved from the decoder alone, as transformers loads it into a causal LM all the same."""
        tensors = load_file(world / "base" / "model.safetensors")
        config = json.loads((world / "base" / "config.json").read_text()) | {"tie_word_embeddings": True}
        (world / "base" / "config.json").write_text(json.dumps(config))
        bare = {key.removeprefix("model."): value for key, value in tensors.items() if key != "lm_head.weight"}
        save_file(bare, world / "base" / "model.safetensors", metadata={"format": "pt"})
        assert_loads(merged())
        base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        for name in NAMES:
            whole = PeftModel.from_pretrained(base, world / name).merge_and_unload()
            whole.save_pretrained(world / f"{name}-full")
            base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        specialists = {name: f"../{name}-full" for name in NAMES}
        folder = merged(name="of-full", specialists=specialists, output={"rank": 12})
        plain = AutoPeftModelForCausalLM.from_pretrained(world.parent / "merged", dtype=torch.float32)
        found = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(found), logits(plain), rtol=1e-4, atol=1e-4)

"""Tiny models, adapters and tokenizers on disk, built once per session, and ways to run the command line."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs with Ctrl-C ignored, which the programs that tests start and interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "<|system|>Answer about the molecule and the protein.\n"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ITEMS = {
    "molecule": ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "C#N"],
    "protein": ["MKTAYIAK", "GSHMLEDP", "MALWMRLLPL", "KKLLKK", "ACDEFGHIK"],
    "cell": ["CD3D, CD8A", "MS4A1, CD79A", "LYZ", "NKG7, GNLY", "PPBP, PF4"],
}
TEMPLATE = "Molecule: {molecule}\nProtein: {protein}\nCell: {cell}"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def golden():
    """The reference values and the inputs they were computed from."""
    return Path(__file__).parent / "golden" / "llama3"


@pytest.fixture(scope="session")
def make_base():
    """A function that saves a random model of a transformers configuration, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(config, folder, seed=0):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms and biases start as ones and zeros, which would hide whether they are applied.
                parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name or "bias" in name else 0.1))
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_adapter():
    """A function that saves a random adapter of a base with PEFT, all its factors different from zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(base, folder, seed, **settings):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """A fast byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    lines = [TEMPLATE, CHAT_TEMPLATE, *(item for items in ITEMS.values() for item in items)]
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory, make_base, make_adapter, tokenizer):
    """A folder with a tiny Llama, three adapters of rank 4 with the same scaling, and probe texts.

    Its recipe is the fixture `recipe`.
    """
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    make_base(config, folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, (name, items) in enumerate(ITEMS.items(), start=1):
        make_adapter(folder / "base", folder / name, seed, r=4, lora_alpha=8, target_modules=ATTENTION + MLP)
        (folder / f"{name}.txt").write_text("\n".join(items) + "\n")
    return folder


@pytest.fixture(scope="session")
def modality_settings():
    """Settings of one modality of each kind, with tiny encoders; proteins are cut to 6 residues."""
    from transformers import EsmConfig

    esm = EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=32,
        pad_token_id=1,
    )
    return {
        "molecule": {"kind": "fingerprint", "placeholder": "<mol>", "n_bits": 64, "tokens": 3},
        "protein": {
            "kind": "esm",
            "placeholder": "<protein>",
            "encoder": esm.to_dict(),
            "intermediate_size": 20,
            "max_residues": 6,
        },
        "cell": {"kind": "text", "placeholder": "<cell>"},
    }


@pytest.fixture(scope="session")
def multimodal(llama, modality_settings, tmp_path_factory):
    """The folder `llama` with a modality, and an encoder where it needs one, in each specialist."""
    import torch

    from esmerge.modalities import modality_from_settings, save_encoder

    folder = tmp_path_factory.mktemp("multimodal") / "specialists"
    shutil.copytree(llama, folder)
    torch.manual_seed(0)
    for name, settings in modality_settings.items():
        place = folder / name / "modalities" / name
        if settings["kind"] == "text":
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(settings))
        else:
            modality = modality_from_settings(settings, name)
            save_encoder(modality, modality.build(32), place)
    return folder


@pytest.fixture
def recipe():
    """The plain recipe of the fixture `llama`, as a mapping to change."""
    return {
        "base": "base",
        "specialists": {name: {"model": name} for name in ITEMS},
        "probe": {"samples": 5, "template": TEMPLATE, "data": {name: f"{name}.txt" for name in ITEMS}},
        "coefficients": {"from": "embedding_signals", "projections": 32},
    }


@pytest.fixture
def merge(llama, tmp_path):
    """A function that merges a recipe mapping, with paths relative to `llama`, and returns the output folder."""
    from esmerge.pipeline import merge as run
    from esmerge.recipe import parse_recipe

    def merge(content, name="merged"):
        run(parse_recipe(content, llama), tmp_path / name, progress=False)
        return tmp_path / name

    return merge


@pytest.fixture
def esmerge(monkeypatch, capsys):
    """A function that runs the command line in this process and returns exit code, output and error output."""
    from esmerge.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["esmerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def esmerge_program():
    """The installed program."""
    return Path(sysconfig.get_path("scripts")) / "esmerge"


@pytest.fixture(scope="session")
def run_program(esmerge_program):
    """A function that runs the installed program in a process of its own, which must succeed."""

    def run(*arguments):
        done = subprocess.run([esmerge_program, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_on_other_device():
    """A function that runs command lines in one process that has a device named `other` (`tests/other_device.py`).

    A recipe runs there with `device: other`, evaluation and fine-tuning with `--accelerator other`. Returns how many
    operators ran on it.
    """
    program = Path(__file__).parent / "other_device.py"

    def run(*commands):
        lines = [json.dumps([str(argument) for argument in command]) for command in commands]
        # tests/esmerge would be taken for the package, without -P.
        process = [sys.executable, "-P", program]
        done = subprocess.run(process, input="\n".join(lines), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return int(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def hub(monkeypatch):
    """A running Hub (`tests/hub_server.py`) of this test's own; clients find it through `connected` or `online`."""
    importlib.import_module("esmerge")  # before the folder of its tests can be taken for it
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from hub_server import Hub

    with Hub() as hub:
        yield hub


@pytest.fixture
def on_hub(hub):
    """A function that puts a folder (or paths and bytes) into a repository of the Hub; returns the commit's hash."""
    return hub.add


@pytest.fixture
def connected(hub, monkeypatch, tmp_path):
    """Lets the clients in this process talk to the Hub, as its owner with the right to write and with an empty cache.

    Another token is `monkeypatch.setenv("HF_TOKEN", ...)`, none is `monkeypatch.delenv("HF_TOKEN")`.
    """
    from huggingface_hub import constants, hf_api

    home = tmp_path / "hf-home"
    for name, value in {**hub.environment(home), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub read its environment when it was imported.
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    if "transformers" in sys.modules:
        # Transformers makes its client once.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    return hub


@pytest.fixture
def api(connected):
    """The owner's client."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=connected.endpoint)


@pytest.fixture
def online(hub, tmp_path):
    """A function that runs a program in a process that talks to the Hub, with a cache of its own.

    Args of the function: the command; `token` (None for nobody), further variables of the environment by name.
    """

    def run(*command, token="hf_ownersWriteToken", **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = kept | hub.environment(tmp_path / "hf-home", token) | variables
        arguments = [str(argument) for argument in command]
        return subprocess.run(
            arguments, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    return run

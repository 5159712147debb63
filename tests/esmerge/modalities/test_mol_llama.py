"""Mol-LLaMA's encoder through its package, of which only a stand-in can be installed here.

The stand-in is written below: modules, classes, signatures and tensors are called as in the public package, the
computation is a small one of its own. Like the package, it downloads weights when it makes an encoder, and fails here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]
STAND_IN = {
    "models/__init__.py": "",
    "utils/__init__.py": "",
    "utils/configuration_mol_llama.py": """
import json
from pathlib import Path
from types import SimpleNamespace

class MolLLaMAConfig:
    def __init__(self, qformer_config=None, blending_module_config=None, graph_encoder_config=None, llm_config=None):
        former = {"bert_name": "allenai/scibert_scivocab_uncased", "num_query_tokens": 8, "cross_attention_freq": 2}
        self.qformer_config = SimpleNamespace(**{**former, "embed_dim": 6, **(qformer_config or {})})
        blending = {"num_layers": 4, "num_heads": 8}
        self.blending_module_config = SimpleNamespace(**{**blending, **(blending_module_config or {})})
        graphs = {"encoder_types": ["unimol", "moleculestm"], "unimol_config": None, "moleculestm_config": None}
        self.graph_encoder_config = SimpleNamespace(**{**graphs, **(graph_encoder_config or {})})

    @classmethod
    def from_pretrained(cls, folder):
        content = json.loads((Path(folder) / "config.json").read_text())
        names = ("qformer_config", "blending_module_config", "graph_encoder_config")
        return cls(**{name: content[name] for name in names if name in content})
""",
    "models/mol_llama_encoder.py": """
import os
from types import SimpleNamespace
import torch
from torch import nn

def download():
    if not os.environ.get("STAND_IN_ONLINE"):
        raise OSError("no network")

class Dictionary:
    def __init__(self):
        self.symbols = []
    @classmethod
    def load(cls, file):
        found = cls()
        for line in open(file):
            found.add_symbol(line.rstrip())
        return found
    def add_symbol(self, symbol, is_special=False):
        self.symbols.append(symbol)
    def __len__(self):
        return len(self.symbols)

class SimpleUniMolModel(nn.Module):
    def __init__(self, dictionary):
        super().__init__()
        self.num_features = 6
        self.embed_tokens = nn.Embedding(len(dictionary), 6)
    def forward(self, src_tokens):
        return self.embed_tokens(src_tokens), src_tokens >= 0

class MoleculeSTM(nn.Module):
    emb_dim = 4
    def __init__(self):
        super().__init__()
        self.gnns = nn.ModuleList([nn.Linear(1, 4)])
    def forward(self, x):
        return self.gnns[0](x), x[..., 0] >= 0

class BlendingModule(nn.Module):
    def __init__(self, hidden_dim, num_heads, num_layers, dims):
        super().__init__()
        self.mlp = nn.ModuleDict({name: nn.Linear(width, hidden_dim) for name, width in dims.items()})
    def forward(self, nodes, masks):
        return sum(self.mlp[name](node) for name, node in nodes.items()), masks["unimol"], None

class BertConfig:
    def __init__(self, vocab_size=30):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, 12, 2
    @classmethod
    def from_pretrained(cls, name):
        download()
        return cls(31090)

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.crossattention = nn.Linear(config.encoder_width, 12)
        self.intermediate, self.output = nn.Linear(12, 12), nn.Linear(12, 12)
        self.output_query = nn.Linear(12, 12)

class BertLMHeadModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = nn.Module()
        self.bert.embeddings = nn.Module()
        self.bert.embeddings.word_embeddings = nn.Embedding(config.vocab_size, 12)
        self.bert.embeddings.position_embeddings = nn.Embedding(16, 12)
        self.bert.embeddings.LayerNorm = nn.LayerNorm(12)
        self.bert.embeddings.register_buffer("position_ids", torch.arange(16)[None])
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.cls = nn.Linear(12, config.vocab_size)
    @classmethod
    def from_pretrained(cls, name, config):
        download()
        return cls(config)

class MolLLaMAEncoder(nn.Module):
    def __init__(self, graph_encoder_config, blending_module_config, qformer_config, temperature=0.1, tune_gnn=False):
        super().__init__()
        graphs, norms = {}, {}
        if "unimol" in graph_encoder_config.encoder_types:
            graphs["unimol"], norms["unimol"], self.unimol_dictionary = self.init_unimol_encoder(None)
        if "moleculestm" in graph_encoder_config.encoder_types:
            graphs["moleculestm"], norms["moleculestm"] = self.init_moleculestm_encoder(None)
        self.graph_encoder, self.ln_graph = nn.ModuleDict(graphs), nn.ModuleDict(norms)
        dims = {name: graph.num_features for name, graph in graphs.items()}
        width = max(dims.values())
        self.blending_module = BlendingModule(
            width, blending_module_config.num_heads, blending_module_config.num_layers, dims
        )
        self.Qformer, self.query_tokens, self.scibert_tokenizer = self.init_Qformer(qformer_config, width)
        self.graph_proj, self.text_proj, self.gtm_head = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 2)
    def init_unimol_encoder(self, unimol_config):
        download()
        dictionary = Dictionary()
        for symbol in range(31):
            dictionary.add_symbol(str(symbol))
        model = SimpleUniMolModel(dictionary)
        return model, nn.LayerNorm(6), dictionary
    def init_moleculestm_encoder(self, moleculestm_config):
        download()
        model = MoleculeSTM()
        model.num_features = model.emb_dim
        return model, nn.LayerNorm(4)
    def init_Qformer(self, qformer_config, hidden_size):
        config = BertConfig.from_pretrained(qformer_config.bert_name)
        config.encoder_width = hidden_size
        queries = nn.Parameter(torch.zeros(1, qformer_config.num_query_tokens, 12))
        return BertLMHeadModel.from_pretrained(qformer_config.bert_name, config=config), queries, "tokenizer"
    def graph_forward(self, batch):
        nodes, masks = {}, {}
        for name, graph in self.graph_encoder.items():
            node, masks[name] = graph(**batch[name])
            nodes[name] = self.ln_graph[name](node)
        node, mask, _ = self.blending_module(nodes, masks)
        states = self.query_tokens.expand(len(node), -1, -1)
        pooled = (node * mask[..., None]).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]
        for layer in self.Qformer.bert.encoder.layer:
            states = layer.output_query(torch.tanh(states + layer.crossattention(pooled)))
        return node, mask, SimpleNamespace(last_hidden_state=self.Qformer.bert.embeddings.LayerNorm(states))
""",
    "models/mol_llama.py": """
import torch
from models.mol_llama_encoder import MolLLaMAEncoder

def get_mol_graphs(smiles_list, dictionary, device):
    assert len(dictionary) == 31
    smiles_list = [smiles for smiles in smiles_list if "Xe" not in smiles]
    rows = [torch.tensor([ord(letter) % 31 for letter in smiles]) for smiles in smiles_list]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0).to(device)
    graphs = {"unimol": {"src_tokens": tokens}, "moleculestm": {"x": tokens[..., None] / 31}}
    return graphs
""",
}
CONFIG = {
    "model_type": "mol_llama",
    "qformer_config": {"num_query_tokens": 8},
    "blending_module_config": {"num_layers": 1, "num_heads": 2},
    "graph_encoder_config": {"encoder_types": ["unimol", "moleculestm"]},
    "llm_config": {"llm_model": "base", "lora_config": {"r": 4, "lora_alpha": 16}},
}
HIDDEN = 32
# As the package makes and prunes it, online; with the soft tokens of some molecules.
MAKE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch import nn
from models.mol_llama import MolLLaMAEncoder, get_mol_graphs
from utils.configuration_mol_llama import MolLLaMAConfig
folder = Path(sys.argv[1])
config = MolLLaMAConfig.from_pretrained(folder)
torch.manual_seed(0)
model = nn.Module()
model.encoder = MolLLaMAEncoder(config.graph_encoder_config, config.blending_module_config, config.qformer_config)
former = model.encoder.Qformer
former.cls = former.bert.embeddings.word_embeddings = former.bert.embeddings.position_embeddings = None
for layer in former.bert.encoder.layer:
    layer.output = layer.intermediate = None
model.encoder.graph_proj = model.encoder.text_proj = model.encoder.gtm_head = None
model.llm_proj = nn.Linear(12, 32)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    graphs = [get_mol_graphs([item], model.encoder.unimol_dictionary, "cpu") for item in sys.argv[2:]]
    queries = [model.encoder.graph_forward(graph)[2].last_hidden_state[0] for graph in graphs]
    save_file({item: model.llm_proj(q) for item, q in zip(sys.argv[2:], queries)}, folder.parent / "soft.safetensors")
adapter = load_file(folder.parent / "adapter.safetensors")
adapter = {"llm." + name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t
           for name, t in adapter.items()}
save_file({**{k: t.contiguous() for k, t in model.state_dict().items()}, **adapter}, folder / "model.safetensors")
"""
MOLECULES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "C#N"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama):
    """A folder with the stand-in `package` and the checkpoint `molecule`; and a function that runs Python there."""
    folder = tmp_path_factory.mktemp("mol_llama")
    for name, text in STAND_IN.items():
        (folder / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "package" / name).write_text(text)
    (folder / "molecule").mkdir()
    (folder / "molecule/config.json").write_text(json.dumps(CONFIG))
    save_file(load_file(llama / "molecule/adapter_model.safetensors"), folder / "adapter.safetensors")

    def run(*command, online=False, path=(folder / "package", ROOT)):
        variables = {"PYTHONPATH": os.pathsep.join(map(str, path)), "ESMERGE_ENCODER_CACHE": str(folder / "cache")}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env={**os.environ, **variables, "STAND_IN_ONLINE": "1" if online else ""},
            cwd=folder / "package",
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("-c", MAKE, folder / "molecule", *MOLECULES, online=True, path=(folder / "package",))
    assert not done.returncode, done.stderr
    return folder, run


def test_soft_tokens_are_the_packages_without_a_download(world):
    folder, run = world
    program = f"""
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from esmerge.encoders import weights_of
from esmerge.modalities import encode_items, load_encoder
from esmerge.specialists import open_specialist
found = open_specialist("molecule", Path({str(folder / "molecule")!r})).encoder
encoder = load_encoder(found.modality, weights_of(found), {HIDDEN})
expected = load_file({str(folder / "soft.safetensors")!r})
tokens = encode_items(found.modality, encoder, list(expected), 2, None, "", progress=False)
for item, own in zip(expected, encode_items(found.modality, encoder, list(expected), 1, None, "", progress=False)):
    torch.testing.assert_close(own, expected[item])
    assert own.shape == (8, {HIDDEN})
encode_items(found.modality, encoder, ["[Xe]"], 1, None, "", progress=False)
"""
    done = run("-c", program)
    assert "InputError: Mol-LLaMA's package finds no conformer of '[Xe]'" in done.stderr, done.stderr


@pytest.mark.parametrize("output", ["adapter", "full"])
def test_merged_and_loaded(world, llama, tmp_path, output):
    folder, run = world
    recipe = {
        "base": str(llama / "base"),
        "specialists": {"molecule": {"model": str(folder / "molecule")}, "cell": {"model": str(llama / "cell")}},
        "probe": {
            "samples": 5,
            "template": "{molecule} {cell}",
            "data": {name: str(llama / f"{name}.txt") for name in ("molecule", "cell")},
        },
        "coefficients": {"from": "embedding_signals", "projections": 8},
        "output": {"format": output},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    program = f"""
import sys
import torch
from safetensors.torch import load_file
from esmerge.cli import main
from esmerge import load_model
try:
    main()
except SystemExit as end:
    assert not end.code
model, processor = load_model({str(tmp_path / "merged")!r}, {str(llama / "base")!r}, dtype=torch.float32)
expected = load_file({str(folder / "soft.safetensors")!r})
for item in expected:
    inputs = processor(text="<mol>", molecule=[item])
    with torch.no_grad():
        found = model.get_molecule_features(smiles=inputs["molecule_smiles"])
    torch.testing.assert_close(found, expected[item])
assert model(**inputs).logits.isfinite().all()
"""
    done = run("-c", program, "merge", tmp_path / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    assert not done.returncode, done.stderr


def test_checkpoint_without_graph_encoders(world, tmp_path, llama, merge):
    """As some are published: the package downloads them."""
    from esmerge.errors import InputError
    from esmerge.specialists import open_specialist

    folder, _ = world
    tensors = load_file(folder / "molecule/model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".graph_encoder." not in name}
    (tmp_path / "molecule").mkdir()
    save_file(kept, tmp_path / "molecule/model.safetensors")
    (tmp_path / "molecule/config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=r"no tensors encoder\.graph_encoder.*export_mol_llama\.py"):
        open_specialist("molecule", tmp_path / "molecule")


def test_exported_features_give_the_same_soft_tokens(world, llama, merge, tmp_path):
    """The recipe of `export_mol_llama.py`: run where esmerge is not, then merged where the package is not."""
    folder, run = world
    script = tmp_path / "export_mol_llama.py"
    script.write_text((ROOT / "esmerge/modalities/export_mol_llama.py").read_text())
    (tmp_path / "smiles.txt").write_text("\n".join([*MOLECULES, "", MOLECULES[0]]) + "\n")
    arguments = [folder / "molecule", tmp_path / "smiles.txt", tmp_path / "features.safetensors"]
    done = run(script, *arguments, online=True, path=())
    assert done.stdout.endswith("features of 5 molecules\n"), done.stderr
    features = load_file(tmp_path / "features.safetensors")
    assert features.keys() == set(MOLECULES) and features["CCO"].shape == (8, 12)
    content = {
        "base": str(llama / "base"),
        "specialists": {
            "molecule": {"model": str(folder / "molecule"), "features": str(tmp_path / "features.safetensors")},
            "cell": {"model": str(llama / "cell")},
        },
        "coefficients": "uniform",
    }
    from esmerge.mllm.loading import load_model

    expected = load_file(folder / "soft.safetensors")
    for output in ("adapter", "full"):
        merged = merge({**content, "output": {"format": output}}, output)
        model, processor = load_model(merged, llama / "base", dtype=torch.float32)
        for item in MOLECULES:
            inputs = processor(text="<mol>", molecule=[item])
            names = {name.removeprefix("molecule_"): inputs[name] for name in inputs if name.startswith("molecule_")}
            with torch.no_grad():
                torch.testing.assert_close(model.get_molecule_features(**names), expected[item])
    # Items that the package finds nothing for end it before anything is written.
    (tmp_path / "smiles.txt").write_text("[Xe]\n")
    arguments[2] = tmp_path / "other.safetensors"
    failed = run(script, *arguments, online=True, path=())
    assert failed.returncode and "no conformer was found of [Xe]" in failed.stderr
    assert not list(tmp_path.glob("other*"))

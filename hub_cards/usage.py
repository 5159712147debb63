"""The code that loads a merged model, as its card and the publisher print it."""

from collections.abc import Mapping

from esmerge.remote_code import names_code
from hub_cards.merged_model import MergedModel

# An item of each modality that people know by sight.
_ITEMS = {
    "molecule": "CCO",
    "protein": "MKTAYIAKQRQISFVK",
    "cell": "CD3D, CD8A, GZMB",
}
# Encoders that take any item of their kind; others need files or packages of their own.
_ITEM_OF_KIND = {"fingerprint": _ITEMS["molecule"], "esm": _ITEMS["protein"]}


def loading_code(model: MergedModel, repo_id: str, revision: str | None = None) -> str:
    """The two lines that load it."""
    trust = _trust(model)
    at = (f", revision={_quoted(revision)}" if revision else "") + trust
    if model.is_multimodal:
        return (
            "from esmerge import load_model\n"
            f"model, processor = load_model({_quoted(f'{repo_id}@{revision}' if revision else repo_id)}{trust})"
        )
    if model.is_adapter:
        return (
            "from peft import AutoPeftModelForCausalLM\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({_quoted(repo_id)}{at})"
        )
    return (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(repo_id)}{at})"
    )


def _trust(model: MergedModel) -> str:
    """The argument that lets code of the model's own run, if it names some."""
    return ", trust_remote_code=True" if names_code(model.folder) else ""


def packages(model: MergedModel) -> str:
    """What has to be installed for it."""
    return "esmerge" if model.is_multimodal else "peft transformers" if model.is_adapter else "transformers"


def example_code(model: MergedModel, repo_id: str) -> str:
    """A whole program that loads the model and has it answer something."""
    first, second = loading_code(model, repo_id).split("\n")
    program = _multimodal_program if model.is_multimodal else _text_program
    return "\n".join(program(model, repo_id, first, second))


def _text_program(model: MergedModel, repo_id: str, first: str, second: str) -> list[str]:
    chat = has_chat_template(model)
    inputs = "tokenizer.apply_chat_template(\n    messages, add_generation_prompt=True, return_dict=True, "
    return [
        *([first, "from transformers import AutoTokenizer"] if model.is_adapter else [f"{first}, AutoTokenizer"]),
        "",
        second,
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(repo_id)}{_trust(model)})",
        "",
        f"question = {_quoted(_question({name: _ITEMS.get(name) for name in model.coefficients.specialists}))}",
        *(['messages = [{"role": "user", "content": question}]'] if chat else []),
        f'inputs = {inputs if chat else "tokenizer(question, "}return_tensors="pt"' + ("\n)" if chat else ")"),
        "outputs = model.generate(**inputs, max_new_tokens=64)",
        f"print(tokenizer.decode({_NEW_TOKENS}))",
    ]


_NEW_TOKENS = 'outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True'


def _multimodal_program(model: MergedModel, repo_id: str, first: str, second: str) -> list[str]:
    items = {name: _item(name, settings) for name, settings in model.modalities.items()}
    shown = {name: item for name, item in items.items() if item}
    if has_chat_template(model):
        inputs = [
            "content = [",
            *(f'    {{"type": {_quoted(name)}, {_quoted(name)}: {_quoted(item)}}},' for name, item in shown.items()),
            '    {"type": "text", "text": "\\nWhat do you know about this?"},',
            "]",
            'messages = [{"role": "user", "content": content}]',
            "inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)",
        ]
    else:
        placeholders = {name: str(model.modalities[name].get("placeholder")) for name in shown}
        inputs = [
            "inputs = processor(",
            f"    text={_quoted(_question(placeholders))},",
            *(f"    {name}=[{_quoted(item)}]," for name, item in shown.items()),
            ")",
        ]
    generate = "outputs = model.generate(**inputs, max_new_tokens=64)"
    return [first, "", second, "", *inputs, generate, f"print(processor.tokenizer.decode({_NEW_TOKENS}))"]


def _item(name: str, settings: Mapping[str, object]) -> str | None:
    """An item that the encoder of a modality takes; None for encoders that need files or packages of their own."""
    kind = str(settings.get("kind"))
    return _ITEMS.get(name) if kind == "text" else _ITEM_OF_KIND.get(kind)


def _question(items: Mapping[str, str | None]) -> str:
    lines = [f"{name.replace('_', ' ').capitalize()}: {item}" for name, item in items.items() if item]
    return "\n".join([*lines, "What do you know about this?"] if lines else ["What can you tell me?"])


def has_chat_template(model: MergedModel) -> bool:
    """Whether prompts are conversations."""
    if (model.folder / "chat_template.jinja").exists():
        return True
    file = model.folder / "tokenizer_config.json"
    return file.exists() and '"chat_template"' in file.read_text(encoding="utf-8", errors="replace")


def _quoted(text: str | None) -> str:
    """A Python string in double quotes, as people write them."""
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'

"""Probe inputs: every modality's mask marks its item's tokens, and nothing else."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from esmerge.errors import InputError
from esmerge.probe import batched, read_items, text_probe, tokenize

TEMPLATE = "Molecule: {molecule}\nProtein: {protein}"
BEFORE = "<|system|>Answer about the molecule and the protein.\n<|user|>\n"


def byte_tokenizer(chat_template, merges=()):
    """A tokenizer that makes every byte a token, but for the pairs to merge."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat_template)


@pytest.fixture(scope="module")
def bytewise(tokenizer):
    """Every byte is a token, so that masks can be checked to the character."""
    return byte_tokenizer(tokenizer.chat_template)


def located(tokenizer, template, items, chat_template=None):
    """The text before each item and the item itself, as the masks have them."""
    [(ids, masks)] = tokenize(tokenizer, [template], [items], chat_template)
    found = {}
    for name, mask in masks.items():
        first, last = mask.nonzero().flatten()[[0, -1]].tolist()
        assert mask[first : last + 1].all(), f"the mask of {name} has a gap"
        found[name] = tokenizer.decode(ids[:first]), tokenizer.decode(ids[mask])
    return found


@pytest.mark.parametrize(
    ("template", "items"),
    [
        (TEMPLATE, {"molecule": "CCO", "protein": "MKT"}),
        (TEMPLATE, {"molecule": "C", "protein": "CCC"}),
        (TEMPLATE, {"molecule": "CCC", "protein": "C"}),
        (TEMPLATE, {"molecule": "CO", "protein": "CO"}),
        (TEMPLATE, {"molecule": "Protein: MKT", "protein": "Molecule"}),
        (TEMPLATE, {"molecule": "user", "protein": "Answer about the molecule"}),
        (TEMPLATE, {"molecule": "{protein}", "protein": "{{}}"}),
        (TEMPLATE, {"molecule": "éé→ü", "protein": "é"}),
        ("{protein}{molecule}", {"molecule": "C", "protein": "CC"}),
        ("{{{molecule}}} {protein}?", {"molecule": "C", "protein": "D"}),
        ("  {molecule} and {protein}  \n", {"molecule": "C", "protein": "D"}),
        ("{molecule}{protein}", {"molecule": "Answer", "protein": " about"}),
        ("{molecule}{protein}", {"molecule": "assis", "protein": "tant"}),
    ],
    ids=[
        "plain",
        "first item inside the second",
        "second item inside the first",
        "equal items",
        "items like the template",
        "items like the chat template",
        "items with braces",
        "several bytes per character",
        "items side by side",
        "template with braces",
        "outer white space",
        "prompt that is also in the system turn",
        "prompt that is also in the generation prompt",
    ],
)
def test_masks_mark_the_items_to_the_character(bytewise, template, items):
    found = located(bytewise, template, items)
    for name, item in items.items():
        before = template.lstrip().partition(f"{{{name}}}")[0] + "{}"
        assert found[name] == (BEFORE + before.format("", **items), item)


def test_masks_take_tokens_that_overlap_the_item(tokenizer):
    """A token that joins the space before an item to it belongs to the item."""
    joining = byte_tokenizer(tokenizer.chat_template, merges=[("Ġ", "C"), ("M", "K")])
    found = located(joining, TEMPLATE, {"molecule": "CCO", "protein": "MKT"})
    assert found["molecule"] == (BEFORE + "Molecule:", " CCO")
    assert found["protein"] == (BEFORE + "Molecule: CCO\nProtein: ", "MKT")


def test_prompt_ends_with_the_last_item(bytewise):
    question, items = TEMPLATE + ". Is it toxic?", [{"molecule": "CCO", "protein": "MKT"}]
    [(ids, masks)] = tokenize(bytewise, [question], items)
    assert bytewise.decode(ids) == BEFORE + "Molecule: CCO\nProtein: MKT"
    [(longer, wider)] = tokenize(bytewise, [question], items, keep_end=True)
    after = bytewise.decode(longer).removeprefix(BEFORE + "Molecule: CCO\nProtein: MKT")
    assert after.startswith(". Is it toxic?")
    for name, mask in masks.items():
        assert len(wider[name]) == len(longer)
        assert torch.equal(wider[name].nonzero(), mask.nonzero())


def test_chat_template_in_place_of_the_tokenizers(bytewise):
    found = located(bytewise, TEMPLATE, {"molecule": "C", "protein": "D"}, "[INST]{{ messages[0]['content'] }}[/INST]")
    assert found["molecule"] == ("[INST]Molecule: ", "C")


def test_prompts_as_they_are(bytewise):
    """Like an evaluation without chat template: with the beginning that the tokenizer adds, without the end."""
    items = {"molecule": "CCO", "protein": "MKT"}
    assert located(byte_tokenizer(None), TEMPLATE, items, "none") == {
        "molecule": ("Molecule: ", "CCO"),
        "protein": ("Molecule: CCO\nProtein: ", "MKT"),
    }
    own = byte_tokenizer(bytewise.chat_template)
    own.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ends = [("<s>", own.bos_token_id), ("</s>", own.eos_token_id)]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    [(ids, masks)] = tokenize(own, [TEMPLATE + "\n?"], [items], "none", keep_end=True)
    assert own.decode(ids) == "<s>Molecule: CCO\nProtein: MKT\n?"
    assert [own.decode(ids[mask]) for mask in masks.values()] == ["CCO", "MKT"]


def test_tokenizer_without_chat_template_is_refused():
    with pytest.raises(InputError, match=r"no chat template: set probe\.chat_template"):
        tokenize(byte_tokenizer(None), [TEMPLATE], [{"molecule": "C", "protein": "D"}])


def test_chat_template_that_changes_the_prompt_is_refused(bytewise):
    with pytest.raises(InputError, match="changes the prompt"):
        located(bytewise, TEMPLATE, {"molecule": "C", "protein": "D"}, "{{ messages[0]['content'] | lower }}")


@pytest.mark.parametrize("padding", ["", "{# " + "a remark " * 40 + "#}"], ids=["short", "long"])
def test_chat_template_inline_or_from_a_file(recipe, merge, tmp_path, padding):
    template = padding + "{{ messages[0]['content'] }}"
    (tmp_path / "chat.jinja").write_text(template)
    recipe["coefficients"]["granularity"] = "layer"
    distances = {}
    for name, chat_template in {"own": None, "inline": template, "file": str(tmp_path / "chat.jinja")}.items():
        recipe["probe"]["chat_template"] = chat_template
        distances[name] = load_file(merge(recipe, name) / "coefficients.safetensors")["distances"]
    assert torch.equal(distances["inline"], distances["file"])
    assert not torch.equal(distances["inline"], distances["own"])


def test_batches_are_left_padded(bytewise):
    data = {"molecule": ["C", "CCCC", "CC"], "protein": ["MKT", "M", "MKTAYI"]}
    probe = text_probe(bytewise, [TEMPLATE], data, lambda ids: ids[..., None].float(), batch_size=2)
    rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    prompts = tokenize(bytewise, [TEMPLATE], rows)
    assert [len(batch.attention_mask) for batch in probe.batches] == [2, 1]
    assert probe.modalities == ("molecule", "protein")
    padded = [
        (embeds, attention, masks)
        for batch in probe.batches
        for embeds, attention, masks in zip(
            batch.inputs_embeds, batch.attention_mask, batch.masks.transpose(0, 1), strict=True
        )
    ]
    for (embeds, attention, masks), (ids, expected) in zip(padded, prompts, strict=True):
        padding = len(attention) - len(ids)
        assert attention.tolist() == [0] * padding + [1] * len(ids)
        assert embeds[padding:, 0].tolist() == ids.tolist()
        for mask, modality in zip(masks, probe.modalities, strict=True):
            assert mask.tolist() == [False] * padding + expected[modality].tolist()
    assert probe.batches[1].attention_mask.all()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_padding_does_not_change_the_embeddings(recipe, merge, batch_size):
    recipe["coefficients"]["granularity"] = "layer"
    expected = load_file(merge(recipe, "two") / "coefficients.safetensors")["distances"]
    recipe["probe"]["batch_size"] = batch_size
    distances = load_file(merge(recipe) / "coefficients.safetensors")["distances"]
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=0)


def test_ready_tensors_are_cut_to_what_counts():
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    masks = {"a": torch.zeros(3, 6, dtype=torch.bool), "b": torch.zeros(3, 6, dtype=torch.bool)}
    masks["a"][:, 3] = masks["b"][:, 4] = True
    masks["b"][:, 0] = True  # padding is no one's modality
    embeds = torch.randn(3, 6, 2)
    probe = batched(embeds, attention, masks, 2, "the probe")
    assert probe.size == 3
    assert torch.equal(probe.batches[0].inputs_embeds, embeds[:2, 1:5])
    assert torch.equal(probe.batches[1].inputs_embeds, embeds[2:, 3:5])
    assert probe.batches[0].masks[1].tolist() == [[False, False, False, True]] * 2


def test_items_are_the_lines_that_are_not_empty(tmp_path):
    (tmp_path / "items.txt").write_text("CCO\n\n  c1ccccc1  \r\nCN\nCC\n")
    assert read_items(tmp_path / "items.txt", 3, "molecule") == ["CCO", "c1ccccc1", "CN"]

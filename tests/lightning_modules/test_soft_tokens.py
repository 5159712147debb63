"""Prompts with encoded items in shared-prefix batches: as the multimodal model alone computes them."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from esmerge.mllm import MllmProcessor
from esmerge.mllm.loading import assemble
from esmerge.modalities import modality_from_settings
from lightning_modules.data import TokenizedExample, answer_loader, collate_answers
from lightning_modules.finetuning import answer_loss
from lightning_modules.likelihood import answer_log_likelihoods
from lightning_modules.shared_prefix import last_logits, share_prefix
from lightning_modules.soft_tokens import FIRST_SOFT_ID, ItemFeatures, WithSoftIds, soft_ids, soft_token_table

# Any number of items of any modality, in any order; some items stand in several prompts, one at their beginning.
PROMPTS = [
    ("<mol> is a drug", {"molecule": ["CCO"]}),
    ("<mol> is a drug, <protein> its target", {"molecule": ["CCO"], "protein": ["MKTAYIAK"]}),
    ("<mol> is a drug, as <mol> is: <protein>", {"molecule": ["CCO", "c1ccccc1"], "protein": ["GS"]}),
    ("<mol> <mol> <protein> <protein>", {"molecule": ["CCO", "CCO"], "protein": ["GS", "MKTAYIAK"]}),
    ("<protein>", {"protein": ["MALWMRLLPLACDEFGHIKL"]}),
    ("No items.", {}),
]


@pytest.fixture(scope="module")
def multimodal(llama, modality_settings):
    """A tiny model with two encoders in float32, and its processor."""
    torch.manual_seed(0)
    modalities = {name: modality_from_settings(modality_settings[name], name) for name in ("molecule", "protein")}
    llm = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32, attn_implementation="eager")
    processor = MllmProcessor(AutoTokenizer.from_pretrained(llama / "base"), modalities)
    encoders = {name: modality.build(32) for name, modality in modalities.items()}
    return assemble(llm, processor, encoders).eval(), processor


def as_ids(processor, prompts):
    """Token ids with one placeholder for each item, and the items."""
    return [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in prompts], [
        items for _, items in prompts
    ]


@torch.no_grad()
def alone(model, processor, text, items):
    """Last logits by the processor and the model, without anything of this package."""
    given = {name: [values] for name, values in items.items()}
    return model(**processor(text=[text], add_special_tokens=False, **given)).logits[0, -1]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [3, 0], [1, 0, 2], [4], [5, 4]])
def test_logits_are_those_of_the_model_alone_whatever_the_batch(multimodal, rows):
    model, processor = multimodal
    prompts = [PROMPTS[row] for row in rows]
    ids, features = soft_ids(*as_ids(processor, prompts), ItemFeatures(processor))
    with torch.no_grad():
        reader = WithSoftIds(model, soft_token_table(model, features))
        found = last_logits(reader, share_prefix(ids), last=1)[:, 0]
    expected = torch.stack([alone(model, processor, *prompt) for prompt in prompts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_prompts_share_the_items_that_they_begin_with(multimodal):
    _, processor = multimodal
    ids, _ = soft_ids(*as_ids(processor, PROMPTS[:3]), ItemFeatures(processor))
    prefix = share_prefix(ids).prefix_ids
    assert (prefix[:3] >= FIRST_SOFT_ID).all() and len(prefix) > 3


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_likelihoods_are_those_of_the_model_alone(multimodal, batch_size):
    model, processor = multimodal
    answers = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes", "No way")]
    ids, features = soft_ids(*as_ids(processor, PROMPTS), ItemFeatures(processor))
    with torch.no_grad():
        reader = WithSoftIds(model, soft_token_table(model, features))
        found = answer_log_likelihoods(reader, ids, answers, batch_size)
    for row, (text, items) in enumerate(PROMPTS):
        given = {name: [values] for name, values in items.items()}
        inputs = processor(text=[text], add_special_tokens=False, **given)
        inputs.pop("attention_mask")
        prompt = inputs.pop("input_ids")
        for column, answer in enumerate(answers):
            sequence = torch.cat([prompt, torch.tensor([answer])], dim=1)
            with torch.no_grad():
                logits = model(input_ids=sequence, **inputs).logits[0, prompt.shape[1] - 1 : -1]
            expected = logits.log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
            torch.testing.assert_close(found[row, column], expected, rtol=1e-5, atol=1e-5)


def test_every_item_is_encoded_once(multimodal):
    model, processor = multimodal
    ids, features = soft_ids(*as_ids(processor, PROMPTS), ItemFeatures(processor))
    assert {name: len(next(iter(batch.values()))) for name, batch in features.items()} == {"molecule": 2, "protein": 3}
    table = soft_token_table(model, features)
    used = {token for row in ids for token in row if token >= FIRST_SOFT_ID}
    assert used == set(range(FIRST_SOFT_ID, FIRST_SOFT_ID + len(table)))


def test_features_are_made_once(multimodal):
    _, processor = multimodal
    features = ItemFeatures(processor)
    first = features.of("molecule", "CCO")
    assert features.of("molecule", "CCO") is first


@pytest.mark.parametrize("items", [{}, {"molecule": ["CCO"]}, {"molecule": ["CCO"] * 3}])
def test_as_many_items_as_placeholders(multimodal, items):
    _, processor = multimodal
    ids, _ = as_ids(processor, [("<mol> and <mol>", {})])
    with pytest.raises(ValueError, match=r"2 placeholders for \d items of molecule"):
        soft_ids(ids, [items], ItemFeatures(processor))


def examples_of(processor, answers=("Yes", "No")):
    ids, items = as_ids(processor, PROMPTS)
    choices = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    return [
        TokenizedExample(prompt, choices[row % len(choices)], own)
        for row, (prompt, own) in enumerate(zip(ids, items, strict=True))
    ]


def test_loss_and_gradients_are_those_of_the_model_alone(multimodal):
    """Of the LLM's and both encoders' parameters."""
    model, processor = multimodal
    examples = examples_of(processor)
    model.zero_grad()
    answer_loss(model, collate_answers(examples, ItemFeatures(processor))).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for (text, items), example in zip(PROMPTS, examples, strict=True):
        given = {name: [values] for name, values in items.items()}
        inputs = processor(text=[text], add_special_tokens=False, **given)
        prompt, answer = inputs.pop("input_ids"), torch.tensor(example.answer_ids)
        inputs.pop("attention_mask")
        logits = model(input_ids=torch.cat([prompt, answer[None, :-1]], dim=1), **inputs).logits[0, -len(answer) :]
        losses.append(cross_entropy(logits, answer, reduction="sum"))
    (sum(losses) / sum(len(example.answer_ids) for example in examples)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert any(name.startswith("encoders.molecule.") for name in found)
    assert any(name.startswith("encoders.protein.encoder.") for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_batches_hold_prompts_of_one_length_with_their_soft_tokens(multimodal):
    """The text of all prompts is the same; their proteins differ in length."""
    _, processor = multimodal
    lengths = [1 + number % 6 for number in range(32)]
    ids = processor.tokenizer("a <protein> b", add_special_tokens=False)["input_ids"]
    proteins = ["".join(random.Random(n).choices("ACDEFGHIKL", k=length)) for n, length in enumerate(lengths)]
    examples = [TokenizedExample(ids, [5], {"protein": [protein]}) for protein in proteins]
    loader = answer_loader(examples, batch_size=4, seed=0, processor=processor)
    paddings = [int((batch.tokens.attention_mask == 0).sum()) for batch in loader]
    assert sum(paddings) <= 3 * 5, "only where a batch has proteins of two lengths"
    assert sum(len(batch.labels) for batch in loader) == 32

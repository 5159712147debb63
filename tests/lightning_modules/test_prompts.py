import copy

import pytest
from transformers import LlamaTokenizer

from esmerge.mllm import MllmProcessor
from esmerge.modalities import modality_from_settings
from lightning_modules.prompts import ChatFormat, PromptWriter
from lightning_modules.samples import Item, Sample, Turn

SAMPLE = Sample(
    "1",
    (
        Turn("system", ("Be brief.",)),
        Turn("user", ("Molecule: ", Item("molecule", "CCO"), "\nSoluble?")),
        Turn("assistant", ("Final answer: Yes",)),
        Turn("user", ("Molecule: ", Item("molecule", "CCC"), "\nSoluble?")),
    ),
    0,
    None,
)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
WORDS = ["Yes", "Ye", "No", "No?", "o?", "No:", "o:"]
QUESTION = "Molecule: CCO\nSoluble?"


@pytest.fixture
def writer(tokenizer):
    def make(template):
        return PromptWriter(MllmProcessor(tokenizer), ChatFormat(template))

    return make


def test_a_conversation_through_a_template(writer):
    prompt = writer(TEMPLATE).write(SAMPLE)
    assert prompt.text == (
        "[system]Be brief.[user]Molecule: CCO\nSoluble?[assistant]Final answer: Yes"
        "[user]Molecule: CCC\nSoluble?[assistant]"
    )
    assert prompt.items == {}


def test_the_system_prompt_goes_before_the_question_where_a_template_has_no_place_for_it(writer):
    text = writer(NO_SYSTEM).write(SAMPLE).text
    assert text.startswith("[user]Be brief.\n\nMolecule: CCO\nSoluble?[assistant]Final answer: Yes[user]")


def test_turns_without_a_template(writer):
    text = writer(None).write(SAMPLE).text
    assert text == f"Be brief.\n\n{QUESTION}\n\nFinal answer: Yes\n\nMolecule: CCC\nSoluble?"
    assert writer(None).write(SAMPLE, "Final answer: ").text == f"{text} Final answer:"


@pytest.mark.parametrize(
    ("template", "prefix", "expected"),
    [(TEMPLATE, "", "Yes"), (TEMPLATE, "Final answer: ", " Yes"), (None, "", " Yes"), (None, "Answer:\n", "\nYes")],
)
def test_where_an_answer_begins(writer, template, prefix, expected):
    assert writer(template).answer("Yes", prefix) == expected
    # Prompt and answer together read as they should.
    written = writer(template)
    whole = written.write(SAMPLE, prefix).text + written.answer("Yes", prefix)
    assert whole.endswith(f"{prefix}Yes" if prefix else expected)


def test_answers_are_the_tokens_that_follow_in_the_whole_text():
    """A SentencePiece tokenizer begins a text with a blank of its own, which no assistant's turn begins with."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *dict.fromkeys("".join(WORDS)), *WORDS, *(f"▁{word}" for word in WORDS)]
    merges = [
        (left, right)
        for whole in pieces
        for place in range(1, len(whole))
        if (left := whole[:place]) in pieces and (right := whole[place:]) in pieces
    ]
    tokenizer = LlamaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[user]", "[assistant]"]})
    for template, prefix, expected in ((TEMPLATE, "", "Yes"), (None, "", "▁Yes"), (TEMPLATE, "No: ", "▁Yes")):
        writer = PromptWriter(MllmProcessor(tokenizer), ChatFormat(template))
        prompt = writer.write(Sample("1", (Turn("user", ("No?",)),), 0, None), prefix)
        found = writer.tokenize_answers(["Yes", "No"], prefix, prompt.text)[0]
        whole = tokenizer(prompt.text + writer.answer("Yes", prefix), add_special_tokens=template is None)["input_ids"]
        assert writer.tokenize([prompt])[0] + found == whole
        assert tokenizer.convert_ids_to_tokens(found)[0] == expected


def test_templates_are_told_the_same_date_every_day(writer):
    dated = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    assert writer(dated).write(SAMPLE).text.startswith("26 Jul 2024[system]")


def test_parts_of_a_model_that_reads_molecules(tokenizer, modality_settings):
    modalities = {name: modality_from_settings(settings, name) for name, settings in modality_settings.items()}
    processor = MllmProcessor(copy.deepcopy(tokenizer), modalities)
    prompt = PromptWriter(processor, ChatFormat(TEMPLATE)).write(SAMPLE)
    assert prompt.items == {"molecule": ["CCO", "CCC"]}
    assert prompt.text.count("<mol>") == 2
    assert "CCO" not in prompt.text
    cell = Sample("2", (Turn("user", (Item("cell", "CD3D, CD8A"),)),), 0, None)
    assert PromptWriter(processor, ChatFormat(TEMPLATE)).write(cell).text == "[user]CD3D, CD8A[assistant]"

"""The schema, and how answers are read in generated text."""

import pytest

from benchmarks.tasks.task import Task


@pytest.fixture
def parse(content):
    """A function that reads an answer for a task with changed fields, and returns the choice."""

    def parse(generated, **fields):
        task = Task.model_validate({**content, "labels": {}, **fields})
        found = task.parse(generated)
        return None if found is None else task.choices[found]

    return parse


INHIBITION = {
    "choices": ["Inhibits", "Does not inhibit"],
    "answer_prefix": "Final answer: ",
    "spellings": {"not inhibit": "Does not inhibit", "inhibit": "Inhibits"},
}


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("Final answer: Inhibits", "Inhibits"),
        ("It binds the heme. **Final Answer:** Does not inhibit.", "Does not inhibit"),
        ("final answer is: it does NOT inhibit it", "Does not inhibit"),
        ("Final answer:\nInhibits\nExample 6: Final answer: Does not inhibit", "Inhibits"),
        ("The molecule inhibits the protein.", "Inhibits"),
        ("I cannot tell.", None),
        ("Final answer: unclear, although many like it inhibit.\nInhibits", "Inhibits"),
        ("I will give my final answer as inhibits or not.\n\nFinal answer: Does not inhibit", "Does not inhibit"),
        (
            "Final answer: Inhibits\nNo, the ring is too large.\n- **Final answer:** Does not inhibit",
            "Does not inhibit",
        ),
        ("Final answer: Inhibits\nFinal answer:", "Inhibits"),
        ("Inhibits, I thought. Final answer: unclear", None),
        ("", None),
    ],
)
def test_answers_with_spellings(parse, generated, expected):
    assert parse(generated, **INHIBITION) == expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("Yes", "Yes"),
        (" yes.", "Yes"),
        ("No, it does not. Yes is wrong.", "No"),
        ("The answer is no", "No"),
        ("Either yes or no", None),
        ("Nothing", None),
        ("**No**", "No"),
    ],
)
def test_answers_without_spellings(parse, generated, expected):
    assert parse(generated) == expected


def test_the_longer_of_two_choices_counts(parse):
    choices = {"choices": ["Cytoplasm", "Nucleus", "Both nucleus and cytoplasm"]}
    assert parse("Both nucleus and cytoplasm", **choices) == "Both nucleus and cytoplasm"
    assert parse("It is in the nucleus.", **choices) == "Nucleus"


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", True])
def test_labels_are_found_however_they_are_written(content, label):
    task = Task.model_validate({**content, "labels": {label: "Yes", 0: "No"}})
    expected = "true" if label is True else "1"
    assert task.choice_of_label[expected] == 0


def test_a_task_cannot_be_changed(content):
    with pytest.raises(ValueError, match="frozen"):
        Task.model_validate(content).version = 2

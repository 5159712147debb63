"""The schema of a task: where its data is, what is asked about each row, which answers there are."""

import re
import string
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

Metric = Literal["accuracy", "macro_f1", "mcc", "auroc", "average_precision", "invalid_rate"]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]

EXAMPLES = "examples"  # the placeholder for in-context examples inside the user turn
ANSWER = "answer"  # the placeholder for the answer of an in-context example


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where the data is: a data set on the Hub, files of one's own, or a loader of the testbed.

    Relative paths of files start from the task's own file, for a task of one's own; then from the folder in the
    environment variable ESMERGE_DATA, or `data` in the current folder. A folder there that is named like the Hub data
    set (`user/name`) is used instead of the Hub.

    Attributes:
        hub: data set on the Hub, `user/name` or `user/name@revision`.
        subset: of the Hub data set, where it has several configurations.
        path: a CSV, TSV, JSON lines or Parquet file, or a folder: one that `datasets` saved, or one laid out as on the
            Hub. With `hub`, a file in the data set.
        files: such files, one per split.
        split_file: JSON with the numbers, from 0, of the rows of each split, for a `path` without splits.
        testbed: name of a loader in `benchmarks/testbed`.
        packages: the packages of `benchmarks/testbed/packages.txt` that it fetches from PyPI.
        obtain: how to get the files, for people: a sentence without its full stop.
        rows: how many rows there are in each split, or in `all`, where that is known.
    """

    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")] | None = None
    subset: Text | None = None
    path: Text | None = None
    files: Annotated[dict[str, Text], Field(min_length=1)] | None = None
    split_file: Text | None = None
    testbed: Text | None = None
    packages: tuple[Text, ...] = ()
    obtain: Text | None = None
    rows: dict[str, Count] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.path is not None and self.files is not None:
            raise ValueError("path and files exclude each other")
        if self.testbed is not None and (self.hub or self.path or self.files):
            raise ValueError("a testbed loader needs no hub, path or files")
        if not (self.testbed or self.hub or self.path or self.files):
            raise ValueError("give hub, path, files or testbed")
        if self.subset is not None and (self.hub is None or self.path or self.files):
            raise ValueError("subset belongs to a hub data set without path or files")
        if self.packages and self.testbed is None:
            raise ValueError("packages belong to a testbed loader")
        if self.split_file is not None and self.path is None:
            raise ValueError("split_file belongs to a path")
        return self


class Split(_Strict):
    """Which rows are asked about, and which are there to learn from.

    Attributes:
        evaluated: name of the split whose rows are asked about.
        training: name of the split that in-context examples are taken from.
        by: for data without splits: a placeholder, all rows with the same value of which share a split; or
            `scaffold`, for the Murcko scaffold of `molecule`. A hash of the value decides; the splits are then named
            train, validation and test.
        validation_share: of the groups, with `by`.
        test_share: of the groups, with `by`.
        distinct: a placeholder: rows of other splits whose value stands in the evaluated split too are left out, and
            then those of the training split whose value stands in any other. Spellings do not count: molecules are
            compared as RDKit writes them, proteins in upper case, cells by their set of genes.
    """

    evaluated: Text = "test"
    training: Text = "train"
    by: Text | None = None
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    distinct: Text | None = None

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self


class ExampleSelection(_Strict):
    """In-context examples: the rows of the training split that are most like the one asked about, the most alike first.

    A row with the very items of the one asked about is never among them (molecules in any spelling, and two items of
    one modality in either order).

    Similarity is Tanimoto on Morgan fingerprints (radius 2, 2048 bits) of molecules, Jaccard of gene sets of cells,
    and Jaccard of the sets of three consecutive residues of proteins; equal ones stay in the order of the data.

    Attributes:
        count: of examples; fewer where the training split is smaller.
        rank_by: placeholders whose mean similarity ranks the examples.
        same_first: a placeholder: rows with the same value as the row asked about come before all others. They are
            ranked where there are more than `count`, and filled up by the similarity of this value where there are
            fewer.
        template: one example as it stands where the prompt has {examples}, with {answer}; without it, examples are
            turns of the conversation before the question.
    """

    count: Count = 5
    rank_by: Annotated[tuple[str, ...], Field(min_length=1)]
    same_first: str | None = None
    template: Text | None = None


class Baseline(_Strict):
    """A published result.

    Attributes:
        model: what it was obtained with.
        metric: which of the metrics.
        value: the score, accuracies and the like as a share of 1.
        source: where it was published.
    """

    model: Text
    metric: Metric
    value: float
    source: Text


class Task(_Strict):
    """A question about every row of a data set, with a fixed choice of answers.

    Attributes:
        name: letters, digits and underscores.
        version: goes up whenever scores are no longer comparable with those of before.
        title: for tables and cards; by default the name.
        description: what is asked and how the splits were made.
        source: where the data is.
        columns: placeholder of a prompt -> column of the data.
        constants: placeholder of a prompt -> its value in every row.
        answer: the column with the answers.
        id: a column with an identifier of each row; without it, rows are numbered within their split.
        group: a column that names relatives, e.g. the scaffold; for statistics.
        split: which rows are evaluated.
        modalities: the placeholders that stand for an item of a modality rather than for text, also with a number
            (`molecule_2`).
        system: the system prompt.
        prompt: the user turn, with placeholders.
        answer_prefix: what the assistant says before its answer, e.g. "Final answer: ". The likelihood of choices is
            taken behind it, and generated answers are read behind it.
        choices: the answers as the model is to say them. Of two, the first is the positive one.
        labels: value in the data -> choice; the choices themselves need no label.
        spellings: text in a generated answer -> the choice that it means, in the order in which they are looked for;
            without them, a choice must be mentioned as it is, and no other.
        examples: in-context examples.
        metrics: what is reported.
        max_new_tokens: of a generated answer.
        citation: of the data.
        licence: of the data, as an SPDX or Hub identifier where there is one.
        dataset: its id on the Hub, for cards.
        benchmark: the id of a benchmark on the Hub that the task belongs to.
        baselines: published results.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    version: Count = 1
    title: str = ""
    description: str = ""
    source: Source
    columns: Annotated[dict[str, Text], Field(min_length=1)]
    constants: dict[str, Text] = {}
    answer: Text
    id: Text | None = None
    group: Text | None = None
    split: Split = Split()
    modalities: tuple[Text, ...] = ("molecule", "protein", "cell")
    system: Text | None = None
    prompt: Text
    answer_prefix: str = ""
    choices: Annotated[tuple[Text, ...], Field(min_length=2)]
    labels: dict[str, str] = {}
    spellings: dict[Text, str] = {}
    examples: ExampleSelection | None = None
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("accuracy",)
    max_new_tokens: Count = 512
    citation: Text | None = None
    licence: Text | None = None
    dataset: Text | None = None
    benchmark: Text | None = None
    baselines: tuple[Baseline, ...] = ()

    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """What relative paths start from; None for the tasks that come with esmerge."""
        return self._folder

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        # A label in the data is often a number, which YAML reads as one.
        if not isinstance(value, dict):
            return value
        labels = [canonical_label(label) for label in value]
        if repeated := [label for index, label in enumerate(labels) if label in labels[:index]]:
            raise ValueError(f"{repeated[0]} stands there twice")
        return dict(zip(labels, value.values(), strict=True))

    @field_validator("choices")
    @classmethod
    def _distinct_choices(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        plain = [_plain(choice) for choice in choices]
        for index, choice in enumerate(plain):
            if not choice:
                raise ValueError(f"{choices[index]!r} is no answer that could be read")
            if choice in plain[:index]:
                raise ValueError(f"{choices[index]!r} stands there twice")
        return choices

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field, names in (("columns", self.columns), ("constants", self.constants)):
            for name in names:
                if name in (EXAMPLES, ANSWER) or not name.isidentifier():
                    raise ValueError(f"{field}.{name} is no name for a placeholder: use letters, digits, underscores")
                if field == "constants" and name in self.columns:
                    raise ValueError(f"constants.{name} is among the columns too")
        self._check_placeholders("prompt", self.prompt, {EXAMPLES} if self._examples_inside else set())
        if self.examples is not None:
            self._check_examples(self.examples)
        for field, mapping in (("labels", self.labels), ("spellings", self.spellings)):
            for text, choice in mapping.items():
                if choice not in self.choices:
                    raise ValueError(f"{field}.{text} is {choice!r}, which is none of the choices {list(self.choices)}")
        for name, value in (("split.by", self.split.by), ("split.distinct", self.split.distinct)):
            if value is not None and value not in self.columns and not (name == "split.by" and value == "scaffold"):
                raise ValueError(f"{name} is {value!r}, which is none of the columns {list(self.columns)}")
        if self.split.by == "scaffold" and "molecule" not in self.columns:
            raise ValueError("split.by is 'scaffold', which needs a column molecule")
        if len(self.choices) != 2 and (ranked := {"auroc", "average_precision"} & set(self.metrics)):
            raise ValueError(f"metrics: {sorted(ranked)[0]} is for two choices, there are {len(self.choices)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics: one of them stands there twice")
        return self

    @property
    def _examples_inside(self) -> bool:
        return self.examples is not None and self.examples.template is not None

    def _check_examples(self, examples: ExampleSelection) -> None:
        for name in (*examples.rank_by, *filter(None, [examples.same_first])):
            if name not in self.columns:
                raise ValueError(f"examples: {name!r} is none of the columns {list(self.columns)}")
            if self.modality(name) not in SIMILARITIES:
                raise ValueError(f"examples: there is no similarity of {name}, only of {', '.join(SIMILARITIES)}")
        if self.split.training == self.split.evaluated:
            raise ValueError("examples: split.training and split.evaluated must differ, or answers leak")
        if examples.template is not None:
            self._check_placeholders("examples.template", examples.template, {ANSWER})
            if f"{{{EXAMPLES}}}" not in self.prompt:
                raise ValueError("prompt has no {examples}, where examples.template is to stand")

    def _check_placeholders(self, field: str, template: str, special: set[str]) -> None:
        try:
            names = [name for _, name in split_template(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"{field}: {error}; write {{{{ and }}}} for braces") from error
        for name in names:
            if name not in {*self.columns, *self.constants, *special}:
                known = ", ".join(self.columns)
                raise ValueError(f"{field}: the placeholder {{{name}}} has no column; columns names {known}")
        if not any(name in self.columns for name in names):
            raise ValueError(f"{field} has no placeholder of a column, so every row would be asked the same")

    def modality(self, placeholder: str) -> str | None:
        """The modality that a placeholder stands for an item of; None for text."""
        name = re.sub(r"_\d+$", "", placeholder)
        return name if name in self.modalities else None

    @cached_property
    def choice_of_label(self) -> dict[str, int]:
        """Value in the data, as `canonical_label` writes it -> index into `choices`."""
        labels = {canonical_label(choice): choice for choice in self.choices} | self.labels
        return {label: self.choices.index(choice) for label, choice in labels.items()}

    def parse(self, generated: str) -> int | None:
        """The choice that a generated text gives as its answer, as an index; None if there is none, or no single one.

        The answer is the rest of the line behind the last `answer_prefix` that begins a line and has its colon: models
        that reason speak of their answer before they give it. Failing that, it is what is behind the first one in the
        text (the colon may be missing, or be "is"), or the whole text where that does not occur; upper case, line
        breaks inside the prefix and markup do not count. Of `spellings`, the first that is part of the answer counts.
        Without them, the answer begins with a choice, or mentions exactly one.
        """
        answer = self._answer_in(_plain(generated))
        if self.spellings:
            found = (choice for text, choice in self.spellings.items() if _plain(text) in answer)
            choice = next(found, None)
            return None if choice is None else self.choices.index(choice)
        plain = [_plain(choice) for choice in self.choices]
        # The longest first: "not a substrate" mentions "substrate" only as a part of itself.
        pattern = "|".join(re.escape(choice) for choice in sorted(plain, key=len, reverse=True))
        mentions = re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", answer)
        begins = bool(mentions) and re.sub(r"^\W+", "", answer).startswith(mentions[0])
        return plain.index(mentions[0]) if begins or len(set(mentions)) == 1 else None

    def _answer_in(self, text: str) -> str:
        prefix = _plain(self.answer_prefix).removesuffix(":").split()
        if not prefix:
            return text
        words = r"\s*".join(re.escape(word) for word in prefix)
        if at_start := re.findall(rf"^[^\w\n]*{words}\s*:\s*(.+)", text, re.MULTILINE):
            return str(at_start[-1])
        behind = re.search(rf"{words}(?:\s+is)?\s*:?\s*(.+)", text)
        return behind[1] if behind else text


# What in-context examples can be ranked by.
SIMILARITIES = ("molecule", "protein", "cell")


def _plain(text: str) -> str:
    return re.sub(r"[*_`#]+", "", text).strip().casefold()


def canonical_label(value: Any) -> str:
    """A label as text: 1, 1.0 and "1" are the same; so are true and "True"."""
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())
    return text.lower() if text in ("True", "False") else text


def split_template(template: str) -> Iterator[tuple[str, str | None]]:
    """Text and the placeholder that follows it (None at the end), in order.

    Raises:
        ValueError: for unbalanced braces, or placeholders that are more than a name.
    """
    for text, name, specification, conversion in string.Formatter().parse(template):
        if name is not None and (not name.isidentifier() or specification or conversion):
            raise ValueError(f"{{{name}}} is no placeholder")
        yield text, name

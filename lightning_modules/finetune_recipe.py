"""What `esmerge finetune` is asked for: a YAML file, read strictly."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from esmerge.errors import InputError
from esmerge.yaml_files import first_error, read_mapping

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]

# What transformers' Trainer and others call them.
_SYNONYMS = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_grad_norm": "gradient_clip",
    "warmup_ratio": "warmup_share",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraRecipe(_Strict):
    """The adapter that is trained where the model has none yet.

    Attributes:
        rank: of its factors.
        alpha: its scaling is alpha / rank.
        dropout: on its input.
        targets: last names of the linear layers that get one, or `all-linear`.
    """

    rank: Count = 8
    alpha: Rate = 16
    dropout: Share = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class ValidationRecipe(_Strict):
    """On what training is judged.

    Attributes:
        split: of the tasks' data.
        samples: per task at most.
        per_epoch: how often in an epoch; checkpoints are written as often.
        patience: stop after so many judgements without a lower loss; None to train to the end.
    """

    split: str = "validation"
    samples: Count | None = 200
    per_epoch: Count = 1
    patience: Count | None = None


class FinetuningRecipe(_Strict):
    """Trains an adapter on the training data of tasks, all of them mixed.

    With a merged adapter as `model` this is the baseline "merging + fine-tuning", with the base "jointly trained LoRA".

    Attributes:
        model: folder or Hub id of what is trained on: an adapter goes on to be trained, any other model gets a new one.
        base: of an adapter; None for the one that it names.
        tasks: names, or paths of YAML files.
        samples: of the training split of each task at most.
        repeat: by a task's name, how often its samples come in an epoch, for tasks with few; once if not given.
        lora: the new adapter, for a model without one.
        train_encoders: whether encoders are trained along, without the dropout of their projectors; that of adapters
            is as `lora` or the adapter says.
        epochs: passes over the data.
        batch_size: prompts per device and step.
        learning_rate: its highest value.
        encoder_learning_rate: of encoders; None for the same.
        warmup_share: of the steps.
        weight_decay: of AdamW.
        gradient_clip: the largest norm of a gradient.
        precision: float32, or bfloat16 arithmetic with adapters in float32; `auto`: bfloat16 unless on a CPU.
        validation: None for none; the last weights are then the result instead of the best.
        chat_template: a file, or `none`; None for the tokenizer's own.
        as_text: modalities whose items are written as text.
        seed: of the new adapter, the order of the data, and dropout.
    """

    model: str
    base: str | None = None
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    samples: Count | None = None
    repeat: dict[str, Count] = {}
    lora: LoraRecipe = LoraRecipe()
    train_encoders: bool = False
    epochs: Count = 1
    batch_size: Count = 8
    learning_rate: Rate = 5e-4
    encoder_learning_rate: Rate | None = None
    warmup_share: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Rate = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validation: ValidationRecipe | None = ValidationRecipe()
    chat_template: str | None = None
    as_text: tuple[str, ...] = ()
    seed: int = 42

    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def folder(self) -> Path:
        """What relative paths start from."""
        return self._folder

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: one of them stands there twice")
        return self


def load_finetuning_recipe(file: Path) -> FinetuningRecipe:
    """The recipe in a YAML file; `InputError` in one sentence that names the field."""
    content = read_mapping(file, "recipe", list(FinetuningRecipe.model_fields))
    try:
        recipe = FinetuningRecipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"the recipe {file}: {first_error(error, FinetuningRecipe, _SYNONYMS)}") from error
    recipe._folder = file.parent
    return recipe

"""A model's tokenizer from its folder, with errors of one sentence."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmerge.errors import InputError, first_line
from esmerge.remote_code import FLAG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = "none"  # in place of a chat template: prompts as they are, with the beginning that a tokenizer adds

# What templates call for today's date, and the one that they tell: that of Llama's where there is no clock.
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_TOLD_DATE = date(2024, 7, 26)


def load_tokenizer(folder: Path, trust_remote_code: bool, what: str) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder.

    Args:
        folder: with its files.
        trust_remote_code: let code that comes with it run, if it needs some.
        what: whose tokenizer, for messages.

    Raises:
        InputError: if there is none that can be loaded, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library behind raises no other kind where it cannot read a file
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the tokenizer of {what} needs code of its own: read its *.py files, and if you trust "
                f"them, add {FLAG}."
            ) from error
        if not any(folder.glob("tokenizer*")):
            raise InputError(
                f"{folder} has no tokenizer: save it there with tokenizer.save_pretrained, or copy the files of that "
                "of its base."
            ) from error
        raise InputError(f"{folder}: the tokenizer of {what} cannot be loaded: {first_line(error)}.") from error
    return loaded


def apply_chat_template(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], template: str | None
) -> str:
    """The text of a conversation up to where the assistant's turn begins, the same on every day.

    Args:
        template: in place of the tokenizer's own.

    Raises:
        jinja2.TemplateError: and whatever else a template raises.
    """
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=_NOW.sub(
                lambda call: repr(_TOLD_DATE.strftime(call[2])), tokenizer.get_chat_template(template)
            ),
            add_generation_prompt=True,
            tokenize=False,
        )
    )


def without_added_end(ids: list[int], text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a text without the end that the tokenizer adds, as those of old LoRA adapters do.

    An end that the text itself has stays.
    """
    added = bool(ids) and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if added else ids

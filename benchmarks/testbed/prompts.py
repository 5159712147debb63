"""Questions and answers as token ids, through the model's own chat template."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from benchmarks.testbed.data import Example, Task
from esmerge.mllm import MllmProcessor
from esmerge.modalities.modality import with_encoder


def encode_prompt(processor: MllmProcessor, task: Task, example: Example) -> tuple[list[int], dict[str, list[str]]]:
    """One user turn, up to the point where the assistant's answer begins, and the items that an encoder is to read.

    The example's item is a placeholder where the processor knows an encoder for its modality, and text otherwise.
    """
    encoded = with_encoder(processor.modalities).get(task.modality)
    shown = example if encoded is None else replace(example, item=encoded.placeholder)
    turn = [{"role": "user", "content": task.prompt(shown)}]
    ids = processor.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"]), {} if encoded is None else {task.modality: [example.item]}


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The assistant's answer, without the end of its turn."""
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])

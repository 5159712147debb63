"""Questions and answers as token ids, through the model's own chat template."""

from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """One user turn, up to the point where the assistant's answer begins."""
    turn = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The assistant's answer, without the end of its turn."""
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])

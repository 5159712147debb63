"""One question about a molecule, a protein and a cell line in one prompt, to a merged model.

python -m benchmarks.testbed.ask MODEL [BASE]
"""

import argparse

import torch

from benchmarks.testbed.data import MODALITIES, load_task
from esmerge.mllm.loading import load_model

QUESTION = (
    "Does this molecule cross the blood-brain barrier, is this protein antimicrobial, and which tissue does this cell "
    "line come from?"
)


def ask(model: str, base: str | None = None) -> str:
    """What a merged model says, word for word the same each time.

    Args:
        model: folder or Hub id.
        base: of an adapter; None for the one that it names.
    """
    loaded, processor = load_model(model, base, dtype=torch.float32)
    content: list[dict[str, str]] = []
    for modality in MODALITIES:
        content += [
            {"type": "text", "text": f"{modality.capitalize()}: "},
            {"type": modality, modality: load_task(modality).examples["test"][0].item},
            {"type": "text", "text": "\n"},
        ]
    content.append({"type": "text", "text": QUESTION})
    turn = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)
    made = loaded.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer: str = processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def conversation(answer: str) -> str:
    """The prompt's items, the question, the answer and the truth, for people."""
    examples = {modality: load_task(modality).examples["test"][0] for modality in MODALITIES}
    items = "\n".join(f"  {modality.capitalize()}: {example.item}" for modality, example in examples.items())
    truth = ", ".join(f"{modality}: {example.answer}" for modality, example in examples.items())
    return f"One prompt with all three modalities:\n{items}\n  {QUESTION}\nMerged model: {answer}\nData: {truth}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("base", nargs="?")
    options = parser.parse_args()
    print(ask(options.model, options.base))


if __name__ == "__main__":
    main()

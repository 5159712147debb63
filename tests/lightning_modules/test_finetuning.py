import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from pytorch_lightning import Trainer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from esmerge.mllm import MllmProcessor
from esmerge.mllm.loading import assemble
from esmerge.modalities import modality_from_settings
from lightning_modules.data import TokenizedExample, answer_loader, collate_answers
from lightning_modules.finetuning import AnswerFinetuning, answer_loss, warmup_then_decay

# The answer repeats the token after the common beginning: learnt in a few steps.
EXAMPLES = [
    TokenizedExample([1, 2, 10 + index % 4, *range(20, 21 + index % 3)], [10 + index % 4, 5]) for index in range(48)
]


def with_adapter(model, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def fit(model, tmp_path, precision="32-true", data=None, encoder_learning_rate=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"enable_checkpointing": False, **options},
    )
    module = AnswerFinetuning(model, learning_rate=1e-2, encoder_learning_rate=encoder_learning_rate)
    trainer.fit(module, answer_loader(EXAMPLES, batch_size=8, seed=0) if data is None else data)
    return trainer, module


def loss_of(model):
    with torch.no_grad():
        return answer_loss(model, collate_answers(EXAMPLES)).item()


def test_loss_is_that_of_the_answers_in_full_sequences(tiny_llama):
    losses = []
    for example in EXAMPLES[:6]:
        sequence = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
        count = len(example.answer_ids)
        losses.append(cross_entropy(tiny_llama(sequence).logits[0, -count - 1 : -1], sequence[0, -count:]))
    loss = answer_loss(tiny_llama, collate_answers(EXAMPLES[:6]))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_an_adapter_lowers_the_loss_and_changes_nothing_else(tiny_llama, tmp_path, precision):
    before = copy.deepcopy(tiny_llama.state_dict())
    model = with_adapter(tiny_llama)
    start = loss_of(model)
    fit(model, tmp_path, precision)
    assert loss_of(model) < start / 2
    trained = model.unload().state_dict()
    assert trained.keys() == before.keys()
    assert all(torch.equal(trained[name], before[name]) for name in before)


def test_training_the_whole_model_lowers_the_loss(tiny_llama, tmp_path):
    start = loss_of(tiny_llama)
    fit(tiny_llama, tmp_path)
    assert loss_of(tiny_llama) < start / 2


def test_the_same_seed_gives_the_same_adapter_to_the_last_bit(tiny_llama, tmp_path):
    adapters = []
    for seed in (0, 0, 1):
        model = with_adapter(copy.deepcopy(tiny_llama), seed)
        fit(model, tmp_path, "bf16-mixed")
        adapters.append(get_peft_model_state_dict(model))
    first, same, other = adapters
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_checkpoint_holds_the_trained_parameters_and_restores_them(tiny_llama, tmp_path):
    base = copy.deepcopy(tiny_llama)
    trainer, module = fit(with_adapter(tiny_llama), tmp_path, enable_checkpointing=True)
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    assert all("lora_" in name for name in torch.load(file, weights_only=True)["state_dict"])
    restored = AnswerFinetuning.load_from_checkpoint(file, model=with_adapter(base, seed=9), weights_only=True)
    assert restored.learning_rate == 1e-2
    assert loss_of(restored.model) == pytest.approx(loss_of(module.model))


def test_learning_rate_rises_and_falls_in_straight_lines():
    factors = [warmup_then_decay(step, steps=10, warmup_steps=2) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[2:] == pytest.approx([1 - step / 8 for step in range(9)])


def test_encoders_are_trained_at_a_learning_rate_of_their_own(llama, modality_settings, tmp_path):
    modality = modality_from_settings(modality_settings["molecule"], "molecule")
    processor = MllmProcessor(AutoTokenizer.from_pretrained(llama / "base"), {"molecule": modality})
    ids = processor.tokenizer("<mol>", add_special_tokens=False)["input_ids"]
    examples = [TokenizedExample(ids, [5 + number % 2], {"molecule": ["CO"[number % 2]]}) for number in range(8)]
    for rate, trained in ((None, {"encoders", "language_model"}), (0.0, {"language_model"})):
        llm = with_adapter(AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32))
        model = assemble(llm, processor, {"molecule": modality.build(32)})
        before = copy.deepcopy(model.state_dict())
        fit(model, tmp_path, data=answer_loader(examples, 4, 0, processor), encoder_learning_rate=rate)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.split(".")[0] for name in changed} == trained
        assert all("lora_" in name for name in changed if name.startswith("language_model"))

import random

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lightning_modules import likelihood
from lightning_modules.likelihood import answer_log_likelihoods

ANSWERS = [[3], [4, 5], [4, 5, 6], [9, 8, 7, 6]]
# The windows are shorter than most prompts below.
MODELS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8}),
    # Layers that no mask reaches, recurrent states, and positions counted in the row.
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "gpt_neo": ("GPTNeoConfig", {"window_size": 6, "attention_types": [[["local", "global", "local"], 1]]}),
    "bloom": ("BloomConfig", {"n_layer": 3, "n_head": 4}),
    "mamba": ("MambaConfig", {}),
}


def make_prompts(common, count=9, longest=20):
    generator = random.Random(common)
    beginning = [generator.randrange(64) for _ in range(common)]
    return [beginning + [generator.randrange(64) for _ in range(generator.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def one_at_a_time(model, prompts, answers):
    """One full sequence per prompt and answer: no padding, no cache, nothing shared."""
    scores = torch.zeros(len(prompts), len(answers))
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            scores[row, column] = logits.log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
    return scores


@pytest.mark.parametrize("common", [0, 5])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_at_a_time(tiny_settings, name, attention, common):
    config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**tiny_settings, **settings)
    torch.manual_seed(0)
    if name in ("bloom", "mamba", "gpt_neo"):
        attention = None  # the only one that they have
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    prompts = make_prompts(common)
    scores = answer_log_likelihoods(model, prompts, ANSWERS, batch_size=4)
    torch.testing.assert_close(scores, one_at_a_time(model, prompts, ANSWERS), rtol=1e-5, atol=1e-5)


def test_equals_one_at_a_time_where_branches_are_not_possible(tiny_llama, monkeypatch):
    monkeypatch.setattr(likelihood, "_can_branch", lambda *arguments: False)
    prompts = make_prompts(common=5)
    scores = answer_log_likelihoods(tiny_llama, prompts, ANSWERS)
    torch.testing.assert_close(scores, one_at_a_time(tiny_llama, prompts, ANSWERS), rtol=1e-5, atol=1e-5)


def test_works_with_an_adapter(tiny_llama):
    prompts = make_prompts(common=3)
    base = answer_log_likelihoods(tiny_llama, prompts, ANSWERS)
    model = get_peft_model(tiny_llama, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    scores = answer_log_likelihoods(model, prompts, ANSWERS)
    assert not torch.allclose(scores, base, atol=1e-2)
    torch.testing.assert_close(scores, one_at_a_time(model, prompts, ANSWERS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_does_not_depend_on_the_batch(tiny_llama, batch_size):
    prompts = make_prompts(common=4)
    order = random.Random(1).sample(range(len(prompts)), len(prompts))
    scores = answer_log_likelihoods(tiny_llama, prompts, ANSWERS, batch_size=5)
    shuffled = answer_log_likelihoods(tiny_llama, [prompts[index] for index in order], ANSWERS, batch_size)
    torch.testing.assert_close(shuffled, scores[order], rtol=1e-5, atol=1e-5)


def test_neither_other_answers_nor_their_order_matter(tiny_llama):
    prompts = make_prompts(common=4)
    scores = answer_log_likelihoods(tiny_llama, prompts, ANSWERS)
    alone = torch.cat([answer_log_likelihoods(tiny_llama, prompts, [answer]) for answer in ANSWERS[::-1]], dim=1)
    torch.testing.assert_close(alone.flip(1), scores, rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_tokens_add_up_to_one(tiny_llama):
    scores = answer_log_likelihoods(tiny_llama, make_prompts(common=2), [[token] for token in range(64)])
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(len(scores)))


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_answers_do_not_tie_where_an_adapter_changes_the_head(tiny_llama, settings):
    config = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False} | settings)
    model = get_peft_model(tiny_llama.to(torch.bfloat16), config, autocast_adapter_dtype=False).eval()
    scores = answer_log_likelihoods(model, make_prompts(common=3), [[token] for token in range(64)])
    assert all(len(row.unique()) == 64 for row in scores)


@pytest.mark.parametrize("common", [0, 5])
def test_answers_do_not_tie_because_logits_are_rounded(tiny_llama, common):
    """In bfloat16, answers are told apart as exactly as what the head reads tells them apart."""
    model, prompts, answers = tiny_llama.to(torch.bfloat16), make_prompts(common), [[token] for token in range(64)]
    scores = answer_log_likelihoods(model, prompts, answers, batch_size=len(prompts))
    head = model.lm_head.weight.float()
    with torch.no_grad():
        read = [model.model(torch.tensor([prompt])).last_hidden_state[0, -1].float() for prompt in prompts]
    expected = torch.stack([(head @ x).log_softmax(dim=-1) for x in read])
    rounded = torch.stack([(head @ x).bfloat16().float().log_softmax(dim=-1) for x in read])
    assert all(len(row.unique()) == 64 for row in scores) and not all(len(row.unique()) == 64 for row in rounded)
    # What it reads is itself rounded, elsewhere in a batch than alone.
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.1)
    assert "forward" not in vars(model.lm_head)


def test_an_empty_answer_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="no tokens"):
        answer_log_likelihoods(tiny_llama, [[1, 2]], [[3], []])

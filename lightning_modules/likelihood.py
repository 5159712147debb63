"""Scores the possible answers to a prompt by their log-likelihood under a causal language model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.shared_prefix import (
    CausalLM,
    SharedPrefixBatch,
    attention_span,
    last_logits,
    last_positions,
    prefix_cache,
    share_prefix,
)


@torch.inference_mode()
def answer_log_likelihoods(
    model: CausalLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = 16
) -> Tensor:
    """Score every answer to every prompt by log p(answer | prompt), in float32: [prompts, answers].

    Each prompt is computed once, however many answers there are, and prompts are batched by length; neither
    changes a score beyond rounding. The model is used as it is: call `model.eval()` first.
    """
    if not all(len(answer) for answer in answers):
        raise ValueError("an answer has no tokens, so there is nothing to score")
    device = next(model.parameters()).device
    branches = AnswerBranches(answers, device)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    scores = torch.empty(len(prompts), len(answers))
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        batch = share_prefix([prompts[row] for row in rows]).to(device)
        if _can_branch(model, batch.attention_mask.shape[1] + len(branches.ids)):
            scores[rows] = _score_branches(model, batch, branches).cpu()
        else:
            scores[rows] = torch.stack([_score_one_prompt(model, prompts[row], answers) for row in rows])
    return scores


class AnswerBranches:
    """All answers side by side behind one prompt, each of them blind to the others.

    An answer's first token is predicted by the prompt's last position and its last token is never read, so only the
    tokens before the last are in the sequence: none at all if every answer is a single token.
    """

    def __init__(self, answers: Sequence[Sequence[int]], device: torch.device) -> None:
        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        read = [len(answer) - 1 for answer in answers]
        starts = [1 + sum(read[:number]) for number in range(len(answers))]
        self.answers = len(answers)
        # The tokens that are read: id, distance from the prompt's end, answer.
        self.ids = tensor([token for answer in answers for token in answer[:-1]])
        self.depths = tensor([depth for count in read for depth in range(1, count + 1)])
        self.owners = tensor([number for number, count in enumerate(read) for _ in range(count)])
        # The tokens that are predicted: id, answer, and by which position (0 is the prompt's last).
        self.targets = tensor([token for answer in answers for token in answer])
        self.target_owners = tensor([number for number, answer in enumerate(answers) for _ in answer])
        self.predictors = tensor(
            [place for start, count in zip(starts, read, strict=True) for place in (0, *range(start, start + count))]
        )

    def visible(self) -> Tensor:
        """Whether a branch token (row) sees another (column): its own answer's tokens up to itself."""
        return ((self.owners[:, None] == self.owners) & (self.depths[:, None] >= self.depths)).bool()

    def total(self, log_probabilities: Tensor) -> Tensor:
        """[rows, answers] from [rows, 1 + branch tokens, vocabulary]."""
        predicted = log_probabilities[:, self.predictors, self.targets]
        return predicted.new_zeros(len(predicted), self.answers).index_add_(1, self.target_owners, predicted)


def _can_branch(model: CausalLM, length: int) -> bool:
    """Branches need an attention that takes any mask, in layers that see the whole sequence."""
    takes_any_mask: bool = model.config._attn_implementation in ("eager", "sdpa")
    return takes_any_mask and length <= attention_span(model)


def _score_branches(model: CausalLM, batch: SharedPrefixBatch, branches: AnswerBranches) -> Tensor:
    rows, rest = batch.input_ids.shape
    prefix, count = len(batch.prefix_ids), len(branches.ids)
    prompt_ends = batch.attention_mask.sum(dim=1, keepdim=True) - 1

    # Queries are the prompts' rests and the branches; keys are the prefix and all of those.
    visible = batch.attention_mask.new_ones(rest + count, prefix + rest + count).tril(diagonal=prefix).bool()
    visible[rest:, prefix + rest :] = branches.visible()
    not_padding = torch.cat([batch.attention_mask.bool(), visible.new_ones(rows, count)], dim=1)
    hidden = ~(visible & not_padding[:, None, None, :])
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)

    logits = model(
        input_ids=torch.cat([batch.input_ids, branches.ids.expand(rows, -1)], dim=1),
        attention_mask=mask,
        position_ids=torch.cat([batch.position_ids(), prompt_ends + branches.depths], dim=1),
        past_key_values=prefix_cache(model, batch),
        logits_to_keep=last_positions(1 + count, batch.input_ids.device),
    ).logits
    return branches.total(logits.float().log_softmax(dim=-1))


def _score_one_prompt(model: CausalLM, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """The same for any model: one row per answer, the prompt being what all rows share."""
    longest = max(len(answer) for answer in answers)
    batch = share_prefix([[*prompt, *answer[:-1]] for answer in answers], shortest_rest=longest)
    batch = batch.to(next(model.parameters()).device)
    log_probabilities = last_logits(model, batch, last=longest).float().log_softmax(dim=-1).cpu()
    return torch.stack(
        [
            row[torch.arange(longest - len(answer), longest), torch.tensor(answer)].sum()
            for row, answer in zip(log_probabilities, answers, strict=True)
        ]
    )

"""Scores the possible answers to a prompt by their log-likelihood under a causal language model."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import Cache

from lightning_modules.shared_prefix import (
    CausalLM,
    SharedPrefixBatch,
    attention_span,
    common_beginning,
    has_free_positions,
    last_logits,
    last_positions,
    plain_model,
    prefix_cache,
    split_prefix,
)

# Of the output embeddings, that are in float32 at a time.
_VOCABULARY_ROWS = 1 << 13


@torch.inference_mode()
def answer_log_likelihoods(
    model: CausalLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = 16
) -> Tensor:
    """Score every answer to every prompt by log p(answer | prompt), in float32: [prompts, answers].

    Each prompt is computed once, however many answers there are, and prompts are batched by length; neither
    changes a score beyond rounding. The model is used as it is: call `model.eval()` first.
    """
    longest = max(map(len, prompts), default=0)
    scorer = AnswerScorer(model, answers, shared_beginning(prompts), longest)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    scores = torch.empty(len(prompts), len(answers))
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        scores[rows] = scorer([prompts[row] for row in rows]).cpu()
    return scores


def shared_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, at least one of each being left over."""
    shortest = min(map(len, prompts), default=1)
    return list(prompts[0][: min(common_beginning(prompts), shortest - 1)]) if prompts else []


class AnswerScorer:
    """Scores the same answers to many prompts that begin alike: that beginning is computed once for all of them.

    Every call runs the model equally often, whatever its prompts: ranks that share a model's weights stay in step.

    Args:
        model: an LLM in evaluation mode.
        answers: token ids of each.
        beginning: token ids that every prompt begins with; it may be empty.
        longest: number of tokens of the longest prompt there will be.

    Raises:
        ValueError: if an answer has no tokens.
    """

    def __init__(
        self, model: CausalLM, answers: Sequence[Sequence[int]], beginning: Sequence[int], longest: int
    ) -> None:
        if not all(len(answer) for answer in answers):
            raise ValueError("an answer has no tokens, so there is nothing to score")
        self.model = model
        self.answers = answers
        self.beginning = list(beginning)
        self.device = next(model.parameters()).device
        self.branches = AnswerBranches(answers, self.device)
        self.can_branch = _can_branch(model, longest + len(self.branches.ids))
        self._cache: Cache | None = None

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], reader: Any = None) -> Tensor:
        """The scores log p(answer | prompt), float32 [prompts, answers], on the model's device.

        Args:
            prompts: token ids.
            reader: takes the prompts' ids in the model's place, where there are soft tokens among them.
        """
        reader = self.model if reader is None else reader
        with _logits_in_float32(self.model):
            if not self.can_branch:
                scores = [_score_answer(reader, prompts, answer, self.device) for answer in self.answers]
                return torch.stack(scores, dim=1)
            batch = split_prefix(prompts, len(self.beginning)).to(self.device)
            return _score_branches(reader, batch, self.branches, self._beginning_for(batch))

    def _beginning_for(self, batch: SharedPrefixBatch) -> Cache | None:
        if self._cache is None:
            self._cache = prefix_cache(self.model, batch, rows=1)
        # The model adds the batch's own keys and values to the cache that it is given.
        cache = copy.deepcopy(self._cache)
        if cache is not None:
            cache.batch_repeat_interleave(len(batch.input_ids))
        return cache


def _linear_head(head: Any) -> Any:
    """The linear layer in output embeddings that PEFT saves whole or has put factors on."""
    while True:
        if isinstance(head, ModulesToSaveWrapper):
            head = head.modules_to_save[head.active_adapter]
        elif isinstance(head, BaseTunerLayer):
            head = head.get_base_layer()
        else:
            return head


@contextmanager
def _logits_in_float32(model: CausalLM) -> Iterator[None]:
    """Leave logits as exact as they are computed: rounded to bfloat16, many answers would be equally likely."""
    # Soft tokens are put in by something that only stands in the model's place.
    head = _linear_head(plain_model(model).get_output_embeddings())
    if type(head) is not torch.nn.Linear or head.weight.dtype == torch.float32 or "forward" in vars(head):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        hidden = hidden.float()
        logits = torch.cat([hidden @ rows.float().T for rows in head.weight.split(_VOCABULARY_ROWS)], dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


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
    """Branches need attention that takes any mask, in layers all of which see the whole sequence."""
    takes_any_mask: bool = model.config._attn_implementation in ("eager", "sdpa")
    return takes_any_mask and has_free_positions(model) and length <= attention_span(model)


def _score_branches(model: CausalLM, batch: SharedPrefixBatch, branches: AnswerBranches, cache: Cache | None) -> Tensor:
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
        past_key_values=cache,
        logits_to_keep=last_positions(1 + count, batch.input_ids.device),
    ).logits
    return branches.total(logits.float().log_softmax(dim=-1))


def _score_answer(
    model: CausalLM, prompts: Sequence[Sequence[int]], answer: Sequence[int], device: torch.device
) -> Tensor:
    """The same for one answer and any model: whole sequences."""
    batch = split_prefix([[*prompt, *answer[:-1]] for prompt in prompts], 0).to(device)
    log_probabilities = last_logits(model, batch, last=len(answer)).float().log_softmax(dim=-1)
    return log_probabilities[:, range(len(answer)), list(answer)].sum(dim=1)

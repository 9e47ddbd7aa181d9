"""What is wrong with the answers of a soak, and which differences contract 1 excuses."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from expertlane.spec.sampling import SamplingParams
from parity.contract import MAX_EXCLUDED_SHARE, MIN_ROUTER_MARGIN, MIN_TOP2_GAP
from server.soak_client import Choice, ClientAnswer
from server.soak_requests import DrawnRequest, TrueChoice

_LOGPROB_ERROR = 1e-3


class Arbiter:
    """Says by transformers' model, in float32, which tokens are too close to call.

    Args:
        folder: of a Mixtral's checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _model(self) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self._folder)
        return model.to(torch.float32).eval()

    @torch.inference_mode()
    def is_close(self, right: TrueChoice, params: SamplingParams, place: int) -> bool:
        """Whether output token `place` may be another: its router margin or its gap is too small.

        Of a drawn token only the margin counts.
        """
        tokens = right.prompt_token_ids + right.token_ids[:place]
        found = self._model(torch.tensor([tokens]), output_router_logits=True, use_cache=False)
        top_k = self._model.config.num_experts_per_tok
        margin = min(
            float((each[:, top_k - 1] - each[:, top_k]).min())
            for each in (
                layer.sort(dim=-1, descending=True).values for layer in found.router_logits
            )
        )
        if margin < MIN_ROUTER_MARGIN:
            return True
        if not params.is_greedy:
            return False
        logits = found.logits[0, -1].numpy()
        scores, chosen = _scores(logits, right, params, place), right.token_ids[place]
        # Of an answer that is held to a form the likeliest tokens may be out: what is near counts.
        gap = np.abs(np.delete(scores, chosen) - scores[chosen]).min()
        return bool(gap <= MIN_TOP2_GAP * np.abs(logits).max())


def _scores(logits: Any, right: TrueChoice, params: SamplingParams, place: int) -> Any:
    """Logits after bias and penalties, from the definition of `SamplingParams`."""
    scores, output = logits.astype(np.float64), right.token_ids[:place]
    for token, bias in params.logit_bias:
        scores[token] += bias
    seen = np.unique([*right.prompt_token_ids, *output])
    penalty = params.repetition_penalty
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    counts = np.bincount(np.array(output, dtype=int), minlength=len(scores))
    return scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts


@dataclass
class Judge:
    """Takes in answers; counts them, and keeps what is wrong.

    Attributes:
        wrong: a line each.
        counts: of requests by what became of them; of choices by finish reason; of tokens.
    """

    arbiter: Arbiter
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def excluded_share(self) -> float:
        """Of the answers that were held against offline ones."""
        return self.counts["excluded"] / max(1, self.counts["compared"])

    def take(self, asked: DrawnRequest, came: ClientAnswer, right: list[TrueChoice]) -> None:
        """Judge an answer."""
        for problem in self._problems(asked, came, right):
            self.wrong.append(f"request {asked.number}: {problem}; {asked.body}, {came}")

    def check(self) -> None:
        """Refuse a soak in which anything was wrong.

        Raises:
            AssertionError: it was.
        """
        assert not self.wrong, "\n".join(self.wrong[:10])
        assert self.excluded_share <= MAX_EXCLUDED_SHARE, self.counts

    def _problems(
        self, asked: DrawnRequest, came: ClientAnswer, right: list[TrueChoice]
    ) -> list[str]:
        code = (came.error or {}).get("code")
        if came.has_left:
            self.counts["left"] += 1
            return self._of_part(asked, came, right)
        if asked.wrong is not None:
            self.counts["refused"] += 1
            is_refused = came.status in (400, 404) and came.error["param"] == asked.wrong
            return [] if is_refused else ["it was not refused by name"]
        if "timeout_s" in asked.body and code == "timeout":
            self.counts["late"] += 1
            return self._of_part(asked, came, right)
        self.counts["answered"] += 1
        if came.status != 200 or came.error or (asked.is_stream and not came.is_done):
            return ["it has no whole answer"]
        if sorted(came.choices) != list(range(len(asked.params))):
            return ["choices are missing"]
        problems = self._of_usage(asked, came)
        for place, choice in came.choices.items():
            self.counts[f"choices {choice.finish_reason}"] += 1
            problems += self._against(right[place], asked.params[place], choice)
        return problems

    def _of_part(
        self, asked: DrawnRequest, came: ClientAnswer, right: list[TrueChoice]
    ) -> list[str]:
        """Of what came before the end: it must be how the right answer begins."""
        self.counts["tokens seen in parts"] += sum(
            len(choice.token_ids or ()) for choice in came.choices.values()
        )
        problems = []
        for place, choice in came.choices.items():
            whole = right[place]
            fits = whole.text.startswith(choice.text)
            if choice.token_ids is not None:
                fits &= whole.token_ids[: len(choice.token_ids)] == choice.token_ids
            if not fits:
                problems += self._differing(whole, asked.params[place], choice)
        return problems

    def _of_usage(self, asked: DrawnRequest, came: ClientAnswer) -> list[str]:
        if came.usage is None:
            options = asked.body.get("stream_options", {"include_usage": True})
            is_asked = not asked.is_stream or options["include_usage"]
            return ["it has no usage"] if is_asked else []
        self.counts["completion tokens"] += came.usage["completion_tokens"]
        num_choices = asked.body.get("n", 1)
        self.counts["prompt tokens"] += came.usage["prompt_tokens"] * num_choices
        tokens = [choice.token_ids for choice in came.choices.values()]
        if None in tokens:
            return []
        same = came.usage["completion_tokens"] == sum(map(len, tokens))
        return [] if same else ["its usage is not what came"]

    def _against(self, right: TrueChoice, params: SamplingParams, choice: Choice) -> list[str]:
        self.counts["compared"] += 1
        if choice.num_endings != 1:
            return ["a choice ends more or less than once"]
        if params.structured is not None and choice.finish_reason == "stop":
            self.counts[f"complete {params.structured.kind}"] += 1
        same = choice.text == right.text and choice.finish_reason == right.finish_reason
        if choice.token_ids is not None:
            same &= choice.token_ids == right.token_ids
            same &= choice.prompt_token_ids == right.prompt_token_ids
        if not same:
            return self._differing(right, params, choice)
        if not np.allclose(choice.logprobs, right.logprobs, rtol=0, atol=_LOGPROB_ERROR):
            return [f"its log-probabilities are not {right.logprobs}"]
        return []

    def _differing(self, right: TrueChoice, params: SamplingParams, choice: Choice) -> list[str]:
        """An answer that is another: wrong, unless a token is too close to call."""
        if choice.token_ids is None:  # where it parts is not known
            places = list(range(len(right.token_ids)))
        else:
            pairs = zip(choice.token_ids, right.token_ids, strict=False)
            differing = (place for place, (one, other) in enumerate(pairs) if one != other)
            places = [next(differing, 0)]
        if any(self.arbiter.is_close(right, params, place) for place in places):
            self.counts["excluded"] += 1
            return []
        return [f"it should be {right}"]

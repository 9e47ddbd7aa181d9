"""A model that takes no time: the real engine and scheduler over a runner without ranks."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from expertlane.balance.trace import RoutingTrace
from expertlane.engine.engine import Engine
from expertlane.engine.ranks.commands import RankMachine
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.text.tokenizer import Tokenizer

MACHINE = RankMachine(
    host="here",
    num_cores=2,
    cpus=[],
    cpu_name="a CPU",
    device="cpu",
    backend="gloo",
    dtype="float32",
    kernels="torch",
    torch_version="2",
    memory_bytes=10**9,
    free_bytes=10**9,
    ranks_per_node=1,
    num_idle_gpus=0,
)


class StubLLM:
    """Every token is its predecessor plus one.

    Attributes:
        prompts: [num_requests]; the token ids of all that were added.
        before_step: called before each step is given.
        poisoned: a token that nothing finite follows.
        records_routing: whether it was loaded to do so.
    """

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limits = Limits(model.vocab_size, model.max_position_embeddings, num_blocks=1000)
        self.before_step: Callable[[], Any] = lambda: None
        self.poisoned: int | None = None
        self.prompts: list[list[int]] = []
        self.layout: Layout | None = None
        self.options: Any = None
        self.is_open = False
        self.records_routing = False
        self.num_tokens = 0
        scheduler = ContinuousScheduler(Layout(), Options(), self.limits, record=False)
        eos = frozenset() if tokenizer is None else tokenizer.eos_token_ids
        self.engine = Engine(scheduler, self, eos_token_ids=eos, tokenizer=tokenizer)
        add = self.engine.add

        def noted(request_id: str, prompt: Any, params: Any, **named: Any) -> Any:
            output = add(request_id, prompt, params, **named)
            self.prompts.append(output.prompt_token_ids)
            return output

        self.engine.add = noted
        self.machine = (MACHINE,)

    def __enter__(self) -> "StubLLM":
        self.is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_open = False

    def routing_trace(self) -> RoutingTrace:
        """All tokens computed so far choose experts 3 and 1."""
        assert self.records_routing
        ids = np.tile(np.array([3, 1], dtype=np.int16), (1, self.num_tokens, 1))
        return RoutingTrace("stub", 4, (0,), ids, np.arange(self.num_tokens))

    def submit(self, plan: StepPlan) -> StepPlan:
        return plan

    def first_done(self, handles: Sequence[StepPlan]) -> StepPlan:
        return handles[0]

    def collect(self, plan: StepPlan) -> StepOutcome:
        assert self.is_open
        self.before_step()
        token_ids: dict[int, int] = {}
        not_finite: list[int] = []
        for batch in (batch for micro_batch in plan.micro_batches for batch in micro_batch):
            self.num_tokens += batch.num_tokens
            lasts = batch.token_ids[batch.num_scheduled_tokens.cumsum() - 1].tolist()
            for seq, last, yields in zip(
                batch.seq_ids.tolist(), lasts, batch.yields_token.tolist(), strict=True
            ):
                if yields and last == self.poisoned:
                    not_finite.append(seq)
                elif yields:
                    token_ids[seq] = (last + 1) % self.limits.vocab_size
        now_s = time.perf_counter()
        return StepOutcome(token_ids, {}, (), now_s, now_s, not_finite=tuple(not_finite))

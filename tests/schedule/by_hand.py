"""What tests that go step by step have in common."""

from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout

VOCAB_SIZE = 100


def make_limits(**sizes) -> Limits:
    return Limits(
        **{"vocab_size": VOCAB_SIZE, "max_model_len": 64, "num_blocks": 32, "block_size": 4} | sizes
    )


def make(layout: str = "tp=1", *, num_micro_batches=1, rotating=False, flags=None, **sizes):
    options = Options(
        num_micro_batches=num_micro_batches,
        micro_batch_schedule="rotating" if rotating else "drained",
    )
    return ContinuousScheduler(Layout.parse(layout), options, make_limits(**sizes), **(flags or {}))


def request(name: str, prompt_len: int = 1, max_tokens: int = 4, *, first: int = 0, **kwargs):
    """Prompts begin with `first` and count up."""
    prompt = [(first + i) % VOCAB_SIZE for i in range(prompt_len)]
    return Request(name, prompt, max_tokens=max_tokens, **kwargs)


def add(scheduler: ContinuousScheduler, *requests: Request) -> tuple[Request, ...]:
    for each in requests:
        scheduler.add(each)
    return requests


def answer(scheduler: ContinuousScheduler, plan: StepPlan, token: int = 7) -> None:
    """Finish a step: every sequence that yields a token yields `token`."""
    yielding = [
        seq for batches in plan.micro_batches for batch in batches for seq in batch.yielding_seq_ids
    ]
    scheduler.commit(plan, StepOutcome(dict.fromkeys(yielding, token), {}, (), 0.0, 0.0))


def step(scheduler: ContinuousScheduler, token: int = 7) -> StepPlan:
    plan = scheduler.next_plan()
    answer(scheduler, plan, token)
    return plan


def scheduled(plan: StepPlan) -> list[list[dict[int, int]]]:
    """[num_micro_batches][dp]: new tokens by sequence id."""
    return [
        [
            dict(zip(batch.seq_ids.tolist(), batch.num_scheduled_tokens.tolist(), strict=True))
            for batch in batches
        ]
        for batches in plan.micro_batches
    ]


def only_batch(plan: StepPlan):
    ((batch,),) = plan.micro_batches
    return batch

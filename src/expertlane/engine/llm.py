"""`LLM`, the offline interface: a model, laid out over ranks, that continues prompts."""

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from inspect import Parameter, Signature
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from expertlane.balance.holding import Placements, check_deployment
from expertlane.balance.trace import RoutingTrace
from expertlane.balance.transition import Arrangement
from expertlane.engine.elastic.recovery import CurrentArrangement, Recovery
from expertlane.engine.elastic.scaling import Scaling
from expertlane.engine.elastic.shrinking import Shrinking
from expertlane.engine.engine import Engine, Prompt
from expertlane.engine.launch import (
    LoadPlan,
    check_checkpoint,
    check_num_blocks,
    describe_ranks,
    start_pool,
)
from expertlane.engine.model_runner import ModelRunner, RoutingRecorder
from expertlane.engine.profiler import Profiler
from expertlane.engine.rank_watch import RankWatch
from expertlane.engine.shared_engine import SharedEngine
from expertlane.errors import RankError, UserError
from expertlane.schedule.plan import StepPlan
from expertlane.schedule.request import Chunk, Limits, RequestOutput
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.engine_config import SETTINGS, EngineConfig, as_layout
from expertlane.spec.files import as_path
from expertlane.spec.from_hf import read_model
from expertlane.spec.hf_config import resolve_model
from expertlane.spec.layout import Layout, Members
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.ranges import shown
from expertlane.spec.sampling import SamplingParams
from expertlane.text.chat_template import ChatTemplate
from expertlane.text.tokenizer import TOKENIZER, Tokenizer, configured_eos_token_ids

ResultT = TypeVar("ResultT")


def find_model(model: str | Path, ignore_unused_tensors: bool) -> tuple[ModelConfig, Path | None]:
    """The model of a preset, or of a checkpoint checked against its files, and its folder.

    Raises:
        UserError: there is no such model, or the checkpoint's files do not suit it.
    """
    if not isinstance(model, str):
        model = str(as_path("model", model))
    if model in PRESETS:
        return PRESETS[model], None
    folder = resolve_model(model)
    checked = check_checkpoint(
        read_model(folder, model),
        folder,
        ignore_unused_tensors=ignore_unused_tensors,
        log=print_to_stderr,
    )
    return checked, folder


def print_to_stderr(line: str) -> None:
    """Print a line on stderr for the user of an `LLM`."""
    with suppress(OSError, ValueError):  # it cannot be written: requests go on
        print(line, file=sys.stderr)


def read_tokenizer(folder: Path | None) -> tuple[Tokenizer | None, frozenset[int]]:
    """A checkpoint's tokenizer, if it has one, and the tokens that end a sequence."""
    if folder is None:
        return None, frozenset()
    if not (folder / TOKENIZER).is_file():
        return None, configured_eos_token_ids(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, tokenizer.eos_token_ids


def wanted_limits(model: ModelConfig, config: EngineConfig) -> Limits:
    """The limits that a config asks for, with one block where it leaves their number open.

    Raises:
        UserError: `max_model_len` is more than the model's positions.
    """
    longest = model.max_position_embeddings
    asked = longest if config.max_model_len is None else config.max_model_len
    if asked > longest:
        raise UserError(f"max_model_len is {asked}; valid for {model.name}: 1 to {longest}")
    return Limits(
        vocab_size=model.vocab_size,
        max_model_len=asked,
        num_blocks=1 if config.num_blocks is None else config.num_blocks,
        block_size=config.block_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        prefix_caching=config.prefix_caching,
    )


def all_finished(outputs: list[RequestOutput]) -> Callable[[], bool]:
    """A function that tells whether all outputs are finished; looks at each finished one once."""
    num_finished = 0  # outputs from the front known to be finished

    def are_finished() -> bool:
        nonlocal num_finished
        number = num_finished  # several threads may ask at once
        while number < len(outputs) and outputs[number].finish_reason is not None:
            number += 1
        num_finished = number
        return number == len(outputs)

    return are_finished


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or several.

    Raises:
        UserError: it is neither a text, a list of token ids, nor a list of those.
    """
    is_array = isinstance(prompts, np.ndarray) and prompts.ndim > 0
    if not is_array and not isinstance(prompts, Sequence):
        raise UserError(
            f"prompts are a {type(prompts).__name__}; give a text, a list of token ids, or a list "
            "of either"
        )
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def with_params(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Pairs of a prompt and its sampling parameters.

    Raises:
        UserError: prompts or parameters have a wrong type, or there are not as many of both.
    """
    several = as_list(prompts)
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(several)
    is_list = isinstance(params, Sequence)
    if not is_list or not all(isinstance(each, SamplingParams) for each in params):
        raise UserError(f"params are {shown(params)}; give SamplingParams, one or a list of them")
    if len(params) != len(several):
        raise UserError(
            f"{len(several)} prompts but {len(params)} sampling parameters; "
            "give one for all, or one per prompt"
        )
    return list(zip(several, params, strict=True))


def _at_once(action: Callable[[], ResultT]) -> ResultT:
    return action()


Message = dict[str, str]


class LLM:
    """A model on its ranks; use it as a context, or `close` it.

        from expertlane import LLM, SamplingParams

        with LLM("./my-checkpoint", layout="dp=2,ep=2") as llm:
            for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=50)):
                print(output.text)

    Several threads may call `generate`, `stream`, `chat` and `close` at once; their requests run
    in the same steps.

    Args:
        model: a folder with a checkpoint, a hub id (`org/name`), or the name of a preset, whose
            weights are then random.
        config: settings, each with its default; see `EngineConfig`.
        settings: some of them by name, in place of the config's; a layout may be a text.

    Attributes:
        engine: requests and steps, for callers with a loop of their own; for one thread, while no
            other one uses the LLM.
        limits: the scheduler's limits: positions, sequences, tokens of a step, cache blocks.
        machine: [num_ranks]; the machine of each rank, described before the model was loaded.
        tokenizer: None where the checkpoint has none.
        scaling: changes the layout between steps, for callers with a loop of their own.

    Raises:
        UserError: the model cannot be found, read, laid out so, or does not fit into memory.
        RankError: a rank died, hung or failed, and was not replaced.
    """

    def __init__(
        self, model: str | Path, config: EngineConfig | None = None, **settings: Any
    ) -> None:
        config = EngineConfig.of(config, **settings)
        self.model, self._folder = find_model(model, config.ignore_unused_tensors)
        self._routing = RoutingRecorder(self.model) if config.record_routing else None
        self._numbers = count()
        self._chat_template: ChatTemplate | None = None
        self.tokenizer, eos_token_ids = read_tokenizer(self._folder)
        self._config, deployment = config, config.deployment
        placements = check_deployment(self.model, deployment, config.ranks_per_node)
        self.limits = wanted_limits(self.model, config)
        own_dtype = self.model.own_dtype if self._folder else None
        pool = start_pool(replace(config, dtype=config.dtype or own_dtype))
        if pool is None:  # torchrun has started this process besides one that starts ranks
            raise SystemExit(0)
        self._pool = pool
        try:
            self._load(placements, eos_token_ids)
            self._shared = SharedEngine(self.engine, lambda: pool.is_closed)
        except BaseException:
            pool.close(failed=True)
            raise

    def _load(self, placements: Placements, eos_token_ids: frozenset[int]) -> None:
        """Load the model on the ranks, and make the engine that runs it."""
        pool, config, model, log = self._pool, self._config, self.model, print_to_stderr
        # The ranks tell how many of them a node has, once they are up.
        given = placements, config.ranks_per_node
        arranged = CurrentArrangement(Arrangement.alike(Members(config.layout), *given))
        recovery: Recovery | None = None
        if config.on_failure != "stop":
            recovery = Recovery(pool, arranged, self._redeploy, log)
            pool.on_early_end(log)
        # Ranks that are lost before they serve are replaced meanwhile.
        start = _at_once if recovery is None else recovery.start
        self.machine = tuple(start(lambda: describe_ranks(pool)))
        plan = LoadPlan(model, config.layout, config.options, placements, self._folder)
        self.limits = plan.with_blocks(self.limits, config.num_blocks, self.machine)
        self._runner = start(lambda: self._make_runner(arranged))
        self.limits = self._runner.limits
        scheduler = ContinuousScheduler(
            *(config.layout, config.options, self.limits),
            lookahead=True,
            record=config.options.rebalance_steps > 0,
            record_routing=self._routing is not None,
        )
        self.engine = Engine(
            scheduler,
            self._runner,
            eos_token_ids=eos_token_ids,
            tokenizer=self.tokenizer,
            on_commit=None if self._routing is None else self._routing.add,
            recovery=recovery,
        )
        self.scaling = Scaling(
            *(pool, self._runner, self.engine, model, config.deployment),
            *(self.limits, self.machine),
            ranks_per_node=config.ranks_per_node,
            folder=self._folder,
            oversubscribe=config.oversubscribe,
        )
        if recovery is not None:
            recovery.settle()
            if config.on_failure == "shrink":
                recovery.shrinker = Shrinking(pool, self._runner, self.scaling, log)

    def _make_runner(self, arranged: CurrentArrangement) -> ModelRunner:
        config, machine = self._config, self.machine[0]
        per_node = config.ranks_per_node or machine.ranks_per_node
        runner = ModelRunner(
            *(self._pool, self.model, replace(config, ranks_per_node=per_node), self.limits),
            checkpoint=self._folder,
            arranged=arranged,
            log=print_to_stderr,
            measures_memory=machine.on_gpu,
            records_ahead=True,
        )
        if config.num_blocks is not None:
            check_num_blocks(config.num_blocks, runner.limits)
        return runner

    def _redeploy(self, replaced: Collection[int], plans: Sequence[StepPlan]) -> None:
        if any(self._pool.pid(rank) is None for rank in replaced):
            describe_ranks(self._pool)  # a node that has come back may be another machine
        self._runner.redeploy(replaced, plans)

    def __repr__(self) -> str:
        """`<LLM paper-tiny, dp=2,ep=2, float32, 4,096 positions, closed>`."""
        if not hasattr(self, "_shared"):  # it could not be made
            return "<LLM, not loaded>"
        dtype, positions = self.machine[0].dtype, f"{self.limits.max_model_len:,} positions"
        closed = ", closed" if self._pool.is_closed else ""
        return f"<LLM {self.model.name}, {self.layout}, {dtype}, {positions}{closed}>"

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._shared.close(partial(self._pool.close, failed=error_type is not None))

    def close(self) -> None:
        """End all ranks, after the present step; may be called again, and from any thread.

        Calls of other threads that are not finished then raise a `RankError`.
        """
        self._shared.close(self._pool.close)

    def check_ranks(self) -> None:
        """Notice a rank that has ended while no step ran; for callers with a loop of their own.

        Raises:
            RankError: a rank has ended, and is not replaced.
        """
        self.engine.guarded(self._pool.check)
        self.engine.grow()

    @property
    def layout(self) -> Layout:
        """The present layout; `scale` changes it."""
        return self.scaling.deployment.layout

    def scale(self, layout: str | Layout) -> None:
        """Change the layout between two steps, to more ranks, fewer, or another arrangement.

        Requests continue: those whose data-parallel rank keeps its processes keep their KV cache;
        others are computed again. Needs `on_failure="replace"` or `"shrink"`.

        Raises:
            UserError: the model cannot be laid out so, does not fit into memory, or there cannot be
                so many ranks; nothing has changed then.
            RankError: ranks were lost, and could not be replaced.
        """
        with self._shared.exclusive():
            if self._pool.is_closed:
                raise RankError("the ranks are gone; make a new LLM")
            self.scaling.scale(as_layout(layout))
            self.machine = self.scaling.machine

    def check_weights(self) -> None:
        """Compare the checksums of all ranks' weights with those taken after loading.

        Raises:
            UserError: `check` is off, so there are none.
            RankError: some have changed, and their ranks are not replaced.
        """
        if self._runner.checking is None:
            raise UserError("weights have no checksums; make the LLM with check='light' or 'full'")
        with self._shared.exclusive():
            self.engine.guarded(self._runner.checking.check_weights)

    def watch(self) -> RankWatch:
        """Begin to read the ranks' totals; for callers with a loop of their own that show them."""
        return self.engine.with_ranks(self._runner.watch)

    def profiler(self, folder: Path) -> Profiler:
        """What has the ranks write torch profiler traces; for callers with a loop of their own."""
        return Profiler(self._pool, self._runner.arranged, folder)

    def on_told_to_end(self, react: Callable[[], None]) -> None:
        """Set a callback for a SIGTERM on another node; without one, all ranks end at once.

        Args:
            react: called from whichever thread waits for ranks; it should see to it that the LLM is
                closed soon.
        """
        self._pool.on_told_to_end(react)

    def routing_trace(self) -> RoutingTrace:
        """The experts that each token chose in each MoE layer, in all steps finished so far.

        It has tokens of prompts and outputs, but none found in the prefix cache: these were not
        computed again.

        Raises:
            UserError: the LLM was made without `record_routing`.
        """
        if self._routing is None:
            raise UserError("routing is not recorded; make the LLM with record_routing=True")
        with self._shared.exclusive():
            return self._routing.trace()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, batched as they fit.

        Args:
            prompts: a text or a list of token ids, or several of either.
            params: one for all prompts, or one for each; by default `SamplingParams()`.

        Returns:
            One output for each prompt, in their order. One whose logits were NaN or infinite has
            `finish_reason` "error" and says so in `error`; the others are not affected.

        Raises:
            UserError: a prompt can never be served; then none of them is.
            RankError: a rank died, hung or failed, whichever thread noticed; or the LLM is closed.
        """
        outputs = self._add(prompts, params)
        try:
            self._shared.wait(all_finished(outputs))
        except BaseException:
            self._cancel(outputs)
            raise
        return outputs

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Chunk]]:
        """Continue prompts, and yield (index of the prompt, chunk) as steps finish.

        Arguments and errors are those of `generate`. Requests are queued when the first chunk is
        asked for; closing the iterator cancels the unfinished ones. Between chunks, steps of other
        calls go on, and their chunks for this one are kept. An iterator is for one thread at a
        time.
        """
        arrived: deque[Chunk] = deque()
        outputs = self._add(prompts, params, arrived)
        places = {output.request_id: place for place, output in enumerate(outputs)}
        num_unfinished = len(outputs)
        try:
            while num_unfinished:
                if not arrived:
                    self._shared.wait(lambda: bool(arrived))
                chunk = arrived.popleft()
                num_unfinished -= chunk.finish_reason is not None
                yield places[chunk.request_id], chunk
        finally:
            self._cancel(outputs)

    def _cancel(self, outputs: list[RequestOutput]) -> None:
        self._shared.cancel(output.request_id for output in outputs)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[Chunk]:
        """Continue a conversation by the checkpoint's chat template, and yield its chunks.

        Args:
            messages: each with `role` and `content`.

        Raises:
            UserError: there is no template or tokenizer, or the template refuses the messages.
        """
        if self.tokenizer is None or self._folder is None:
            raise UserError(f"{self.model.name} has no tokenizer, which a chat needs")
        if self._chat_template is None:
            self._chat_template = ChatTemplate.from_folder(self._folder)
        if not isinstance(messages, Sequence):
            raise UserError(f"messages is {shown(messages)}; it must be a list of messages")
        text = self._chat_template.render(messages)
        prompt = self.tokenizer.encode(text, add_special_tokens=False)
        return (chunk for _, chunk in self.stream([prompt], params))

    def _add(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        arrived: deque[Chunk] | None = None,
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        try:
            for place, (prompt, of_prompt) in enumerate(with_params(prompts, params), 1):
                request_id, name = str(next(self._numbers)), f"prompt {place}"
                outputs.append(self._shared.add(request_id, prompt, of_prompt, name, arrived))
        except BaseException:
            self._cancel(outputs)
            raise
        return outputs


def _signature() -> Signature:
    """The parameters of `LLM` with all settings by name, for `help` and editors."""
    either, by_name = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    settings = (
        Parameter(name, by_name, default=each.default, annotation=each.type)
        for name, each in SETTINGS.items()
    )
    model = Parameter("model", either, annotation=str | Path)
    config = Parameter("config", either, default=None, annotation=EngineConfig | None)
    return Signature([model, config, *settings])


LLM.__signature__ = _signature()  # type: ignore[attr-defined]

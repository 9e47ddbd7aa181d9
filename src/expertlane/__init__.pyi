# Written by tests/api_stub.py from the options that the commands declare; a test compares.
"""Run, compare and plan expert-parallel inference of Mixture-of-Experts models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from expertlane.api import Corrections, Difference, Results, diff, fit_corrections, load_results
from expertlane.engine.llm import LLM as _LLM
from expertlane.errors import ExpertlaneError, RankError, UserError
from expertlane.spec.deployment import Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Layout
from expertlane.spec.names import CheckLevel, CpuIsa, Dtype, OnFailure
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.sampling import Structured
from expertlane.version import __version__

# What the command line reads as text, or what that stands for: `batch=[32, 64]`.
Text = str | int | float | Path | Layout | Sequence[int | float | str]

__all__ = [
    "LLM",
    "Corrections",
    "Difference",
    "EngineConfig",
    "ExpertlaneError",
    "Options",
    "RankError",
    "Results",
    "SamplingParams",
    "Structured",
    "UserError",
    "__version__",
    "bench",
    "compare",
    "diff",
    "drill",
    "fit_corrections",
    "load_results",
    "plan",
    "simulate",
    "verify",
]

class LLM(_LLM):
    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        layout: str | Layout = ...,
        options: Options | None = ...,
        dtype: Dtype | None = ...,
        max_model_len: int | None = ...,
        block_size: int = ...,
        num_blocks: int | None = ...,
        max_num_seqs: int = ...,
        max_num_batched_tokens: int = ...,
        prefix_caching: bool = ...,
        ranks_per_node: int = ...,
        seed: int = ...,
        timeout_s: float = ...,
        oversubscribe: bool = ...,
        on_failure: OnFailure = ...,
        rejoin_s: float = ...,
        cpu_isa: CpuIsa | None = ...,
        ignore_unused_tensors: bool = ...,
        record_routing: bool = ...,
        check: CheckLevel = ...,
    ) -> None: ...


def compare(
    experiment: Text | None = None,
    *,
    model: Text | None = None,
    experts_per_token: int | None = None,
    only: Text | None = None,
    repeat: int = 7,
    min_time: float = 0.0,
    resume: bool = False,
    trace: bool = False,
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    batch: Text | None = None,
    rate: Text | None = None,
    num_requests: int | None = None,
    prompt_len: Text | None = None,
    output_len: Text | None = None,
    requests: str | Path | None = None,
    prefix_len: int | None = None,
    num_prefixes: int | None = None,
    seed: int | None = None,
    clock: Literal['virtual', 'wall'] | None = None,
    links: Text | None = None,
    link_scale: float | None = None,
    compute: Text = 'measured',
    timeout_s: float = 60.0,
    oversubscribe: bool = False,
    cpu_isa: Literal['baseline', 'avx2', 'avx512', 'avx512_bf16', 'amx', 'neon', 'neon_bf16'] | None = None,
    ignore_unused_tensors: bool = False,
    project: bool = False,
    cluster: Text | None = None,
    skew: float | None = None,
    framework: Text | None = None,
    corrections: str | Path | None = None,
    fit_corrections: str | Path | None = None,
    slo: Text | Sequence[Text] | None = None,
    engine: Text | Sequence[Text] | None = None,
    url: Text | Sequence[Text] | None = None,
    engine_python: Text | Sequence[Text] | None = None,
    engine_args: Text | Sequence[Text] | None = None,
    kv_tokens: int | None = None,
    tokenizer: str | Path | None = None,
    served_model: Text | Sequence[Text] | None = None,
    api_key_file: Text | Sequence[Text] | None = None,
    flush_caches: bool = False,
    start_timeout_s: float = 1200.0,
    request_timeout_s: float | None = None,
    dry_run: bool = False,
    scripts: str | Path | None = None,
    out: str | Path | None = None,
) -> Results:
    """Run an experiment's deployments in turn on the same ranks and show them side by side.

    Says which deployment is faster and why: tokens per second, time per output token, where each
    step's time goes, and how the experts were loaded. Ranks that share cores take turns, so the
    answer is in virtual time: computing as measured, each rank on its own core, transfers as on the
    links of a cluster. Wall time is shown beside it. Starts local ranks, or under torchrun those of
    several nodes. Writes results.json, report.md and report.html.

    Args:
        experiment: A TOML file, or the name of an experiment that comes with expertlane:
            paper-small (laptop), paper-small-skewed (the same model, some experts in demand,
            load balanced), paper (full size).
        model: A checkpoint folder, a hub id (org/name), or a preset with random weights:
            paper-tiny, paper-small, paper.
        experts_per_token: Experts per token; with several, one comparison each, one after the
            other.
        only: Run only these deployments, by their names or numbers in the experiment; no
            scaling layouts.
        repeat: How often the deployments of the answer's first sentence are measured; the
            others twice at most. Fewer than 5 give no intervals.
        min_time: Measure each of those deployments for at least this long.
        resume: Go on with a comparison that was interrupted: what it measured is kept in the
            folder of its results until it is complete.
        trace: Also write trace-NAME.json: what every rank does when, in one prefill and one
            decode step, for ui.perfetto.dev or chrome://tracing. In virtual time:
            trace-NAME-virtual.json too.
        dtype: Type of weights and activations.
        batch: Closed loop: concurrency N.
        rate: Open loop instead of --batch: Poisson arrivals, R requests per second.
        num_requests: Requests per batch size or rate. Of --requests, the first N.
        prompt_len: Tokens per prompt. N:N: uniform in that range.
        output_len: Tokens per output. N:N: uniform in that range.
        requests: Recorded requests, with their lengths and arrival times: Mooncake's JSON lines
            or Azure's CSV of LLM inference. With --batch or --rate only the lengths are taken.
        prefix_len: Length of the prefix that prompts share; part of --prompt-len.
        num_prefixes: Number of different shared prefixes; each prompt has one of them.
        seed: Seed of all random draws; reproducible for equal seeds.
        clock: virtual: also replay what was measured with one core per rank and a cluster's
            links (while measuring, ranks that share a core compute one at a time). wall: wall
            time only.
        links: The links of virtual time: a profile as in --cluster, or none, so that transfers
            take no time.
        link_scale: Transfers take N times as long as on the profile's links.
        compute: Compute times in virtual time: measured, or a profile's cost model for the
            operations that ran.
        timeout_s: Longest wait for a rank that makes no progress, in seconds.
        oversubscribe: Allow more than 32 local ranks per core.
        cpu_isa: Largest instruction set that kernels on CPUs may use; amx only if asked for.
        ignore_unused_tensors: Continue, with a warning, if the checkpoint holds tensors that
            its config.json does not use.
        project: Also project the same deployments on a modelled cluster, in separate tables;
            where this machine is too small to run them, only project. An experiment's table
            [projection] has values for the options below; those given take precedence.
        cluster: The modelled cluster: N devices of a profile (a100, a100pcie, a30, b200, b300,
            gb200, gb300, h100, h100pcie, h200, l4, l40s, rtxpro6000, or a TOML file of
            expertlane calibrate).
        skew: Skewed routing: expert popularity by Zipf's law with exponent ALPHA; 0: uniform.
        framework: Correct step times and TTFT by public measurements of a serving framework:
            vllm, sglang, trt (TensorRT-LLM), dynamo-trt or dynamo-sglang. Also takes its
            scheduling and tokens per step, for plan its engine, for simulate its dispatch form,
            unless given.
        corrections: Corrections that compare --fit-corrections wrote: factors, fitted to
            measurements, on links, kernels and overheads, and a routing skew. --skew and
            --routing-trace take precedence.
        fit_corrections: Fit corrections to what was measured beside the projection, and write
            them: for --corrections of plan, simulate and compare.
        slo: Latency objectives, a statistic and its limit each. For example:
            ttft.p95=2s,tpot.mean=20ms. Of ttft, tpot, itl or e2e the mean, median, p90, p95 or
            p99. Each deployment runs as many sequences as they allow.
        engine: Engine that serves. Each deployment is started as a server of this engine,
            measured over HTTP, and stopped. Other packages may add engines.
        url: Measure a server with the OpenAI API. It runs already, and needs no EXPERIMENT;
            with one, the NAME of a deployment says that it has its layout.
        engine_python: Python of the environment that the engine is installed in.
        engine_args: Further arguments of the engine's command, such as "--enforce-eager".
        kv_tokens: Total tokens in the KV caches of each server started by --engine.
        tokenizer: Folder of the model's tokenizer.
        served_model: Model's name at the server, if it has several. NAME: only for that --url.
        api_key_file: File with the API key. NAME: only for that --url.
        flush_caches: Empty the server's prefix cache before each round: SGLang; vLLM in
            development mode.
        start_timeout_s: Time in which a server must become ready.
        request_timeout_s: Time limit of a request, waiting included.
        dry_run: Only print the commands that start the servers.
        scripts: Also write a batch script for Slurm and a LeaderWorkerSet for Kubernetes there.
            With --dry-run; they start each deployment on the nodes of --cluster.
        out: Folder for results.json, the reports and all else that the command writes. None:
            nothing is written.

    Returns:
        What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

    Raises:
        UserError: what is asked for is wrong or cannot be done; options are named as on the command
            line.
        RankError: a rank died, hung or failed.
    """


def plan(
    model: Text,
    *,
    cluster: Text = 'h100x16',
    engine: Literal['vllm', 'sglang', 'trtllm', 'expertlane'] | None = None,
    scripts: str | Path | None = None,
    batch: Text | None = None,
    rate: Text | None = None,
    prompt_len: Text | None = None,
    output_len: Text | None = None,
    requests: str | Path | None = None,
    prefix_len: int | None = None,
    num_prefixes: int | None = None,
    seed: int = 0,
    slo: Text | Sequence[Text] | None = None,
    price: float | None = None,
    routing_trace: str | Path | None = None,
    skew: float | None = None,
    dtype: Literal['float32', 'bfloat16', 'float16', 'float8', 'nvfp4', 'mxfp4', 'int4'] | None = None,
    kv_dtype: Literal['model', 'float32', 'bfloat16', 'float16', 'float8'] = 'model',
    execution: Literal['graph', 'eager'] = 'graph',
    framework: Text | None = None,
    corrections: str | Path | None = None,
    mtp: int = 0,
    mtp_acceptance: float | None = None,
    out: str | Path | None = None,
) -> Results:
    """Find the deployment with the most tokens/s on a cluster, within latency limits.

    Tries every layout × replicas × dispatch form of each phase × overlap × micro-batches ×
    redundant experts, aggregated and disaggregated (prefill and decode apart); with --mtp each
    with drafts and without; with --engine only what that engine runs. Projects each with a cost
    model calibrated on public measurements. Needs no GPU, loads no weights. Gives each deployment's
    gap to #1. Writes the winner as an experiment for expertlane compare, and the best of each
    engine as the commands that start it on all nodes: vLLM, SGLang, TensorRT-LLM, expertlane.

    Args:
        model: A checkpoint folder, a hub id (org/name), or a preset with random weights:
            paper-tiny, paper-small, paper.
        cluster: The modelled cluster: N devices of a profile (a100, a100pcie, a30, b200, b300,
            gb200, gb300, h100, h100pcie, h200, l4, l40s, rtxpro6000, or a TOML file of
            expertlane calibrate). PROFILExauto: the fewest devices that serve --batch or --rate
            within --slo.
        engine: Engine that serves. Only what it runs is planned.
        scripts: Also write a batch script for Slurm and a LeaderWorkerSet for Kubernetes there.
            They start the best of each engine.
        batch: Closed loop: concurrency N.
        rate: Open loop instead of --batch: Poisson arrivals, R requests per second. Deployments
            are ranked by the most requests per second that they serve within --slo, then the
            best are simulated at R.
        prompt_len: Tokens per prompt. N:N: uniform in that range.
        output_len: Tokens per output. N:N: uniform in that range.
        requests: Recorded requests, with their lengths and arrival times: Mooncake's JSON lines
            or Azure's CSV of LLM inference. Only their lengths are taken.
        prefix_len: Length of the prefix that prompts share; part of --prompt-len.
        num_prefixes: Number of different shared prefixes; each prompt has one of them.
        seed: Seed of all random draws; reproducible for equal seeds.
        slo: Latency objectives, a statistic and its limit each. For example:
            ttft.p95=2s,tpot.mean=20ms. Of ttft, tpot, itl or e2e the mean, median, p90, p95 or
            p99. Deployments that miss one are left out; those that miss one only at --rate come
            last.
        price: Price per GPU-hour, on CPUs of all machines per hour; gives the cost per million
            tokens.
        routing_trace: Routing as recorded by expertlane generate --record-routing.
        skew: Skewed routing: expert popularity by Zipf's law with exponent ALPHA; 0: uniform.
        dtype: Type of weights and activations.
        kv_dtype: Type of the KV cache. model: the checkpoint's, else that of hidden states.
        execution: Steps as CUDA graphs, or kernels launched one by one.
        framework: Correct step times and TTFT by public measurements of a serving framework:
            vllm, sglang, trt (TensorRT-LLM), dynamo-trt or dynamo-sglang. Also takes its
            scheduling and tokens per step, for plan its engine, for simulate its dispatch form,
            unless given.
        corrections: Corrections that compare --fit-corrections wrote: factors, fitted to
            measurements, on links, kernels and overheads, and a routing skew. --skew and
            --routing-trace take precedence.
        mtp: Multi-token prediction: N draft tokens per step.
        mtp_acceptance: Acceptance rate of drafts, 0 to 1; needed with --mtp.
        out: Folder for results.json, the reports and all else that the command writes. None:
            nothing is written.

    Returns:
        What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

    Raises:
        UserError: what is asked for is wrong or cannot be done; options are named as on the command
            line.
        RankError: a rank died, hung or failed.
    """


def simulate(
    model: Text | None = None,
    *,
    layout: Text | None = None,
    cluster: Text | None = None,
    plan: Text | None = None,
    prefill_layout: Text | None = None,
    cold_start: bool = False,
    trace: bool = False,
    batch: Text | None = None,
    rate: Text | None = None,
    num_requests: int | None = None,
    prompt_len: Text | None = None,
    output_len: Text | None = None,
    requests: str | Path | None = None,
    prefix_len: int | None = None,
    num_prefixes: int | None = None,
    seed: int = 0,
    slo: Text | Sequence[Text] | None = None,
    price: float | None = None,
    routing_trace: str | Path | None = None,
    skew: float | None = None,
    dtype: Literal['float32', 'bfloat16', 'float16', 'float8', 'nvfp4', 'mxfp4', 'int4'] | None = None,
    kv_dtype: Literal['model', 'float32', 'bfloat16', 'float16', 'float8'] = 'model',
    execution: Literal['graph', 'eager'] = 'graph',
    framework: Text | None = None,
    corrections: str | Path | None = None,
    overlap: Literal['off', 'on', 'auto'] = 'off',
    num_micro_batches: int = 1,
    micro_batch_schedule: Literal['drained', 'rotating'] = 'drained',
    dispatch: Literal['all_to_all', 'all_gather', 'hierarchical', 'static', 'auto'] = 'all_to_all',
    prefill_dispatch: Literal['all_to_all', 'all_gather', 'hierarchical', 'static'] | None = None,
    payload: Literal['model', 'bfloat16', 'float8'] = 'model',
    placement: Text = 'load',
    num_redundant_experts: int = 0,
    mtp: int = 0,
    mtp_acceptance: float | None = None,
    block_size: int = 16,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    out: str | Path | None = None,
) -> Results:
    """Project one deployment on target hardware.

    The scheduler of real runs, on a virtual clock; steps are priced by a profile fitted to
    published measurements or made by expertlane calibrate. Says what limits the deployment,
    and where every number comes from. Needs no GPU and no weights.

    Args:
        model: A checkpoint folder, a hub id (org/name), or a preset with random weights:
            paper-tiny, paper-small, paper.
        layout: How ranks are arranged: dp=2,ep=2 for example. Ranks of tensor (tp), pipeline
            (pp), data (dp) and expert parallelism (ep).
        cluster: The modelled cluster: N devices of a profile (a100, a100pcie, a30, b200, b300,
            gb200, gb300, h100, h100pcie, h200, l4, l40s, rtxpro6000, or a TOML file of
            expertlane calibrate).
        plan: Simulate row N of a results.json again (of expertlane plan or compare --project),
            with its model, cluster and load. Without #N: what the plan recommends, or a
            comparison's first row; #pools: disaggregated pools; #vllm, #sglang …: the best of
            an engine. Options that are given take precedence; the model and layouts are the
            row's.
        prefill_layout: Disaggregated: a separate prefill pool, on further devices; --layout is
            then the decode pool's. --prefill-dispatch is the prefill pool's, all other options
            hold for both.
        cold_start: Begin idle, with all of --batch at once, and end with the last of
            --num-requests. Otherwise the load is in its steady state: one request begins as
            another ends.
        trace: Also write trace-NAME.json: what every rank does when, in one prefill and one
            decode step, for ui.perfetto.dev or chrome://tracing. In virtual time:
            trace-NAME-virtual.json too.
        batch: Closed loop: concurrency N.
        rate: Open loop instead of --batch: Poisson arrivals, R requests per second.
        num_requests: Requests per batch size or rate. Of --requests, the first N.
        prompt_len: Tokens per prompt. N:N: uniform in that range.
        output_len: Tokens per output. N:N: uniform in that range.
        requests: Recorded requests, with their lengths and arrival times: Mooncake's JSON lines
            or Azure's CSV of LLM inference. With --batch or --rate only the lengths are taken.
        prefix_len: Length of the prefix that prompts share; part of --prompt-len.
        num_prefixes: Number of different shared prefixes; each prompt has one of them.
        seed: Seed of all random draws; reproducible for equal seeds.
        slo: Latency objectives, a statistic and its limit each. For example:
            ttft.p95=2s,tpot.mean=20ms. Of ttft, tpot, itl or e2e the mean, median, p90, p95 or
            p99. Goodput counts requests within all limits.
        price: Price per GPU-hour, on CPUs of all machines per hour; gives the cost per million
            tokens.
        routing_trace: Routing as recorded by expertlane generate --record-routing.
        skew: Skewed routing: expert popularity by Zipf's law with exponent ALPHA; 0: uniform.
        dtype: Type of weights and activations.
        kv_dtype: Type of the KV cache. model: the checkpoint's, else that of hidden states.
        execution: Steps as CUDA graphs, or kernels launched one by one.
        framework: Correct step times and TTFT by public measurements of a serving framework:
            vllm, sglang, trt (TensorRT-LLM), dynamo-trt or dynamo-sglang. Also takes its
            scheduling and tokens per step, for plan its engine, for simulate its dispatch form,
            unless given.
        corrections: Corrections that compare --fit-corrections wrote: factors, fitted to
            measurements, on links, kernels and overheads, and a routing skew. --skew and
            --routing-trace take precedence.
        overlap: Two-batch overlap: one half batch computes while the other communicates; auto,
            on real ranks: where faster for a step's number of tokens, timed at startup.
        num_micro_batches: Micro-batches per pipeline step.
        micro_batch_schedule: drained: the pipeline empties after each step; rotating: it stays
            full.
        dispatch: How tokens are dispatched to experts: all_to_all: one copy to each rank with a
            chosen expert; all_gather: all tokens to all ranks; hierarchical: one copy per node,
            forwarded inside it; static: all_to_all in buffers of fixed size; auto, on real
            ranks: the fastest of all_to_all, all_gather, hierarchical for a step's number of
            tokens, timed at startup.
        prefill_dispatch: Dispatch form of steps that hold prompts, if different.
        payload: Number type of dispatched hidden states; float8 rounds them (expertlane compare
            measures the error).
        placement: Experts per rank: consecutive ones, every ep-th, or as in a file of
            expertlane balance. load: in each layer by the load of earlier tokens, as if experts
            were rebalanced.
        num_redundant_experts: Redundant experts per MoE layer, to share load.
        mtp: Multi-token prediction: N draft tokens per step.
        mtp_acceptance: Acceptance rate of drafts, 0 to 1; needed with --mtp.
        block_size: Tokens per KV-cache block.
        max_num_seqs: Concurrent requests per data-parallel rank.
        max_num_batched_tokens: Tokens per step and data-parallel rank.
        out: Folder for results.json, the reports and all else that the command writes. None:
            nothing is written.

    Returns:
        What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

    Raises:
        UserError: what is asked for is wrong or cannot be done; options are named as on the command
            line.
        RankError: a rank died, hung or failed.
    """


def bench(
    model: Text | None = None,
    *,
    layout: Text | Sequence[Text] | None = None,
    batch: Text | None = None,
    rate: Text | None = None,
    num_requests: int | None = None,
    prompt_len: Text | None = None,
    output_len: Text | None = None,
    requests: str | Path | None = None,
    prefix_len: int | None = None,
    num_prefixes: int | None = None,
    seed: int = 0,
    slo: Text | Sequence[Text] | None = None,
    price: float | None = None,
    url: Text | None = None,
    compare: Text | None = None,
    rounds: int | None = None,
    endpoint: Literal['completions', 'chat'] = 'completions',
    tokenizer: str | Path | None = None,
    api_key_file: str | Path | Sequence[str | Path] | None = None,
    num_warm_up: int | None = None,
    request_timeout_s: float | None = None,
    flush_caches: bool = False,
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    max_model_len: int | None = None,
    num_blocks: int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    no_prefix_caching: bool = False,
    overlap: Literal['off', 'on', 'auto'] = 'off',
    num_micro_batches: int = 1,
    micro_batch_schedule: Literal['drained', 'rotating'] = 'drained',
    dispatch: Literal['all_to_all', 'all_gather', 'hierarchical', 'static', 'auto'] = 'all_to_all',
    prefill_dispatch: Literal['all_to_all', 'all_gather', 'hierarchical', 'static'] | None = None,
    payload: Literal['model', 'bfloat16', 'float8'] = 'model',
    placement: Text = 'linear',
    num_redundant_experts: int = 0,
    weights: Literal['model', 'int8'] = 'model',
    activations: Literal['model', 'float8'] = 'model',
    kv_dtype: Literal['model', 'float8'] = 'model',
    cuda_graphs: Literal['auto', 'on', 'off'] = 'auto',
    rebalance_steps: int = 0,
    ranks_per_node: int = 0,
    check: Literal['off', 'light', 'full'] = 'off',
    timeout_s: float = 60.0,
    oversubscribe: bool = False,
    cpu_isa: Literal['baseline', 'avx2', 'avx512', 'avx512_bf16', 'amx', 'neon', 'neon_bf16'] | None = None,
    ignore_unused_tensors: bool = False,
    on_failure: Literal['replace', 'shrink', 'stop'] = 'stop',
    rejoin_s: float = 300.0,
    out: str | Path | None = None,
) -> Results:
    """Measure throughput and latency of a model, or of a server, under load.

    A sweep over batch sizes, or requests that arrive at a rate; each layout gets the same
    requests, one after the other. Prompts are random token ids; decoding is greedy and ignores end
    of sequence. Before each load the ranks are warmed up.

    With --url requests go to a server over HTTP, as streams. Its API key is taken from
    EXPERTLANE_API_KEY or a file. Latency counts from when a request was due, however late it could
    be sent; failed requests are counted by their error. Ctrl-C ends the run and prints what was
    measured until then.

    Args:
        model: A checkpoint folder, a hub id (org/name), or a preset with random weights:
            paper-tiny, paper-small, paper. With --url: the model's name there; not needed if
            the server has only one.
        layout: How ranks are arranged: dp=2,ep=2 for example. Ranks of tensor (tp), pipeline
            (pp), data (dp) and expert parallelism (ep).
        batch: Closed loop: concurrency N.
        rate: Open loop instead of --batch: Poisson arrivals, R requests per second.
        num_requests: Requests per batch size or rate. Of --requests, the first N.
        prompt_len: Tokens per prompt. N:N: uniform in that range.
        output_len: Tokens per output. N:N: uniform in that range.
        requests: Recorded requests, with their lengths and arrival times: Mooncake's JSON lines
            or Azure's CSV of LLM inference. With --batch or --rate only the lengths are taken.
        prefix_len: Length of the prefix that prompts share; part of --prompt-len.
        num_prefixes: Number of different shared prefixes; each prompt has one of them.
        seed: Seed of all random draws; reproducible for equal seeds.
        slo: Latency objectives, a statistic and its limit each. For example:
            ttft.p95=2s,tpot.mean=20ms. Of ttft, tpot, itl or e2e the mean, median, p90, p95 or
            p99. Goodput counts requests within all limits.
        price: Price per GPU-hour, on CPUs of all machines per hour; gives the cost per million
            tokens.
        url: Measure a server with the OpenAI API. expertlane serve, vLLM and SGLang have it.
        compare: A second server, measured alternately with the first.
        rounds: Rounds, each with its own requests; 5 or more give an interval.
        endpoint: API that requests use; prompts of chats are text.
        tokenizer: Folder of the model's tokenizer. Required for chats.
        api_key_file: File with the API key. A second file is for --compare.
        num_warm_up: Warm-up requests before each load, which are not counted.
        request_timeout_s: Time limit of a request, waiting included.
        flush_caches: Empty the server's prefix cache before each round: SGLang; vLLM in
            development mode.
        dtype: Type of weights and activations.
        max_model_len: Longest sequence, in tokens.
        num_blocks: KV-cache blocks per data-parallel rank.
        block_size: Tokens per KV-cache block.
        max_num_seqs: Concurrent requests per data-parallel rank.
        max_num_batched_tokens: Tokens per step and data-parallel rank.
        no_prefix_caching: Turn prefix caching off.
        overlap: Two-batch overlap: one half batch computes while the other communicates; auto,
            on real ranks: where faster for a step's number of tokens, timed at startup.
        num_micro_batches: Micro-batches per pipeline step.
        micro_batch_schedule: drained: the pipeline empties after each step; rotating: it stays
            full.
        dispatch: How tokens are dispatched to experts: all_to_all: one copy to each rank with a
            chosen expert; all_gather: all tokens to all ranks; hierarchical: one copy per node,
            forwarded inside it; static: all_to_all in buffers of fixed size; auto, on real
            ranks: the fastest of all_to_all, all_gather, hierarchical for a step's number of
            tokens, timed at startup.
        prefill_dispatch: Dispatch form of steps that hold prompts, if different.
        payload: Number type of dispatched hidden states; float8 rounds them (expertlane compare
            measures the error).
        placement: Experts per rank: consecutive ones, every ep-th, or as in a file of
            expertlane balance.
        num_redundant_experts: Redundant experts per MoE layer, to share load.
        weights: Type in which matrices are kept; int8 rounds them while loading, with a scale
            for every 128 inputs.
        activations: Type of the inputs of matrices stored in float8. float8 rounds them, with a
            scale for every 128 of a token's values, so that GPUs multiply in float8; slower on
            CPUs.
        kv_dtype: Type of the KV cache. float8 takes half or less, and rounds keys and values.
        cuda_graphs: Record decode steps once and launch each as one CUDA graph; auto: where
            ranks have GPUs and expertlane's kernels.
        rebalance_steps: Rebalance experts at runtime every STEPS steps, where it pays. 0:
            never.
        ranks_per_node: Consecutive ranks that count as one node.
        check: Check every step for silent errors. light: no NaN or infinite values, and ranks
            agree on replicated values; full: also, transfers arrive unchanged, and each token
            is computed once by each of its experts.
        timeout_s: Longest wait for a rank that makes no progress, in seconds.
        oversubscribe: Allow more than 32 local ranks per core.
        cpu_isa: Largest instruction set that kernels on CPUs may use; amx only if asked for.
        ignore_unused_tensors: Continue, with a warning, if the checkpoint holds tensors that
            its config.json does not use.
        on_failure: When a rank dies, hangs or fails. replace: a new process takes its place,
            and no request is lost; shrink: a smaller layout serves until then, where possible;
            stop: all ranks end.
        rejoin_s: On several nodes, where lost ranks are replaced: how long to wait for a lost
            node, in seconds; 0: all ranks end at once.
        out: Folder for results.json, the reports and all else that the command writes. None:
            nothing is written.

    Returns:
        What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

    Raises:
        UserError: what is asked for is wrong or cannot be done; options are named as on the command
            line.
        RankError: a rank died, hung or failed.
    """


def drill(
    url: Text | None = None,
    *,
    kill: Text | None = None,
    pid: int | None = None,
    rank: int | None = None,
    kubectl: Text | None = None,
    signal: Literal['KILL', 'STOP', 'TERM'] = 'KILL',
    after_s: float = 10.0,
    observe_s: float = 60.0,
    hang_s: float = 10.0,
    health_s: float = 5.0,
    engine: Text | None = None,
    model: Text | None = None,
    layout: Text = 'tp=1',
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None,
    engine_python: Text | None = None,
    engine_args: Text | None = None,
    start_timeout_s: float = 1200.0,
    batch: Text | None = None,
    rate: Text | None = None,
    num_requests: int | None = None,
    prompt_len: Text | None = None,
    output_len: Text | None = None,
    prefix_len: int | None = None,
    num_prefixes: int | None = None,
    seed: int = 0,
    endpoint: Literal['completions', 'chat'] = 'completions',
    tokenizer: str | Path | None = None,
    api_key_file: str | Path | None = None,
    out: str | Path | None = None,
) -> Results:
    """Kill or stop one part of a server under load, and say what was lost.

    First every prompt is answered twice, so that the greedy tokens of the undisturbed server are
    known, and how many of them change by themselves. Then the load goes on, the fault strikes once,
    and the load is watched: when the first request failed, how many failed, hung, were cut short,
    or got tokens twice, too few or others; when the rate was full again; whether /health told the
    truth; and, where the server's processes run on this machine, what was left behind.

    What is killed or stopped stays so: drill starts nothing again. A server that --engine starts is
    ended.

    Args:
        url: The server, as http://HOST:PORT.
        kill: Command that kills or stops something; your shell runs it once, for at most 60 s.
        pid: Process of this machine to signal.
        rank: Rank to signal, of a server on this machine; --layout where that has more than one
            kind of parallelism.
        kubectl: Pod to delete, by kubectl; also with its options, such as 'vllm-0 -n prod
            --context staging'.
        signal: Signal for --pid and --rank. STOP: the process hangs. With --kubectl, KILL
            deletes at once, TERM with its grace period.
        after_s: Steady load before the fault, for so long.
        observe_s: Watch for so long after the fault.
        hang_s: A request that gets no token for so long has hung; it is given up.
        health_s: /health may be wrong for so long at a time.
        engine: Engine that serves. It is started here with --model and --layout in place of a
            URL, and ended.
        model: A checkpoint folder, a hub id (org/name), or a preset with random weights:
            paper-tiny, paper-small, paper. With a URL: the model's name there.
        layout: How ranks are arranged: dp=2,ep=2 for example. Ranks of tensor (tp), pipeline
            (pp), data (dp) and expert parallelism (ep).
        dtype: Type of weights and activations.
        engine_python: Python of the environment that the engine is installed in.
        engine_args: Further arguments of the engine's command, such as "--enforce-eager".
        start_timeout_s: Time in which a server must become ready.
        batch: Closed loop: concurrency N.
        rate: Open loop instead of --batch: Poisson arrivals, R requests per second.
        num_requests: Requests per batch size or rate. The same ones are sent again and again.
        prompt_len: Tokens per prompt. N:N: uniform in that range.
        output_len: Tokens per output. N:N: uniform in that range.
        prefix_len: Length of the prefix that prompts share; part of --prompt-len.
        num_prefixes: Number of different shared prefixes; each prompt has one of them.
        seed: Seed of all random draws; reproducible for equal seeds.
        endpoint: API that requests use; prompts of chats are text.
        tokenizer: Folder of the model's tokenizer. Required for chats.
        api_key_file: File with the API key.
        out: Folder for results.json, the reports and all else that the command writes. None:
            nothing is written.

    Returns:
        What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

    Raises:
        UserError: what is asked for is wrong or cannot be done; options are named as on the command
            line.
        RankError: a rank died, hung or failed.
    """


def verify(
    url: Text,
    model: Text | None = None,
    *,
    reference: Text,
    dtype: Literal['float32', 'bfloat16', 'float16', 'float8', 'nvfp4'] | None = None,
    weights: Literal['model', 'int8'] = 'model',
    tokenizer: str | Path | None = None,
    api_key_file: str | Path | Sequence[str | Path] | None = None,
    quick: bool = False,
    budget_s: float | None = None,
    request_timeout_s: float | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
) -> Results:
    """Say whether a server computes the model that it claims.

    Wrong layouts, kernels and caches answer fluently and wrong. Here the server's
    log-probabilities of given tokens are compared, token by token, with those of a checkpoint in
    float32 or of a second server: alone and under load, in short and long contexts, generated and
    given, with the prefix cache cold and warm, on each data-parallel rank where one can be chosen.
    What rounding in the server's number type does is measured on the same tokens; such differences
    are no errors.

    Args:
        url: A server with the OpenAI API.
        model: The model's name there; not needed if the server has only one.
        reference: What the server should compute: a checkpoint folder of the model, or a second
            server of it, such as another layout.
        dtype: Type of weights and activations. The one that the server computes in: differences
            that rounding to it makes are no errors.
        weights: Type in which matrices are kept; int8 rounds them while loading, with a scale
            for every 128 inputs.
        tokenizer: Folder of the model's tokenizer. Required where a server takes text alone.
        api_key_file: File with the API key. A second file is for a --reference URL.
        quick: Half the prompts, and --budget-s 60: sees larger errors only.
        budget_s: After about so long no further condition is begun; the output names those left
            out.
        request_timeout_s: Time limit of a request, waiting included.
        seed: Seed of all random draws; reproducible for equal seeds.
        out: Folder for results.json, the reports and all else that the command writes. None:
            nothing is written.

    Returns:
        What was found: `.answer` is text, `.page` the report, `.to_pandas()` a table.

    Raises:
        UserError: what is asked for is wrong or cannot be done; options are named as on the command
            line.
        RankError: a rank died, hung or failed.
    """

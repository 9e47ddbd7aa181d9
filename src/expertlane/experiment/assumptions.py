"""What an experiment takes for granted, printed beside its numbers."""

from expertlane.results.schema import Assumption, Machine
from expertlane.spec.experiment import Experiment


def assumptions(experiment: Experiment, machine: Machine) -> tuple[Assumption, ...]:
    """The choices that the paper leaves open, as this experiment makes them."""
    model, workload = experiment.model, experiment.workload
    micro_batches = sorted(
        {deployment.options.num_micro_batches for deployment in experiment.deployments}
    )
    baselines = dict.fromkeys(
        str(deployment.layout) for deployment in experiment.deployments if deployment.is_baseline
    )
    rows = [
        Assumption(
            "experts per token",
            f"{model.num_experts_per_tok} of {model.num_experts}",
            "the paper does not give it",
        ),
        Assumption(
            "model parts",
            f"vocabulary {model.vocab_size:,}, RMSNorm before attention and MoE, rotary "
            "positions, GELU in the experts",
            "the paper does not give them",
        ),
        Assumption(
            "weights and prompts",
            f"random, seeds {experiment.seed} and {workload.seed}; router untrained",
            "the paper gives no checkpoint and no text",
        ),
        Assumption(
            "phases",
            "prefill and decode apart; factors are of decode",
            "the paper's TPS × TPOT ≈ 1000 fits a decode step of its 1024 sequences",
        ),
        Assumption(
            "context",
            f"{workload.prompt_len:,} prompt + {workload.output_len:,} output tokens, all "
            f"{workload.num_sequences:,} sequences resident",
            "TPOT grows with context; the paper's workload at full length exceeds its GPUs' memory",
        ),
        Assumption(
            "precision", machine.dtype, "the paper's is FP16; this machine's fast type may differ"
        ),
        Assumption(
            "baseline",
            "; ".join(baselines) or "none",
            "the paper's text allows two readings: experts cut over stages of layers, or over "
            "data-parallel groups",
        ),
        Assumption(
            "micro-batches",
            ", ".join(map(str, micro_batches)),
            "the paper does not give the baseline's; the best is compared against too",
        ),
        Assumption(
            "tensor parallelism",
            "each all-reduce as reduce-scatter and all-gather, tokens scattered in between",
            "the same bytes, and norms and router are computed once instead of on every rank",
        ),
    ]
    if machine.num_idle_gpus:
        rows.append(
            Assumption(
                "device",
                f"CPU, though there are {machine.num_idle_gpus} GPUs",
                f"a GPU for each of {machine.num_ranks} ranks is needed to use them",
            )
        )
    return tuple(rows)

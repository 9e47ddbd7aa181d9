"""Sets of kernels that steps are priced with: the engine's two, and an estimate of libraries'.

What is counted (FLOPs, bytes, collectives) is what the engine counts with `ENGINE` and
`ENGINE_ON_GPUS`, which differ in numbers of launches alone. With `GPU_LIBRARIES` it differs where
those do otherwise: `counts_first`, `expands_all`, `merges_products`, `dummy_batches` and
`reduces_to_all`.
"""

from dataclasses import dataclass

from expertlane.spec.deployment import DispatchForm, form_on
from expertlane.spec.layout import Layout


@dataclass(frozen=True)
class KernelSet:
    """Numbers of kernel launches outside graphs, and what libraries' kernels do at once.

    The default numbers are read off the engine's tensor operations.

    Attributes:
        name: source of the kernels.
        assumed: words for it in a projection's assumptions.
        why: where its numbers are from, for the table of assumptions.
        norm, widened_norm: a norm in float32, and in a type that is widened for it.
        residual: attention's sum added to its input, where no product or norm does that.
        rotate, write: rotation of queries and keys; new keys and values to the cache.
        head_norm: norm of queries and keys, each head by itself.
        squares, scale: the two halves of a norm over the heads of all ranks.
        decode_group, prefill_group: attention of sequences taken as one: gather, mask, attend.
        latent: joining queries and keys of latent attention, beside the rotation.
        is_grouped: attention is called for each such group, not once for all.
        activation, gate: activation of an MLP; a shared expert's gate.
        route, scored_route, grouped_route: top-k of logits; with scores; with groups of experts.
        choose, by_peer, by_expert: copies chosen; rows sorted by peer; pairs sorted by expert.
        share: kernels, one after the other, that share counts of pairs among copies, where that is
            asked for. None of a library is measured: it is taken to search step by step.
        pack, narrow, widen: packing of rows to send, and rounding and restoring their payload.
        round_inputs: a product's inputs rounded to float8, where that is asked for.
        sum_term, sum_once: a sum of rows: for every term, and once.
        expert, experts_once: an active expert beside its products, and all of them together.
        expert_product: each product of an active expert.
        embed, last, argmax, best: at the model's two ends.
        gathered, reduced: packing and summing of rows around collectives.
        counts_first: dispatch tells numbers of rows, in a transfer of its own, before it sends any.
            Kernels with buffers of a static size need not, and can be captured in a graph; others
            tell them inside dispatch, in the time that it was measured with.
        kernels_move: dispatch and combine, and the experts' products, pack, sort and sum rows
            themselves, in the times that they were measured with.
        expands_all: all prompts attend to keys and values of each head, made from the latent; else
            those for which that takes fewer FLOPs.
        merges_products: products of the same input are one: an MLP's gate and up, and queries and
            keys of latent attention on their way to what is narrow.
        dummy_batches: a data-parallel rank without requests computes one token at the first
            position in every step of its replica, as serving engines' do; else it has none.
        reduces_to_all: a tensor-parallel group adds up by all-reduce, and all its ranks norm and
            route all tokens, where it is the whole stage and no token is sent to its expert; else
            each rank owns a part of the tokens, scattered and gathered again.
        normed_bytes: of hidden states, up to which such an all-reduce norms what it adds up, in
            its own time.
    """

    name: str
    assumed: str
    why: str
    norm: int = 1
    widened_norm: int = 3
    residual: int = 1
    rotate: int = 7
    write: int = 4
    head_norm: int = 4
    squares: int = 8
    scale: int = 12
    decode_group: int = 8
    prefill_group: int = 6
    latent: int = 0
    is_grouped: bool = True
    activation: int = 2
    gate: int = 3
    route: int = 4
    scored_route: int = 6
    grouped_route: int = 14
    choose: int = 3
    by_peer: int = 18
    by_expert: int = 20
    share: int = 1
    pack: int = 4
    narrow: int = 9
    widen: int = 4
    round_inputs: int = 16
    sum_term: int = 9
    sum_once: int = 2
    expert: int = 3
    expert_product: int = 1
    experts_once: int = 1
    embed: int = 2
    last: int = 2
    argmax: int = 4
    best: int = 4
    gathered: int = 2
    reduced: int = 2
    counts_first: bool = True
    kernels_move: bool = False
    expands_all: bool = False
    merges_products: bool = False
    dummy_batches: bool = False
    reduces_to_all: bool = False
    normed_bytes: int = 0

    def keeps_all(self, layout: Layout, form: DispatchForm) -> bool:
        """True if every rank of a stage holds all tokens' hidden states between operations."""
        return self.reduces_to_all and layout.dp == 1 and form_on(layout, form) == "all_gather"


ENGINE = KernelSet("the engine's tensor operations", "the engine's", "as measured on this machine")

# Read off `engine/ops/cuda`, and off torch's operations for what it leaves to them: packing,
# norms over the heads of all ranks, the choice of tokens.
ENGINE_ON_GPUS = KernelSet(
    "the engine's kernels on GPUs",
    "the engine's own",
    "Triton kernels and torch's products, as measured on this card (docs/gpu.md)",
    widened_norm=1,
    residual=0,
    rotate=1,
    write=0,
    head_norm=0,
    decode_group=2,
    prefill_group=1,
    is_grouped=False,
    activation=1,
    latent=10,
    route=2,
    scored_route=2,
    grouped_route=2,
    by_expert=5,
    round_inputs=1,
    sum_term=0,
    sum_once=1,
    expert=0,
    expert_product=0,
    experts_once=7,
    last=4,
    argmax=6,
)

# Of GPU libraries, which fuse what the engine does in many tensor operations; an estimate.
GPU_LIBRARIES = KernelSet(
    "GPU libraries",
    "fused as in GPU libraries; an estimate",
    "the engine has such for attention, norms and experts; it dispatches by more and smaller ones",
    widened_norm=1,
    rotate=1,
    write=1,
    head_norm=1,
    squares=1,
    scale=1,
    decode_group=2,
    prefill_group=1,
    is_grouped=False,
    activation=1,
    gate=2,
    route=1,
    scored_route=2,
    grouped_route=2,
    choose=1,
    by_peer=1,
    by_expert=2,
    share=16,
    pack=1,
    narrow=1,
    round_inputs=1,
    widen=0,
    sum_term=0,
    sum_once=1,
    expert=0,
    expert_product=0,
    experts_once=5,
    embed=1,
    last=1,
    argmax=2,
    best=1,
    gathered=1,
    reduced=1,
    counts_first=False,
    kernels_move=True,
    expands_all=True,
    merges_products=True,
    dummy_batches=True,
    reduces_to_all=True,
    normed_bytes=2**19,  # of vLLM on compute capability 9.0, the least of all its limits
)

KERNEL_SETS = (ENGINE, ENGINE_ON_GPUS, GPU_LIBRARIES)

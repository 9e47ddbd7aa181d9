"""The host asks a GPU for nothing between the start of a decode step and its tokens.

Without a GPU the step runs on the device "meta", whose tensors have shapes and no data, and
whatever would make the host wait for a GPU is refused. On one, `tests/gpu` has torch refuse it.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from engine.ops.cuda.tiny_models import MODELS
from engine.stage.one_rank import stage_of
from engine.stage.test_decode_graphs import PARAMS, limits_of
from expertlane.engine.model.decode_graphs import DecodeGraphs
from expertlane.engine.ops import device, products
from expertlane.engine.ops.cuda import launch
from expertlane.schedule.plan import Batch, RankBatch, RankStep
from expertlane.spec.names import Phase
from expertlane.spec.sampling import SamplingParams, SamplingState

GPU = torch.device("meta")
# Their results' sizes, or values, are on the host.
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for "meta".

    Attributes:
        pinned: what `device.pinned` has given.
        num_transfers: between host and device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned = []
        self.num_transfers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "meta" for x in given):
            assert name not in WAITS, func
            if name in ("index", "index_put", "index_put_"):
                places = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
                assert all(x.dtype is torch.int64 for x in places), f"{func} counts what is true"
                assert all(x.device.type == "meta" for x in places), f"{func} takes them there"
            if name == "repeat_interleave":
                assert kwargs.get("output_size") is not None, func
        names = [each.name for each in func._schema.arguments]
        named = dict(zip(names, args, strict=False)) | kwargs
        if name == "copy_" and args[0].device != args[1].device:
            self._copied(func, args[1], args[0], named.get("non_blocking"))
            return args[0]
        device = named.get("device") if name in ("to", "_to_copy") else None
        if device is not None and torch.device(device).type != args[0].device.type:
            self._copied(func, args[0], None, named.get("non_blocking"))
        return func(*args, **kwargs)

    def _copied(self, func, source, to, is_free) -> None:
        host = source if source.device.type == "cpu" else to
        if not source.numel() or (host is source and not host.dim()):
            return  # nothing, or a number, which goes with a launch
        assert is_free, f"{func} waits"
        assert any(host is each for each in self.pinned), f"{func} is not of pinned memory"
        self.num_transfers += 1


@pytest.fixture
def no_waits(monkeypatch):
    """The mode is to be entered around a step."""
    mode = NoWaits()

    def pinned(num_bytes):
        mode.pinned.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return mode.pinned[-1]

    monkeypatch.setattr(device, "pinned", pinned)
    monkeypatch.setattr(device, "recorded_event", lambda: "an event")
    monkeypatch.setattr(launch, "_run", lambda *_: None)
    return mode


class OneGraph:
    """As `CudaGraphs`: of a graph only the launch is left."""

    num_recorded = num_launched = 0

    def capture(self, run, until):
        run()
        with NoWaits() as mode:
            run()
        assert not mode.num_transfers, "a graph has none"
        self.num_recorded += 1

        def replay():
            self.num_launched += 1

        return replay


def step_of(num_seqs, number, admitted):
    """Each sequence has one new token, after some positions."""
    batch = Batch(
        seq_ids=np.arange(num_seqs),
        num_scheduled_tokens=np.ones(num_seqs, dtype=np.int64),
        num_computed_tokens=np.arange(num_seqs) + number,
        token_ids=np.arange(num_seqs),
        block_tables=np.arange(num_seqs * 3, dtype=np.int32).reshape(-1, 3),
        yields_token=np.ones(num_seqs, dtype=np.bool_),
    )
    micro_batches = tuple(RankBatch.of_dp_ranks([batch]))
    return RankStep(
        number, 0, Phase.DECODE, micro_batches=micro_batches, admitted=admitted, record=False
    )


ASKED = (
    *PARAMS[1:],
    SamplingParams(min_p=0.1, min_tokens=3, logit_bias={3: 2.0}),
)


@pytest.mark.smoke(10)
@pytest.mark.parametrize("way", ["eager", "graphs", "layers"])
@pytest.mark.parametrize("is_sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_waits_for_nothing_but_its_tokens(
    name, is_sampled, way, no_waits, monkeypatch
):
    monkeypatch.setattr(products, "_groups_products", lambda *_: name == "paper")
    model, num_seqs = MODELS[name], 4
    graphs = None if way == "eager" else OneGraph()
    if way == "layers":  # up to each dispatch
        monkeypatch.setattr(DecodeGraphs, "takes_steps", lambda graphs, form: False)
    limits = limits_of(model, num_blocks=12, max_num_seqs=num_seqs)
    stage = stage_of(model, limits, graphs, monkeypatch, GPU, torch.bfloat16)
    waits = []
    stage._await_device = waits.append
    empty = np.empty(0, dtype=np.int64)
    admitted = {
        seq: SamplingState(params, seq, np.array([1, 2]), empty, stop_token_ids=(5, 6))
        for seq, params in enumerate(ASKED)
        if is_sampled
    }
    for number in range(2):
        with no_waits, torch.inference_mode():
            outcome = stage.run(step_of(num_seqs, number, {} if number else admitted))
        assert [*outcome.token_ids] == [*range(num_seqs)]
        assert waits == ["an event"] * (number + 1)
    num_graphs = {"eager": 0, "graphs": 1, "layers": model.num_hidden_layers}[way]
    if not is_sampled:  # in and out; those that record; and what is between layers' graphs
        num_of_steps = 2 * 2 + num_graphs + (1 + num_graphs if way == "layers" else 0)
        assert no_waits.num_transfers == num_of_steps
    if graphs is not None:
        assert (graphs.num_recorded, graphs.num_launched) == (num_graphs, 2 * num_graphs)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.to("cpu"),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x + torch.arange(3).to(x.device),
        lambda x: x.repeat_interleave(x),
        lambda x: x[torch.arange(2)],
    ],
)
def test_what_waits_is_noticed(waiting, no_waits):
    x = torch.ones(3, dtype=torch.int64, device=GPU)
    with no_waits, pytest.raises(AssertionError):
        waiting(x)

"""Dispatch, experts and combine with the traffic that is to be expected, and the busiest rank's."""

import numpy as np

from expertlane.cost.number_types import PayloadBytes
from expertlane.cost.step.dispatch import ExpertWriter, form_of
from expertlane.cost.step.mlp import shares
from expertlane.cost.step.operation import Floats, Ints, TransferKind
from expertlane.cost.step.stage_mesh import Axis
from expertlane.plan.scenario import Reals, Scenarios, ScenarioSteps
from expertlane.plan.spread import Spread, busiest_of, largest_normal
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_COUNT_BYTES, _ID_BYTES, _WEIGHT_BYTES = 8, 4, 4


class ExpectedDispatch(ExpertWriter):
    """Puts down what `cost.dispatch_steps.ExpertSteps` does of a real step.

    The experts put down are the busiest rank's.
    """

    def __init__(
        self,
        out: ScenarioSteps,
        model: ModelConfig,
        part: Scenarios,
        spread: Spread,
        form: DispatchForm,
        payload: PayloadBytes,
    ) -> None:
        super().__init__(out, model, part.owned, payload)
        self._scenarios = out
        self._spread = spread
        self._form = form_of(form, out.stage)
        layout = self._layout = out.stage.layout
        stage_tokens = part.stage_tokens
        self._everywhere = stage_tokens
        mean = stage_tokens * (self.top_k / layout.ep)
        busiest = np.where(mean > 0, busiest_of(mean * spread.hot, layout.ep), 0)
        self._pairs = np.minimum(busiest, stage_tokens * min(self.top_k, len(spread.chosen)))
        self._hot = np.divide(self._pairs, mean, out=np.ones_like(mean), where=mean > 0)
        self._mean_pairs = mean
        self._mean_active, self._active = _active(spread.chosen, stage_tokens, layout.ep)
        # Tokens that reach an ep rank, one row each however many of its experts they chose.
        reached = self._hot * stage_tokens * (spread.reached / layout.ep)
        self._rows_here = np.minimum(reached, self._pairs)

    def put_down(self) -> None:
        """All of it."""
        match self._form:
            case None:
                self._local()
            case "all_gather":
                self._all_gather()
            case "all_to_all":
                self._all_to_all()
            case "hierarchical":
                self._hierarchical()

    def put_down_mean_experts(self) -> None:
        """The products of a rank with a mean load alone."""
        self.experts(_whole(self._mean_pairs), _whole(self._mean_active), self.inner)

    @property
    def inner(self) -> Ints:
        """[S]; the longest part of an expert that a rank holds."""
        first = np.zeros(len(self._owned), dtype=np.int64)
        return shares(self._model.moe_intermediate_size, self._layout.etp, first)

    def _experts(self) -> None:
        self.experts(_whole(self._pairs), _whole(self._active), self.inner)

    def _local(self) -> None:
        self.bookkeeping(self._owned, self.launches.choose)
        self._experts()
        self.sum(self._owned * self.top_k, self._owned, self.top_k, is_last=True)

    def _all_gather(self) -> None:
        out, everywhere = self._scenarios, self._everywhere
        metadata = self.top_k * (_ID_BYTES + _WEIGHT_BYTES) + self.payload.scales
        self.bookkeeping(self._owned, self.launches.choose)
        self.pack(self._owned, metadata)
        out.all_gather(Stage.DISPATCH, "stage", self._owned, self.payload.values, metadata)
        self.arrive(everywhere)
        self._experts()
        self.sum(_whole(self._pairs), everywhere, self.top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "stage", self._owned, self.row_bytes)
        out.memory(Stage.COMBINE, 3 * self._owned * self.row_bytes)

    def _all_to_all(self) -> None:
        out, spread, owned = self._scenarios, self._spread, self._owned
        metadata = self.top_k * _ID_BYTES + self.payload.scales
        self.bookkeeping(owned, self.launches.choose + self.launches.by_peer)
        if self.launches.counts_first:
            self._exchange_counts(2 * self._layout.ep)
        self.pack(_whole(owned * spread.reached), metadata)
        self._exchange(Stage.DISPATCH, "ep", self.payload.values + metadata, 1.0)
        arriving = _whole(self._rows_here / self._layout.etp)
        out.all_gather(Stage.DISPATCH, "etp", arriving, self.payload.values, metadata)
        self.arrive(_whole(self._rows_here))
        self._experts()
        returning = _whole(self._pairs / self._layout.etp)
        out.reduce_scatter(Stage.COMBINE, "etp", returning, self.row_bytes)
        self._exchange(Stage.COMBINE, "ep", self.row_bytes, self.top_k / spread.reached)
        self.sum(owned * self.top_k, owned, self.top_k, is_last=True)

    def _hierarchical(self) -> None:
        out, spread, owned = self._scenarios, self._spread, self._owned
        stage = out.stage
        size, num_nodes = stage.ep_per_node, stage.num_ep_nodes
        metadata = self.top_k * (_ID_BYTES + _WEIGHT_BYTES) + self.payload.scales
        row = self.payload.values + metadata
        self.bookkeeping(owned, self.launches.choose + self.launches.by_peer)
        self._exchange_counts(self._layout.ep + num_nodes)
        nodes_reached = spread.other_nodes + spread.own_node
        self.pack(_whole(owned * nodes_reached), metadata)
        far = owned * spread.other_nodes * self._hot
        none = np.zeros_like(far)
        out.exchange(TransferKind.ALL_TO_ALL, Stage.DISPATCH, "ep_inter", none, far * row)
        came = _whole(owned * nodes_reached)
        arriving = self._rows_here / self._layout.etp
        near = arriving * ((size - 1) / size)
        if size > 1:
            self.bookkeeping(came, self.launches.by_peer)
            if not self.launches.kernels_move:
                out.memory(Stage.DISPATCH, _whole(2 * arriving * row), self.launches.pack)
            out.exchange(TransferKind.ALL_TO_ALL, Stage.DISPATCH, "ep_intra", near * row, none)
        out.all_gather(Stage.DISPATCH, "etp", _whole(arriving), self.payload.values, metadata)
        self.arrive(_whole(self._rows_here))
        self._experts()
        self.sum(_whole(self._pairs), _whole(self._rows_here), self.top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "etp", _whole(arriving), self.row_bytes)
        if size > 1:
            back = near * self.row_bytes
            out.exchange(TransferKind.ALL_TO_ALL, Stage.COMBINE, "ep_intra", back, none)
            self.sum(_whole(arriving), came, size, is_last=False)
        back = far * self.row_bytes
        out.exchange(TransferKind.ALL_TO_ALL, Stage.COMBINE, "ep_inter", none, back)
        self.sum(came, owned, num_nodes, is_last=True)

    def _exchange_counts(self, num: int) -> None:
        ones = np.ones_like(self._owned)
        self._scenarios.all_gather(Stage.DISPATCH, "stage", ones, 0, num * _COUNT_BYTES)

    def _exchange(self, stage: Stage, axis: Axis, row_bytes: int, rows_per_row: float) -> None:
        """The flat all-to-all; the busiest rank's share of it."""
        amount = self._owned * self._hot * (row_bytes * rows_per_row)
        near, far = amount * self._spread.near, amount * self._spread.far
        self._scenarios.exchange(TransferKind.ALL_TO_ALL, stage, "ep", near, far)


def _active(chosen: Floats, stage_tokens: Ints, ep: int) -> tuple[Floats, Floats]:
    """[S] twice; experts of a rank with any token: on average, and on the rank with most."""
    has_any = 1 - (1 - np.minimum(chosen, 1)) ** stage_tokens[:, None]
    mean = has_any.sum(axis=1)
    spread = np.sqrt((has_any * (1 - has_any)).sum(axis=1))
    most = np.minimum(mean + largest_normal(ep) * spread, len(chosen))
    return mean, most


def _whole(amount: Reals) -> Ints:
    """[S]; rounded up, as nothing comes in parts."""
    return np.ceil(amount).astype(np.int64)

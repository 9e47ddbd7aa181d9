"""Dispatch, experts and combine of one layer as steps, in every form."""

import numpy as np

from expertlane.cost.number_types import PayloadBytes
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.dispatch_counts import DispatchCounts
from expertlane.cost.step.mlp import shares
from expertlane.cost.step.operation import Ints, Kind
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.cost.step.step_list import StepList, StepWriter
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_ID_BYTES, _WEIGHT_BYTES, _COUNT_BYTES = 4, 4, 8
_BOOKKEEPING_BYTES = 40  # read and written for a token-expert pair to be put in its place


class ExpertWriter:
    """What all dispatch forms put down.

    Args:
        owned: [R]; tokens that a rank owns.
    """

    def __init__(
        self, out: StepWriter, model: ModelConfig, owned: Ints, payload: PayloadBytes
    ) -> None:
        self._out = out
        self.launches = out.launches
        self._model = model
        self._owned = owned
        self.payload = payload
        self.row_bytes = model.hidden_size * out.types.activation_bytes

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self._model.num_experts_per_tok

    def bookkeeping(self, tokens: Ints, num_kernels: int) -> None:
        """Pairs of tokens [R] put in order."""
        if self.launches.kernels_move:
            return
        num_bytes = tokens * (self.top_k * _BOOKKEEPING_BYTES)
        self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def pack(self, rows: Ints, metadata: int) -> None:
        """Rows [R] put together to be sent; encoded first where they are narrowed."""
        if self.launches.kernels_move:
            return
        num_bytes, num_kernels = 2 * rows * (self.payload.values + metadata), self.launches.pack
        if self.payload.is_narrowed:
            encoded = self.row_bytes + self.payload.values + self.payload.scales
            num_bytes = num_bytes + self._owned * encoded
            num_kernels += self.launches.narrow
        self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def arrive(self, rows: Ints) -> None:
        """Rows [R] whose pairs are sorted by expert, decoded where they were narrowed."""
        if self.launches.kernels_move:
            return
        num_bytes, num_kernels = rows * (self.top_k * _BOOKKEEPING_BYTES), self.launches.by_expert
        if self.payload.is_narrowed:
            num_bytes = num_bytes + rows * (self.payload.values + self.row_bytes)
            num_kernels += self.launches.widen
        self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def experts(self, pairs: Ints, active: Ints, inner: Ints) -> None:
        """The products.

        Args:
            pairs, active: [R]; token-expert pairs, and experts with any.
            inner: [R]; inner width of a rank's part of an expert.
        """
        model, out = self._model, self._out
        matrices = 3 if model.gated_mlp else 2
        num_weights = inner * (model.hidden_size * matrices)
        launches = self.launches
        of_expert = launches.expert + matrices * launches.expert_product
        out.operation(
            Kind.EXPERTS,
            Stage.EXPERTS,
            {
                "pairs": pairs,
                "active": active,
                "hidden": model.hidden_size,
                "inner": inner,
                "matrices": matrices,
            },
            flops=2 * pairs * num_weights,
            weight_bytes=active * num_weights * out.weight_item,
            num_kernels=launches.experts_once + int(active.max()) * of_expert,
        )

    def sum(self, terms: Ints, sums: Ints, most: int, *, is_last: bool) -> None:
        """Rows [R] added up to fewer; with the residual where it is the last of the block.

        Args:
            most: terms of a sum.
        """
        launches = self.launches
        if launches.kernels_move:
            if is_last:
                self._out.memory(Stage.COMBINE, 3 * sums * self.row_bytes)
            return
        num_rows, num_kernels = terms + sums, launches.sum_term * most + launches.sum_once
        if is_last:
            num_rows, num_kernels = num_rows + 3 * sums, num_kernels + 1
        self._out.memory(Stage.COMBINE, num_rows * self.row_bytes, num_kernels)


class ExpertSteps(ExpertWriter):
    """Puts down how a layer's tokens get to their experts and back.

    Args:
        form: as the deployment names it; fewer ranks may come down to another.
    """

    def __init__(
        self,
        out: StepList,
        model: ModelConfig,
        part: PartSizes,
        counts: DispatchCounts,
        form: DispatchForm,
        payload: PayloadBytes,
    ) -> None:
        super().__init__(out, model, part.owned, payload)
        self._mesh = mesh = out.mesh
        self._transfers = out
        self._counts = counts
        self._form = form_of(form, mesh)
        self._ep_rank, self._etp = mesh.ep_rank, mesh.layout.etp

    def put_down(self) -> None:
        """All of it, the sum at home the last."""
        match self._form:
            case None:
                self._local()
            case "all_gather":
                self._all_gather()
            case "all_to_all":
                self._all_to_all()
            case "hierarchical":
                self._hierarchical()

    def _own_experts(self) -> None:
        counts, mesh = self._counts, self._mesh
        inner = shares(self._model.moe_intermediate_size, self._etp, mesh.etp_rank)
        pairs, active = counts.pairs_of_ep_rank, counts.active_of_ep_rank
        self.experts(pairs[self._ep_rank], active[self._ep_rank], inner)

    def _local(self) -> None:
        owned = self._owned
        self.bookkeeping(owned, self.launches.by_expert)
        self._own_experts()
        self.sum(owned * self.top_k, owned, self.top_k, is_last=True)

    def _all_gather(self) -> None:
        out, owned = self._transfers, self._owned
        metadata = self.top_k * (_ID_BYTES + _WEIGHT_BYTES) + self.payload.scales
        self.bookkeeping(owned, self.launches.choose)
        self.pack(owned, metadata)
        out.all_gather(Stage.DISPATCH, "stage", owned, self.payload.values, metadata)
        everywhere = np.full_like(owned, owned.sum())
        self.arrive(everywhere)
        self._own_experts()
        pairs = self._counts.pairs_of_ep_rank[self._ep_rank]
        self.sum(pairs, everywhere, self.top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "stage", owned, self.row_bytes)
        out.memory(Stage.COMBINE, 3 * owned * self.row_bytes)

    def _all_to_all(self) -> None:
        out, counts, owned = self._transfers, self._counts, self._owned
        layout = out.mesh.layout
        metadata = self.top_k * _ID_BYTES + self.payload.scales
        launches = self.launches
        self.bookkeeping(owned, launches.choose + launches.by_peer + launches.by_expert)
        if launches.counts_first:
            self._exchange_counts(2 * layout.ep)
        self.pack(counts.rows.sum(axis=1), metadata)
        out.all_to_all(
            Stage.DISPATCH, "ep", counts.rows[:, self._ep_rank], self.payload.values, metadata
        )
        arriving = self._arriving(counts.rows)
        out.all_gather(Stage.DISPATCH, "etp", arriving, self.payload.values, metadata)
        self.arrive(counts.rows.sum(axis=0)[self._ep_rank])
        self._own_experts()
        returning = self._arriving(counts.pairs)
        out.reduce_scatter(Stage.COMBINE, "etp", returning, self.row_bytes)
        back = counts.pairs[:, self._ep_rank].T
        out.all_to_all(Stage.COMBINE, "ep", back, self.row_bytes)
        self.sum(owned * self.top_k, owned, self.top_k, is_last=True)

    def _hierarchical(self) -> None:
        out, counts, owned, mesh = self._transfers, self._counts, self._owned, self._mesh
        size, num_nodes = mesh.ep_per_node, mesh.num_ep_nodes
        assert counts.node_rows is not None, "counted for this form"
        metadata = self.top_k * (_ID_BYTES + _WEIGHT_BYTES) + self.payload.scales
        self.bookkeeping(owned, self.launches.choose + 2 * self.launches.by_peer)
        self._exchange_counts(mesh.layout.ep + num_nodes)
        self.pack(counts.node_rows.sum(axis=1), metadata)
        between = counts.node_rows[:, self._ep_rank // size]
        out.all_to_all(Stage.DISPATCH, "ep_inter", between, self.payload.values, metadata)
        # [node of arrival, place in it, etp, place of the expert's rank]
        shape = num_nodes, size, self._etp, num_nodes, size
        inside = counts.rows.reshape(shape).sum(axis=0).transpose(2, 0, 1, 3)
        inside = inside.reshape(mesh.size, size)
        forwarded = inside.sum(axis=1)
        inside = inside[:, self._ep_rank % size]
        arriving = self._arriving(counts.rows)
        if size > 1:
            came = _came_to_node(counts.node_rows, shape)
            self.bookkeeping(came, self.launches.by_peer)
            moved = 2 * forwarded * (self.payload.values + metadata)
            if not self.launches.kernels_move:
                out.memory(Stage.DISPATCH, moved, self.launches.pack)
            out.all_to_all(Stage.DISPATCH, "ep_intra", inside, self.payload.values, metadata)
        out.all_gather(Stage.DISPATCH, "etp", arriving, self.payload.values, metadata)
        rows_there = counts.rows.sum(axis=0)[self._ep_rank]
        self.arrive(rows_there)
        self._own_experts()
        pairs = counts.pairs_of_ep_rank[self._ep_rank]
        self.sum(pairs, rows_there, self.top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "etp", arriving, self.row_bytes)
        if size > 1:
            out.all_to_all(Stage.COMBINE, "ep_intra", inside.T, self.row_bytes)
            self.sum(forwarded, came, size, is_last=False)
        out.all_to_all(Stage.COMBINE, "ep_inter", between.T, self.row_bytes)
        self.sum(counts.node_rows.sum(axis=1), owned, num_nodes, is_last=True)

    def _exchange_counts(self, num: int) -> None:
        """Each rank tells all others `num` numbers; what is packed meanwhile comes after."""
        ones = np.ones_like(self._owned)
        self._transfers.all_gather(
            Stage.DISPATCH, "stage", ones, 0, num * _COUNT_BYTES, num_steps_before_wait=1
        )

    def _arriving(self, rows: Ints) -> Ints:
        """[R]; of rows [R, ep], those that a rank takes in from ranks with its own etp_rank."""
        ep = rows.shape[1]
        arriving: Ints = rows.reshape(ep, self._etp, ep).sum(axis=0).T.ravel()
        return arriving


def _came_to_node(node_rows: Ints, shape: tuple[int, int, int, int, int]) -> Ints:
    """[R]; tokens that a rank takes in for its node from the ranks with its place on all nodes.

    Args:
        node_rows: [R, nodes].
        shape: nodes, places on each, etp, nodes, places.
    """
    num_nodes, size, etp = shape[:3]
    came: Ints = node_rows.reshape(num_nodes, size, etp, num_nodes).sum(axis=0)
    return came.transpose(2, 0, 1).ravel()


def form_of(form: DispatchForm, mesh: StageMesh) -> DispatchForm | None:
    """What a form comes down to on a stage; None where one rank has it all."""
    if mesh.size == 1:
        return None
    return "all_gather" if mesh.layout.ep == 1 else form

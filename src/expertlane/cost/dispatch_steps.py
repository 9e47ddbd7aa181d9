"""Dispatch, experts and combine of one layer as steps, in every form."""

import numpy as np

from expertlane.cost.batch_sizes import PartSizes
from expertlane.cost.dispatch_counts import DispatchCounts
from expertlane.cost.mlp_steps import shares
from expertlane.cost.number_types import PayloadBytes
from expertlane.cost.operation import Ints, Kind
from expertlane.cost.step_list import StepList
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Stage

_ID_BYTES, _WEIGHT_BYTES, _COUNT_BYTES = 4, 4, 8
_BOOKKEEPING_BYTES = 40  # read and written for a token-expert pair to be put in its place


class ExpertSteps:
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
        self._out = out
        self._launches = out.launches
        self._model = model
        self._part = part
        self._counts = counts
        self._form = form_of(form, out)
        self._payload = payload
        self._row_bytes = model.hidden_size * out.types.activation_bytes
        mesh = out.mesh
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

    @property
    def _top_k(self) -> int:
        return self._model.num_experts_per_tok

    def _bookkeeping(self, tokens: Ints, num_kernels: int) -> None:
        num_bytes = tokens * (self._top_k * _BOOKKEEPING_BYTES)
        self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def _pack(self, rows: Ints, metadata: int) -> None:
        """Rows [R] put together to be sent; encoded first where they are narrowed."""
        num_bytes, num_kernels = 2 * rows * (self._payload.values + metadata), self._launches.pack
        if self._payload.is_narrowed:
            encoded = self._row_bytes + self._payload.values + self._payload.scales
            num_bytes = num_bytes + self._part.owned * encoded
            num_kernels += self._launches.narrow
        self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def _arrive(self, rows: Ints) -> None:
        """Rows [R] whose pairs are sorted by expert, decoded where they were narrowed."""
        num_bytes, num_kernels = rows * (self._top_k * _BOOKKEEPING_BYTES), self._launches.by_expert
        if self._payload.is_narrowed:
            num_bytes = num_bytes + rows * (self._payload.values + self._row_bytes)
            num_kernels += self._launches.widen
        self._out.memory(Stage.DISPATCH, num_bytes, num_kernels)

    def _experts(self) -> None:
        model, out = self._model, self._out
        pairs = self._counts.pairs_of_ep_rank[self._ep_rank]
        active = self._counts.active_of_ep_rank[self._ep_rank]
        matrices = 3 if model.gated_mlp else 2
        inner = shares(model.moe_intermediate_size, self._etp, out.mesh.etp_rank)
        num_weights = inner * (model.hidden_size * matrices)
        launches = self._launches
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

    def _sum(self, terms: Ints, sums: Ints, most: int, *, is_last: bool) -> None:
        """Rows [R] added up to fewer; with the residual where it is the last of the block.

        Args:
            most: terms of a sum.
        """
        launches = self._launches
        num_rows, num_kernels = terms + sums, launches.sum_term * most + launches.sum_once
        if is_last:
            num_rows, num_kernels = num_rows + 3 * sums, num_kernels + 1
        self._out.memory(Stage.COMBINE, num_rows * self._row_bytes, num_kernels)

    def _local(self) -> None:
        owned = self._part.owned
        self._bookkeeping(owned, self._launches.by_expert)
        self._experts()
        self._sum(owned * self._top_k, owned, self._top_k, is_last=True)

    def _all_gather(self) -> None:
        out, owned = self._out, self._part.owned
        metadata = self._top_k * (_ID_BYTES + _WEIGHT_BYTES) + self._payload.scales
        self._bookkeeping(owned, self._launches.choose)
        self._pack(owned, metadata)
        out.all_gather(Stage.DISPATCH, "stage", owned, self._payload.values, metadata)
        everywhere = np.full_like(owned, owned.sum())
        self._arrive(everywhere)
        self._experts()
        pairs = self._counts.pairs_of_ep_rank[self._ep_rank]
        self._sum(pairs, everywhere, self._top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "stage", owned, self._row_bytes)
        out.memory(Stage.COMBINE, 3 * owned * self._row_bytes)

    def _all_to_all(self) -> None:
        out, counts, owned = self._out, self._counts, self._part.owned
        layout = out.mesh.layout
        metadata = self._top_k * _ID_BYTES + self._payload.scales
        launches = self._launches
        self._bookkeeping(owned, launches.choose + launches.by_peer + launches.by_expert)
        self._exchange_counts(2 * layout.ep)
        self._pack(counts.rows.sum(axis=1), metadata)
        out.all_to_all(
            Stage.DISPATCH, "ep", counts.rows[:, self._ep_rank], self._payload.values, metadata
        )
        arriving = self._arriving(counts.rows)
        out.all_gather(Stage.DISPATCH, "etp", arriving, self._payload.values, metadata)
        self._arrive(counts.rows.sum(axis=0)[self._ep_rank])
        self._experts()
        returning = self._arriving(counts.pairs)
        out.reduce_scatter(Stage.COMBINE, "etp", returning, self._row_bytes)
        back = counts.pairs[:, self._ep_rank].T
        out.all_to_all(Stage.COMBINE, "ep", back, self._row_bytes)
        self._sum(owned * self._top_k, owned, self._top_k, is_last=True)

    def _hierarchical(self) -> None:
        out, counts, owned, mesh = self._out, self._counts, self._part.owned, self._out.mesh
        size, num_nodes = mesh.ep_per_node, mesh.num_ep_nodes
        assert counts.node_rows is not None, "counted for this form"
        metadata = self._top_k * (_ID_BYTES + _WEIGHT_BYTES) + self._payload.scales
        self._bookkeeping(owned, self._launches.choose + 2 * self._launches.by_peer)
        self._exchange_counts(mesh.layout.ep + num_nodes)
        self._pack(counts.node_rows.sum(axis=1), metadata)
        between = counts.node_rows[:, self._ep_rank // size]
        out.all_to_all(Stage.DISPATCH, "ep_inter", between, self._payload.values, metadata)
        # [node of arrival, place in it, etp, place of the expert's rank]
        shape = num_nodes, size, self._etp, num_nodes, size
        inside = counts.rows.reshape(shape).sum(axis=0).transpose(2, 0, 1, 3)
        inside = inside.reshape(mesh.size, size)
        forwarded = inside.sum(axis=1)
        inside = inside[:, self._ep_rank % size]
        arriving = self._arriving(counts.rows)
        if size > 1:
            came = _came_to_node(counts.node_rows, shape)
            self._bookkeeping(came, self._launches.by_peer)
            moved = 2 * forwarded * (self._payload.values + metadata)
            out.memory(Stage.DISPATCH, moved, self._launches.pack)
            out.all_to_all(Stage.DISPATCH, "ep_intra", inside, self._payload.values, metadata)
        out.all_gather(Stage.DISPATCH, "etp", arriving, self._payload.values, metadata)
        rows_there = counts.rows.sum(axis=0)[self._ep_rank]
        self._arrive(rows_there)
        self._experts()
        pairs = counts.pairs_of_ep_rank[self._ep_rank]
        self._sum(pairs, rows_there, self._top_k, is_last=False)
        out.reduce_scatter(Stage.COMBINE, "etp", arriving, self._row_bytes)
        if size > 1:
            out.all_to_all(Stage.COMBINE, "ep_intra", inside.T, self._row_bytes)
            self._sum(forwarded, came, size, is_last=False)
        out.all_to_all(Stage.COMBINE, "ep_inter", between.T, self._row_bytes)
        self._sum(counts.node_rows.sum(axis=1), owned, num_nodes, is_last=True)

    def _exchange_counts(self, num: int) -> None:
        """Each rank tells all others `num` numbers; what is packed meanwhile comes after."""
        ones = np.ones_like(self._part.owned)
        self._out.all_gather(
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


def form_of(form: DispatchForm, out: StepList) -> DispatchForm | None:
    """What a form comes down to on a stage; None where one rank has it all."""
    mesh = out.mesh
    if mesh.size == 1:
        return None
    return "all_gather" if mesh.layout.ep == 1 else form

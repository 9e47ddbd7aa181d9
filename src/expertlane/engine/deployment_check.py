"""What can be known of a deployment before there are ranks."""

from expertlane.balance.placement_file import Placements, placements_of
from expertlane.errors import UserError
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import take


def check_deployment(model: ModelConfig, deployment: Deployment, ranks_per_node: int) -> Placements:
    """Check a deployment; gives the placement that its experts begin with.

    Args:
        ranks_per_node: 0 where only the launcher will know.

    Raises:
        UserError: the model cannot be laid out, its experts placed or moved, or its hidden
            states sent so.
    """
    layout, options = deployment.layout, deployment.options
    layout.check_model(model)
    take("ranks_per_node", ranks_per_node)
    if options.dispatch == "hierarchical" and ranks_per_node:
        layout.ep_ranks_per_node(ranks_per_node)
    if options.rebalance_steps and layout.ep == 1:
        raise UserError(
            f"rebalance_steps is {options.rebalance_steps}, but layout {layout} has ep=1, where no "
            "expert can move; valid: 0, or a layout with ep=2 or more"
        )
    if options.payload == "float8" and model.hidden_size % 4:
        raise UserError(
            f"payload float8 needs a hidden_size that is a multiple of 4; it is {model.hidden_size}"
        )
    return placements_of(model, layout, options)


def check_experiment(experiment: Experiment) -> None:
    """Check all deployments of an experiment.

    Raises:
        UserError: of the first one that cannot be; the text begins with its name.
    """
    for deployment in experiment.deployments + experiment.scaling:
        try:
            check_deployment(experiment.model, deployment, experiment.cluster.ranks_per_node)
        except UserError as error:
            raise UserError(f"deployment {deployment.name!r}: {error}") from None

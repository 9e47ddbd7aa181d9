"""Scripts that start an engine's best deployment on a cluster: `plan --scripts`."""

from expertlane.planner.commands import Serving
from expertlane.planner.kubernetes import kubernetes_manifest
from expertlane.planner.slurm import slurm_script


def scripts_of(serving: Serving) -> dict[str, str]:
    """Texts by file name: a batch script for Slurm, and a Kubernetes manifest.

    There is no manifest if MPI must start the ranks of several machines.
    """
    name = serving.engine.name
    made = {f"{name}.slurm.sh": slurm_script(serving)}
    manifest = kubernetes_manifest(serving)
    return made if manifest is None else made | {f"{name}.kubernetes.yaml": manifest}

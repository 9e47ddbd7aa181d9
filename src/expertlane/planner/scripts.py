"""Scripts that start an engine's best on a cluster, by the names of their files."""

from expertlane.planner.commands import Serving
from expertlane.planner.kubernetes import kubernetes_manifest
from expertlane.planner.slurm import slurm_script


def scripts_of(serving: Serving) -> dict[str, str]:
    """A batch script for Slurm, and a manifest for Kubernetes where there can be one."""
    name = serving.engine.name
    made = {f"{name}.slurm.sh": slurm_script(serving)}
    manifest = kubernetes_manifest(serving)
    return made if manifest is None else made | {f"{name}.kubernetes.yaml": manifest}

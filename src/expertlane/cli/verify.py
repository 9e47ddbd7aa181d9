"""`expertlane verify`: whether a server computes the model that it claims."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import randbelow
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import publishes
from expertlane.cli.options import seed_option
from expertlane.cli.server_options import (
    api_key_file_option,
    one_key_each,
    request_timeout_option,
    vocabulary,
)
from expertlane.errors import MissingExtraError, UserError, naming
from expertlane.spec.deployment import WeightsType
from expertlane.spec.names import Dtype

if TYPE_CHECKING:
    from expertlane.client.run import Target
    from expertlane.endpoint.scored import Reference
    from expertlane.endpoint.verify import VerifyOptions

_EXIT_CODES = {"same": 0, "differs": 1, "can't tell": 3}
_SCHEMES = ("http://", "https://")
_BUDGET_S, _QUICK_BUDGET_S = 240.0, 60.0
_NUM_PROMPTS, _NUM_QUICK = 48, 24
_TIMEOUT_S = 120.0


_Dtype = Literal[Dtype, "float8", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.SERVER
    reference: str = typer.Option(
        ...,
        metavar="CHECKPOINT|URL",
        help="What the server should compute: a checkpoint folder of the model, or a second "
        "server of it, such as another layout.",
    )
    dtype: _Dtype | None = typer.Option(
        None,
        show_default="the checkpoint's",
        help="Type of weights and activations. The one that the server computes in: differences "
        "that rounding to it makes are no errors.",
    )
    weights: WeightsType = typer.Option(
        "model",
        help="Type in which matrices are kept; int8 rounds them while loading, with a scale for "
        "every 128 inputs.",
    )
    tokenizer: Path | None = typer.Option(
        None,
        metavar="DIR",
        show_default="the checkpoint's, if it has one",
        help="Folder of the model's tokenizer. Required where a server takes text alone.",
    )
    api_key_file: list[Path] | None = api_key_file_option(
        " A second file is for a --reference URL."
    )
    quick: bool = typer.Option(
        False,
        help=f"Half the prompts, and --budget-s {_QUICK_BUDGET_S:g}: sees larger errors only.",
    )
    budget_s: float | None = typer.Option(
        None,
        show_default=f"{_BUDGET_S:g}",
        help="After about so long no further condition is begun; the output names those left out.",
    )
    request_timeout_s: float | None = request_timeout_option(f"{_TIMEOUT_S:g}")
    seed: int | None = seed_option(None, "drawn: then no prompt is in a prefix cache yet")

    def asked(self) -> "VerifyOptions":
        """Settings of a verification."""
        from expertlane.endpoint.verify import VerifyOptions

        usual_s = _QUICK_BUDGET_S if self.quick else _BUDGET_S
        return VerifyOptions(
            self.dtype if self.weights == "model" else self.weights,
            _NUM_QUICK if self.quick else _NUM_PROMPTS,
            usual_s if self.budget_s is None else self.budget_s,
            # What was asked in an earlier run may be in the server's cache.
            randbelow(2**31) if self.seed is None else self.seed,
            _TIMEOUT_S if self.request_timeout_s is None else self.request_timeout_s,
        )

    @property
    def is_url(self) -> bool:
        """Whether the reference is a server."""
        return self.reference.startswith(_SCHEMES)


_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="The model's name there; not needed if the server has only one."
    ),
]


@publishes
def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="A server with the OpenAI API.")],
    own: _Options,
    call: output.Call,
    model: _Model = None,
) -> output.Found:
    """Say whether a server computes the model that it claims.

    Wrong layouts, kernels and caches answer fluently and wrong. Here the server's
    log-probabilities of given tokens are compared, token by token, with those of a checkpoint in
    float32 or of a second server: alone and under load, in short and long contexts, generated and
    given, with the prefix cache cold and warm, on each data-parallel rank where one can be chosen.
    What rounding in the server's number type does is measured on the same tokens; such differences
    are no errors.

    \b
    Exit code
      0   same: no difference beyond rounding
      1   differs beyond rounding, or the server failed meanwhile
      2   a mistake in what was asked for, or no server there
      3   can't tell: the answer says why, and what would tell

    \b
    Examples:
      expertlane verify http://127.0.0.1:8000 --reference ./my-checkpoint
      expertlane verify http://127.0.0.1:8000 --reference http://127.0.0.1:8001
          two layouts of one model
      expertlane verify http://127.0.0.1:8000 --reference ./my-checkpoint \\
          --dtype float8 --quick && deploy
      expertlane verify http://127.0.0.1:8000 --reference ./my-checkpoint --json |
          jq '.deployments[0].verified.verdict'
    """
    from expertlane.client.connection import Url
    from expertlane.client.run import Target
    from expertlane.endpoint.verify import verify as verified
    from expertlane.results.record import DeploymentRecord
    from expertlane.results.results import Results

    asked, keys = own.asked(), one_key_each(own.api_key_file or [], 1 + own.is_url)
    target = Target(Url.parse(url, "URL"), keys[0], model)
    folder = call.folder(output.slug("verify", target.url.host, target.url.port))
    reference = _reference(own, keys, model)
    tokenizer = vocabulary(own.tokenizer, None if own.is_url else own.reference)
    with output.progress_on_stderr() as progress:
        record = verified(target, reference, own.reference, asked, tokenizer, progress)
    question = {
        "model": record.model,
        "url": record.url,
        "reference": own.reference,
        "seed": asked.seed,
        "num_prompts": asked.num_prompts,
        "budget_s": asked.budget_s,
    }
    deployment = DeploymentRecord(record.url, None, None, "measured", verified=record)
    results = Results.now("verify", call.command, question, [deployment])
    return output.Found(results, folder, exit_code=_EXIT_CODES[record.verdict])


def _reference(
    own: _Options, keys: "Sequence[str | None]", model: str | None
) -> "Reference | Target":
    """The checkpoint, or the second server.

    Raises:
        UserError: there is no such folder, packages are missing, or the URL is none.
    """
    if own.is_url:
        from expertlane.client.connection import Url
        from expertlane.client.run import Target

        return Target(Url.parse(own.reference, "--reference"), keys[-1], model)
    folder = Path(own.reference)
    if not folder.is_dir():
        raise UserError(
            f"--reference is {own.reference!r}; it must be a checkpoint folder, or a URL that "
            "begins with http://"
        )
    try:
        from expertlane.endpoint.reference import CheckpointReference
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"a checkpoint as the reference needs packages that are not installed ({error.name}): "
            "pip install 'expertlane[verify]'"
        ) from None
    with naming("--reference"):
        return CheckpointReference(folder)

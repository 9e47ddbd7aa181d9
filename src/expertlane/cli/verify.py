"""`expertlane verify`: whether a server computes the model that it claims."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    API_KEY,
    api_keys,
    key_lines,
    request_timeout_option,
    seed_option,
)
from expertlane.cli.output import OutputOptions
from expertlane.errors import MissingExtraError, UserError, naming
from expertlane.spec.deployment import WeightsType
from expertlane.spec.names import Dtype

if TYPE_CHECKING:
    from expertlane.client.run import Target
    from expertlane.client.server import Vocabulary
    from expertlane.endpoint.scored import Reference
    from expertlane.endpoint.verify import VerifyOptions

DIFFERS, UNTOLD = 1, 3  # exit codes
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
    api_key_file: list[Path] | None = typer.Option(
        None,
        metavar="FILE",
        show_default=f"{API_KEY}, else none",
        help="File with the API key. A second file is for a --reference URL.",
    )
    quick: bool = typer.Option(
        False,
        help=f"Half the prompts, and --budget-s {_QUICK_BUDGET_S:g}: sees larger errors only.",
    )
    budget_s: float | None = typer.Option(
        None,
        metavar="SECONDS",
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
            _drawn_seed() if self.seed is None else self.seed,
            _TIMEOUT_S if self.request_timeout_s is None else self.request_timeout_s,
        )

    def keys(self) -> "list[str | None]":
        """The server's API key, and that of a second one.

        Raises:
            UserError: a file cannot be read, or there are too many.
        """
        files = self.api_key_file or []
        if len(files) > 1 + self.is_url:
            raise UserError(f"--api-key-file is given {len(files)} times; once for each server")
        found: dict[str, str] = {}
        for path in files:
            own = key_lines(path)
            if len(own) > 1:
                raise UserError(f"--api-key-file: {path} has {len(own)} keys; one is needed")
            found |= own
        return [*api_keys(found)] or [None]

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


@takes_groups
def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="A server with the OpenAI API.")],
    own: _Options,
    output_options: OutputOptions,
    model: _Model = None,
) -> None:
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
    found = run(url, own, output.Call.typed(output_options.out), model)
    output.publish(found, output_options)
    record = found.results.deployments[0].verified
    assert record is not None, "made by run"
    if record.verdict != "same":
        raise typer.Exit(DIFFERS if record.verdict == "differs" else UNTOLD)


def run(url: str, own: _Options, call: output.Call, model: _Model = None) -> output.Found:
    """Verify, and return the results; prints nothing on standard output."""
    from expertlane.client.connection import Url
    from expertlane.client.run import Target
    from expertlane.endpoint.verify import verify as verified
    from expertlane.results.record import DeploymentRecord
    from expertlane.results.results import Results

    asked, keys = own.asked(), own.keys()
    target = Target(Url.parse(url, "URL"), keys[0], model)
    folder = call.folder(output.slug("verify", target.url.host, target.url.port))
    reference = _reference(own, keys, model)
    tokenizer = _tokenizer(own)
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
    return output.Found(Results.now("verify", call.command, question, [deployment]), folder)


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


def _tokenizer(own: _Options) -> "Vocabulary | None":
    from expertlane.client.server import Vocabulary

    if own.tokenizer is not None:
        with naming("--tokenizer"):
            return Vocabulary.of_folder(own.tokenizer)
    return None if own.is_url else Vocabulary.of_name(own.reference)


def _drawn_seed() -> int:
    """A seed of the moment: what was asked in an earlier run may be in the server's cache."""
    import secrets

    return secrets.randbelow(2**31)

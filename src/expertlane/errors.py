"""The errors that expertlane raises on purpose.

ExpertlaneError
├── UserError       a mistake in what was asked for: one line, exit code 2
│   ├── SpecError       a layout, workload, model or experiment that cannot be
│   ├── CapacityError   more memory or ranks than this machine has
│   └── MissingExtraError  what was asked for needs an extra that is not installed
├── ModelError      the logits are NaN or infinite: one line, exit code 1
├── RankError       a rank died, hung or failed while it ran: one line, exit code 1
│   └── RanksLostError  the same where others go on: the engine replaces it
└── TerminatedError the process was told to end: one line, exit code 128 + the signal's number
"""

import errno
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from expertlane.printable import printable

_SHORT = 4  # characters of a name that many would contain
_LONG = 100  # of one that is no name
_MOST_NEAR, _ALIKE = 3, 0.75  # names that may have been meant, and how alike
# Other programs' names, in small letters and digits alone, and those that mean the same here.
_ALIASES = {
    **dict.fromkeys(("fp32", "f32", "float", "single"), ("float32",)),
    **dict.fromkeys(("fp16", "f16", "half"), ("float16",)),
    **dict.fromkeys(("bf16", "bfloat", "brain"), ("bfloat16",)),
    **dict.fromkeys(("fp8", "f8", "e4m3", "float8e4m3", "float8e4m3fn", "int8"), ("float8",)),
    **dict.fromkeys(("fp8e4m3", "fp8e5m2", "float8e5m2", "w8a8"), ("float8",)),
    **dict.fromkeys(("fp4", "f4", "float4", "e2m1"), ("nvfp4", "mxfp4")),
    **dict.fromkeys(("i4", "w4", "w4a16", "uint4", "4bit", "awq", "gptq"), ("int4",)),
    "sgl": ("sglang",),
    **dict.fromkeys(("tensorrt", "tensorrtllm", "trt"), ("trtllm",)),
}


class ExpertlaneError(Exception):
    """Base of all errors raised on purpose; its text is one line for the user."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__().replace("\n", " "))  # it may quote a name with line ends


class UserError(ExpertlaneError):
    """What was asked for is wrong; the text says what, and what would be valid."""

    exit_code = 2


class SpecError(UserError):
    """A model, layout, workload, deployment or experiment breaks a rule."""


class CapacityError(UserError):
    """The request is valid but this machine is too small for it."""


class MissingExtraError(UserError, ImportError):
    """Packages of an extra are not installed; the text has the command that installs them."""


class ModelError(ExpertlaneError):
    """A model gave logits that are NaN or infinite; the text names the request."""


class RankError(ExpertlaneError):
    """A rank died, hung or raised; the text names rank, layer and stage."""


class RanksLostError(RankError):
    """Ranks of a pool that recovers were lost: it waits for `RankPool.begin_epoch`.

    Args:
        ranks: dead, hung or failed ones; none where transfers broke and no rank was found to be
            the cause, so that a new epoch is all that is needed.
    """

    def __init__(self, text: str, ranks: Collection[int]) -> None:
        super().__init__(text)
        self.ranks = frozenset(ranks)


class TerminatedError(ExpertlaneError):
    """The process was told to end by SIGTERM or SIGHUP."""

    exit_code = 143  # 128 + SIGTERM, as shells have it


def no_room(error: OSError) -> str:
    """The system limit behind an error, with the command that raises it where a user can."""
    import resource

    if error.errno == errno.EMFILE:
        return f"too few file descriptors: {_limit(resource.RLIMIT_NOFILE, 'ulimit -n', 4096)}"
    if error.errno == errno.ENFILE:
        return "too many files are open on this machine; end programs, or raise fs.file-max"
    if error.errno == errno.EAGAIN:
        return f"too few processes: {_limit(resource.RLIMIT_NPROC, 'ulimit -u', 16384)}"
    return error.strerror or str(error)


def _limit(number: int, command: str, wanted: int) -> str:
    """The present limit, and how to raise it."""
    import resource

    soft, hard = resource.getrlimit(number)
    if soft == resource.RLIM_INFINITY:
        return "the limit is the machine's, a container's or a batch system's; raise it there"
    wanted = max(wanted, 4 * soft)
    shown = f"{command} {wanted}"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        shown += f" (its hard limit is {hard}: raise that as root, or where it was set)"
    return f"the limit is {soft}; raise it with {shown}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`did you mean --skew?`: the names that are like the one that was given; empty without any.

    In whatever case it was given, also by the name that another program has for it.
    """
    from difflib import get_close_matches

    if len(given) > _LONG:
        return ""
    given, names = given.lower(), {name.lower(): name for name in known}
    plain = "".join(filter(str.isalnum, given))
    near = [name for name in _ALIASES.get(plain, ()) if name in names]
    if not near and len(given) > _SHORT:
        near = [name for name in names if given.strip("-") in name]
    near = near or get_close_matches(given, names, cutoff=_ALIKE)
    near = [names[given]] if given in names else [names[name] for name in near[:_MOST_NEAR]]
    return f"did you mean {' or '.join(near)}?" if near else ""


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Begin the text of a user's mistake with the place where it was made, such as a file.

    Raises:
        UserError: the one that was raised, of its own class.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}") from None


def require_extra(name: str, what: str) -> None:
    """Check that the packages of an extra can be imported, without importing them.

    The metadata of the installed expertlane lists them; where it is not installed, as when only its
    sources are on the path, nothing is checked.

    Args:
        name: the extra.
        what: what needs it, such as "serving"; the text begins with it.

    Raises:
        MissingExtraError: one or more packages cannot be imported.
    """
    import re
    from importlib.metadata import PackageNotFoundError, requires
    from importlib.util import find_spec

    try:
        needed = [each.replace('"', "'") for each in requires("expertlane") or ()]
    except PackageNotFoundError:
        return
    packages = [re.split(r"[^\w.-]", each)[0] for each in needed if f"extra == '{name}'" in each]
    if missing := [each for each in packages if find_spec(each.replace("-", "_")) is None]:
        raise MissingExtraError(
            f"{what} needs packages that are not installed ({', '.join(missing)}): "
            f"pip install 'expertlane[{name}]'"
        )

"""Laws of kernels and links, and the profiles of devices that have them; without numpy."""

from pathlib import Path


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with expertlane, by name."""
    folder = Path(__file__).parent / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}

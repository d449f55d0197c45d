"""What the package carries: a tiny base model and an instruction set for the quickstart."""

from pathlib import Path
from typing import Final

from rslightning.errors import UserError

PREFIX: Final = "asset:"


def resolve_asset(name: str) -> str:
    """Return the folder or file that `asset:NAME` stands for; any other name as it is.

    Raises:
        UserError: If the package has no such asset.
    """
    if not name.startswith(PREFIX):
        return name
    path = Path(__file__).parent / name.removeprefix(PREFIX)
    if not path.exists():
        names = sorted(
            p.name for p in path.parent.iterdir() if p.suffix != ".py" and p.name[0] != "_"
        )
        raise UserError(f"There is no {name}; the package has {', '.join(names)}.")
    return str(path)

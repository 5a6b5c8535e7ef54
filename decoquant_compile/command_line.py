"""What the command lines of the instruments share; needs click, as they do."""

import pathlib
from collections.abc import Callable

import click


def out(does: str, *suffixes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option ``--out`` for files; checks before anything is measured that they can be written.

    Args:
        does: what is written, for the help.
        suffixes: of the files that can be.
    """
    endings = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))

    def check(
        _context: click.Context, _parameter: click.Parameter, paths: tuple[pathlib.Path, ...]
    ) -> tuple[pathlib.Path, ...]:
        for path in paths:
            if path.suffix not in suffixes:
                raise click.BadParameter(f"{str(path)!r}: expected a name that ends in {endings}")
            if not path.absolute().parent.is_dir():
                raise click.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
        return paths

    return click.option(
        "--out",
        type=click.Path(dir_okay=False, writable=True, path_type=pathlib.Path),
        callback=check,
        multiple=True,
        metavar="FILE",
        help=f"{does}; may be given again.",
    )

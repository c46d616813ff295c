"""The command line: from files to results, one command for each task."""

from typing import Annotated

import typer

from pyromosaic import __version__
from pyromosaic.cli import linking, training, trying, using

app = typer.Typer(
    name="pyromosaic",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyromosaic {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Integrate single cells that were measured by RNA, chromatin, surface protein, or any mix of them."""


for command in (
    trying.demo,
    trying.check,
    training.integrate,
    training.align,
    training.contrast,
    linking.link,
    using.query,
    using.differential,
    trying.simulate,
):
    app.command()(command)

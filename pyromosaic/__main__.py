"""`python -m pyromosaic` is the command `pyromosaic`."""

from pyromosaic.cli import app

app(prog_name="pyromosaic")

"""`python -m pyromosaic` is the command `pyromosaic`."""

from pyromosaic.cli import app

if __name__ == "__main__":
    app(prog_name="pyromosaic")

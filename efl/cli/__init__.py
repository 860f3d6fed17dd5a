"""The ``efl`` command. ``efl --help`` lists what it can do; each command has a module of its own."""

from __future__ import annotations

import click

import efl
from efl.cli.certs import certs
from efl.cli.keygen import keygen
from efl.cli.run import run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(efl.__version__, prog_name="efl")
def main() -> None:
    """Vertical federated learning: parties that hold different columns of the same rows train one model."""


main.add_command(certs)
main.add_command(keygen)
main.add_command(run)

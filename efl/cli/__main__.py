"""``python -m efl.cli`` is ``efl``, for an environment whose scripts are not on the PATH."""

from efl.cli import main

main(prog_name="efl")

"""`python -m fewbit`: the command line."""

from fewbit.cli import main

__all__: list[str] = []

main()

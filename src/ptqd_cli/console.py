"""The console that tables and help are printed to."""

from rich.console import Console


class Output(Console):
    """A console of rich's that leaves a closed pipe to the entry point."""

    def on_broken_pipe(self) -> None:
        """Rich's own would end the process.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError

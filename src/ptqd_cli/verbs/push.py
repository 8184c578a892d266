"""``ptqd push``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import tell


@Parameter(name="*")
@dataclass(frozen=True)
class Push:
    """Put a quantized pipeline on the Hugging Face hub, with a model card made from the run's report."""

    folder: Annotated[Path, Parameter(name="run", help="run folder, or a quantized pipeline's folder")]
    repository: Annotated[str, Parameter(help="USER/NAME on the hub; made where it does not exist")]
    _: KW_ONLY
    row: Annotated[
        str | None, Parameter(help="of a run folder: recipe and correction, 'w4a8 auto' (default: the last row)")
    ] = None
    base_model: Annotated[str | None, Parameter(help="hub id of the model that it was made from")] = None
    private: Annotated[bool, Parameter(help="let others not see it")] = False

    def run(self) -> None:
        """Upload, and say where it is."""
        from ptqd.experiments.push_to_hub import push_to_hub

        address = push_to_hub(
            self.folder, self.repository, row=self.row, base_model=self.base_model, private=self.private or None
        )
        tell(f"{self.repository}: {address}")

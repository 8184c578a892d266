"""``ptqd convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import check_replaceable


@Parameter(name="*")
@dataclass(frozen=True)
class Convert:
    """Make a diffusers pipeline of a checkpoint in CompVis' latent-diffusion format and its YAML."""

    checkpoint: Annotated[Path, Parameter(help="model.ckpt, or its state dict as .safetensors")]
    config: Annotated[Path, Parameter(help="the YAML that came with it")]
    out: Annotated[Path, Parameter(help="folder to write")]

    def run(self) -> None:
        """Convert, and save."""
        from ptqd.diffusion.compvis.pipeline import convert, save_converted
        from ptqd.files import replacing

        check_replaceable(self.out)
        pipe = convert(self.checkpoint, self.config)
        with replacing(self.out) as temporary:
            save_converted(pipe, temporary)
        count = sum(p.numel() for p in pipe.unet.parameters())
        print(f"{self.out}: {type(pipe).__name__}, {count:,} parameters in the UNet")

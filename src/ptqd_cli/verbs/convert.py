"""``ptqd convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import tell


@Parameter(name="*")
@dataclass(frozen=True)
class Convert:
    """Make a diffusers pipeline of a checkpoint of latent diffusion, guided-diffusion, consistency models or EDM."""

    checkpoint: Annotated[Path, Parameter(help="model.ckpt, or a state dict as .pt or .safetensors")]
    config: Annotated[
        Path,
        Parameter(
            help="CompVis' YAML; or .json or .toml: the flags of guided-diffusion's or consistency_models' command "
            "line, the arguments of EDM's network"
        ),
    ]
    out: Annotated[Path, Parameter(help="folder to write")]

    def run(self) -> None:
        """Convert, and save."""
        from ptqd.diffusion.compvis.pipeline import save_converted
        from ptqd.diffusion.converters.family import convert
        from ptqd.outputs import output_folder

        with output_folder(self.out, [self.checkpoint, self.config]) as out:
            pipe = convert(self.checkpoint, self.config)
            with out.replacing() as temporary:
                save_converted(pipe, temporary)
        count = sum(p.numel() for p in pipe.unet.parameters())
        tell(f"{self.out}: {type(pipe).__name__}, {count:,} parameters in the UNet")

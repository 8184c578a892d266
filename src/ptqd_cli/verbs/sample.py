"""``ptqd sample``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, JudgeOptions, SamplingOptions


@Parameter(name="*")
@dataclass(frozen=True)
class Sample:
    """Sample images: one safetensors file, a grid, and PNG files or ADM's .npz if asked for; resumes after a kill."""

    model: Annotated[str, Parameter(help=MODEL_HELP)]
    _: KW_ONLY
    out: Annotated[Path, Parameter(help="folder to write")]
    png: Annotated[bool, Parameter(help="write every image as a PNG file too")] = False
    npz: Annotated[bool, Parameter(help="write samples.npz too, as ADM's evaluation takes it")] = False
    no_images: Annotated[
        bool, Parameter(help="keep what the judge sees of images as they come, and only the first few images")
    ] = False
    judging: JudgeOptions = JudgeOptions()
    samples: Annotated[int, Parameter(help="how many")] = 64
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Sample, and write what is asked for."""
        from PIL import Image

        from ptqd import processes
        from ptqd.diffusion.fingerprints import pipeline_fingerprint
        from ptqd.errors import InputError
        from ptqd.experiments.report.grids import grid
        from ptqd.experiments.sharding import labels_of, load_images, sample_images
        from ptqd.files import replacing
        from ptqd.metrics.images import write_npz
        from ptqd.run_folder import RunFolder

        if self.no_images and (self.png or self.npz):
            raise InputError("--no-images keeps none to write; leave it out, or --png and --npz")
        judge = self.judging.load("none", self.sampling.device, needs_reference=False)
        if self.no_images and (judge is None or judge.extractor is None):
            raise InputError("--no-images keeps what a judge sees of them; give --judge")
        pipe = self.sampling.load(self.model)
        run = self.sampling.of(pipe, self.samples)
        inputs: dict[str, Any] = {"pipeline": pipeline_fingerprint(pipe), "setting": run.to_dict()}
        if judge is not None:
            inputs |= {"networks": judge.networks_key, "images": not self.no_images}

        def build(path: Path, scratch: Path) -> None:
            sample_images(pipe, run, path, scratch, title="sampling", judge=judge, keep=not self.no_images)

        path = RunFolder(self.out).stage("samples.safetensors", inputs, build, shared=True)
        if not processes.is_main():
            return
        images = load_images(path)
        with replacing(self.out / "grid.png") as temporary:
            grid([*images[:100].split(10)] if len(images) >= 10 else [images]).save(temporary, "PNG")
        if self.png:
            for i, image in enumerate(images.numpy()):
                with replacing(self.out / f"{i:06d}.png") as temporary:
                    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")
        if self.npz:
            write_npz(self.out / "samples.npz", images, labels_of(run, len(images)))
        parts = ["images"] * (not self.no_images) + ["what the judge sees of them"] * (judge is not None)
        print(f"{self.out}: {run.samples} samples, {' and '.join(parts)}, grid.png")

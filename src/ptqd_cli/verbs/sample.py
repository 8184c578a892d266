"""``ptqd sample``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, JudgeOptions, SamplingOptions, tell

if TYPE_CHECKING:
    from ptqd.diffusion.sampling import Sampling
    from ptqd.run_folder import RunFolder


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
    floats: Annotated[
        bool,
        Parameter(
            help="keep the samples after the last step as floats too, of pipelines that diffuse pixels; others' are"
        ),
    ] = False
    judging: JudgeOptions = JudgeOptions()
    samples: Annotated[int, Parameter(help="how many")] = 64
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Sample, and write what is asked for."""
        from ptqd import processes
        from ptqd.diffusion.fingerprints import pipeline_fingerprint
        from ptqd.errors import InputError
        from ptqd.experiments.sharding import sample_images
        from ptqd.outputs import check_output, claim
        from ptqd.run_folder import RunFolder, whole_file

        if self.no_images and (self.png or self.npz):
            raise InputError("--no-images keeps none to write; leave it out, or --png and --npz")
        self.sampling.check_all(self.samples)
        check_output(self.out, [self.model, self.judging.reference])
        if processes.is_main():
            claim(self.out, "samples")
        judge = self.judging.load("none", self.sampling.device, needs_reference=False)
        if self.no_images and (judge is None or judge.extractor is None):
            raise InputError("--no-images keeps what a judge sees of them; give --judge")
        pipe = self.sampling.load(self.model)
        run = self.sampling.of(pipe, self.samples)
        inputs: dict[str, Any] = {"pipeline": pipeline_fingerprint(pipe), "setting": run.to_dict()}
        if judge is not None:
            inputs |= {"networks": judge.networks_key, "images": not self.no_images}
        if self.floats:
            inputs["floats"] = True

        def build(path: Path, scratch: Path) -> None:
            keep = not self.no_images
            sample_images(pipe, run, path, scratch, title="sampling", judge=judge, keep=keep, floats=self.floats)

        folder = RunFolder(self.out, "samples")
        path = folder.value("samples.safetensors", inputs, build, whole_file, shared=True)
        if not processes.is_main():
            return
        pictures = self._write_pictures(folder, path, run)
        parts = ["images"] * (not self.no_images) + ["what the judge sees of them"] * (judge is not None) + pictures
        tell(f"{self.out}: {run.samples} samples, {', '.join(parts)}")

    def _write_pictures(self, folder: "RunFolder", path: Path, run: "Sampling") -> list[str]:
        """What is made of the samples; nothing remains of what was made of others before. Returns what it is."""
        from PIL import Image

        from ptqd.experiments.report.grids import grid
        from ptqd.experiments.sharding import labels_of, load_images
        from ptqd.files import replacing
        from ptqd.metrics.images import write_npz
        from ptqd.outputs import say

        images = load_images(path)
        drawable = images.ndim == 4 and images.shape[-1] in (1, 3)
        wanted = ["grid.png"] * drawable
        wanted += [f"{i:06d}.png" for i in range(len(images) if self.png and drawable else 0)]
        folder.own(wanted + ["samples.npz"] * self.npz, only=True)
        if drawable:
            with replacing(folder.path("grid.png")) as temporary:
                grid([*images[:100].split(10)] if len(images) >= 10 else [images]).save(temporary, "PNG")
        else:
            say(f"results of shape {tuple(images.shape[1:])} are neither grey nor RGB images; no pictures are written")
        for name, image in zip(wanted[1:], images.numpy(), strict=False):
            with replacing(folder.path(name), lasting=False) as temporary:
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")
        if self.npz:
            write_npz(folder.path("samples.npz"), images, labels_of(run, range(len(images))))
        return wanted[:1] + ["PNG files"] * (len(wanted) > 1) + ["samples.npz"] * self.npz

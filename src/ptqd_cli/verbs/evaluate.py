"""``ptqd evaluate``."""

import re
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ptqd_cli.options import Device, JudgeOptions, tell


@Parameter(name="*")
@dataclass(frozen=True)
class Evaluate:
    """Judge images against a reference, and against full-precision samples of the same seeds; resumes after a kill."""

    samples: Annotated[Path, Parameter(help="folder that 'ptqd sample' wrote, another of images, or an .npz")]
    _: KW_ONLY
    against: Annotated[
        Path | None, Parameter(help="full-precision samples of the same seeds, for distances to them")
    ] = None
    judging: JudgeOptions = JudgeOptions()
    classes: Annotated[
        int | None,
        Parameter(
            help="sample i was asked for class i mod this; 0: for none (default: the classes that are kept with the "
            "samples, or in an .npz as arr_1)"
        ),
    ] = None
    prompts: Annotated[Path | None, Parameter(help="a prompt on each line, in turn; for --clip")] = None
    out: Annotated[Path | None, Parameter(help="JSON file to write")] = None
    batch: Annotated[int, Parameter(help="images at once")] = 64
    device: Device = None

    def run(self) -> None:
        """Evaluate, and print the metrics as JSON."""
        from ptqd import processes
        from ptqd.diffusion.sampling import MOST_CLASSES, Sampling
        from ptqd.errors import InputError
        from ptqd.experiments.sharding import check_same_seeds, few_samples, observed_samples
        from ptqd.files import to_json, write_json
        from ptqd.loading import check_device
        from ptqd.metrics.evaluator import Evaluator
        from ptqd.outputs import check_file, check_files, is_json_of, say

        if self.prompts is not None and self.judging.clip is None:
            raise InputError("--prompts go with --clip; give both or none")
        check_same_seeds(self.samples, self.against)
        if self.classes is not None and not 0 <= self.classes <= MOST_CLASSES:
            raise InputError(f"--classes must be 0 to {MOST_CLASSES:,}; got {self.classes}")
        Sampling(batch=self.batch)
        check_device(self.device)
        for path in (self.samples, self.against):
            if path is not None and not path.exists() and (path.suffix or path.is_absolute()):
                raise InputError(f"{path} does not exist; give a folder of images, an .npz or a .safetensors file")
        check_files({"--out": self.out}, [self.samples, self.against, self.prompts, self.judging.reference])
        check_file(self.out, is_json_of("value", "low", "high", each=True), "result of 'ptqd evaluate'")
        judge = self.judging.load(self._default_judge(), self.device) or Evaluator()
        if judge.extractor is None and self.against is None and (judge.clip is None or self.prompts is None):
            raise InputError("nothing judges these images; give --judge, --against, or --clip with --prompts")
        call: dict[str, Any] = {"class_labels": list(range(self.classes))} if self.classes else {}
        if self.prompts is not None:
            call["prompt"] = _lines(self.prompts)
        run = Sampling(call=call, batch=self.batch)
        count, intervals = observed_samples(
            self.samples, self.against, judge, run, title="looking at images", kept_labels=self.classes != 0
        )
        if not processes.is_main():
            return
        metrics = {name: asdict(metric) for name, metric in intervals.items()}
        if self.out is not None:
            write_json(self.out, metrics)
        tell(to_json(metrics))
        note = few_samples(count, judge)
        if note is not None:
            say(note)

    def _default_judge(self) -> str:
        """The embedded models' of grey images of their size, as 'ptqd run' has it for these models; else none."""
        from ptqd.errors import InputError
        from ptqd.metrics.features.fashion_classifier import FashionClassifier
        from ptqd.metrics.images import open_images

        try:
            image = open_images(self.samples, grey=False).part(range(1))
        except InputError:  # said by whoever reads it
            return "fashion"
        grey = bool((image == image[..., :1]).all())
        return "fashion" if grey and image.shape[1:3] == FashionClassifier.image_shape[:2] else "none"


def _lines(path: Path) -> list[str]:
    from ptqd.errors import InputError
    from ptqd.files import read_text

    try:
        lines = re.split(r"\r\n|\n|\r", read_text(path))
    except InputError as error:
        raise InputError(f"{error}; give a file with a prompt on each line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"{path} has no prompt on line {number}; give one on each line")
    if not lines:
        raise InputError(f"{path} is empty; give a file with a prompt on each line")
    return lines

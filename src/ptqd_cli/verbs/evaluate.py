"""``ptqd evaluate``."""

import json
import sys
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ptqd_cli.options import Device, JudgeOptions


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
    classes: Annotated[int, Parameter(help="sample i was asked for class i mod this; 0: unconditional")] = 10
    prompts: Annotated[Path | None, Parameter(help="a prompt on each line, in turn; for --clip")] = None
    out: Annotated[Path | None, Parameter(help="JSON file to write")] = None
    batch: Annotated[int, Parameter(help="images at once")] = 64
    device: Device = None

    def run(self) -> None:
        """Evaluate, and print the metrics as JSON."""
        from ptqd import processes
        from ptqd.diffusion.sampling import Sampling
        from ptqd.errors import InputError
        from ptqd.experiments.sharding import few_samples, observed_samples
        from ptqd.files import write_json
        from ptqd.metrics.evaluator import Evaluator

        judge = self.judging.load("fashion", self.device) or Evaluator()
        if judge.extractor is None and self.against is None and (judge.clip is None or self.prompts is None):
            raise InputError("nothing judges these images; give --judge, --against, or --clip with --prompts")
        call: dict[str, Any] = {"class_labels": list(range(self.classes))} if self.classes else {}
        if self.prompts is not None:
            call["prompt"] = _lines(self.prompts)
        run = Sampling(call=call, batch=self.batch)
        count, intervals = observed_samples(self.samples, self.against, judge, run, title="looking at images")
        if not processes.is_main():
            return
        metrics = {name: asdict(metric) for name, metric in intervals.items()}
        if self.out is not None:
            write_json(self.out, metrics)
        print(json.dumps(metrics, indent=2))
        note = few_samples(count, judge)
        if note is not None:
            print(note, file=sys.stderr)


def _lines(path: Path) -> list[str]:
    from ptqd.errors import InputError

    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}; give a file with a prompt on each line") from error

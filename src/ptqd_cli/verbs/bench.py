"""``ptqd bench``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import MODEL_HELP, SAMPLING, Device, Others, SamplingOptions, ScheduleOptions, consent, show, tell
from ptqd_cli.quantized_rows import quantized_rows


@Parameter(name="*")
@dataclass(frozen=True)
class Bench:
    """Time a quantized pipeline in every engine that is installed, beside full precision, in turn, in one table."""

    folder: Annotated[Path, Parameter(name="run", help="run folder, or a quantized pipeline's folder")]
    _: KW_ONLY
    row: Annotated[
        tuple[str, ...],
        Parameter(help="of a run folder; may be given again (default: the last row of each recipe)"),
    ] = ()
    model: Annotated[str | None, Parameter(help=f"in full precision (default: the run's): {MODEL_HELP}")] = None
    engine: Annotated[
        tuple[str, ...],
        Parameter(help="torch, torch.compile, onnxruntime or openvino; may be given again (default: all)"),
    ] = ()
    others: Others = "fp32"
    repeats: Annotated[int, Parameter(help="batches timed of each")] = 5
    threads: Annotated[int, Parameter(help="of the CPU (default: as torch)")] = 0
    out: Annotated[
        Path | None, Parameter(help="of a pipeline's folder: where to keep what is exported, for the next time")
    ] = None
    fetch: Annotated[bool, Parameter(help="fetch the run's model from the hub without asking")] = False
    json: Annotated[Path | None, Parameter(help="file to write all values to")] = None
    schedule: ScheduleOptions = ScheduleOptions()
    batch: Annotated[int, Parameter(group=SAMPLING, help="at once")] = 32
    seed: Annotated[int, Parameter(group=SAMPLING, help="sample i's seed comes from this and i")] = 0
    device: Annotated[Device, Parameter(group=SAMPLING)] = None

    def run(self) -> None:
        """Time, and print the table; of a run folder the report keeps it."""
        from dataclasses import asdict

        from ptqd.errors import InputError
        from ptqd.experiments.benchmark import check_engines, time_engines
        from ptqd.experiments.report.speed import speed_table
        from ptqd.files import write_json
        from ptqd.loading import best_device
        from ptqd.outputs import check_file, check_files, claim, is_json_of

        options = SamplingOptions(
            **{name: getattr(self.schedule, name) for name in self.schedule.__dataclass_fields__},
            batch=self.batch,
            seed=self.seed,
            device=self.device,
            dtype="float32",
        )
        options.check_all()
        check_engines(self.engine, self.repeats, self.threads)
        check_files({"--json": self.json, "--out": self.out}, [self.folder, self.model])
        check_file(self.json, is_json_of("title", "rows", "without"), "result of 'ptqd bench'")
        if self.out is not None:
            claim(self.out, "engines")
        rows = quantized_rows(self.folder, list(self.row) or None, options, self.batch)
        if self.model is None:
            consent(str(self.folder), [rows.model], "--model", fetch=self.fetch)
        model = self.model or rows.model
        if model is None:
            raise InputError("give --model, the pipeline in full precision that this one was quantized from")
        speed = time_engines(
            options.load(model),
            rows.pipes,
            rows.sampling.replace(batch=self.batch),
            self.folder,
            self.out,
            engines=list(self.engine) or None,
            others=self.others,
            repeats=self.repeats,
            threads=self.threads,
            device=self.device or best_device(),
        )
        if self.json is not None:
            write_json(self.json, asdict(speed))
        show(speed_table(speed), width=160)
        tell("".join(f"  without {what}: {reason}\n" for what, reason in speed.without.items()), end="")

"""``ptqd run``."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from ptqd_cli.options import (
    METHODS_HELP,
    MODEL_HELP,
    PLANNING,
    JudgeOptions,
    PlanOptions,
    SamplingOptions,
    correction_methods,
    show,
)

if TYPE_CHECKING:
    from ptqd.experiments.study import Study

PLANNED, PLANNED_WEIGHTS = "w8a4+5+6+7+8", "4,5,6,7,8"  # what a plan chooses among where no recipe says
SAMPLES = 256
STUDY = Group("A study", sort_key=4)
MEASURED = 64


@Parameter(name="*")
@dataclass(frozen=True)
class Run:
    """Quantize, measure, correct, sample, evaluate and report, into one run folder; finished stages are skipped."""

    model: Annotated[
        str,
        Parameter(name="MODEL", help=f"{MODEL_HELP}; or a study, a TOML file such as those under reproduce/"),
    ]
    _: KW_ONLY
    recipe: Annotated[
        tuple[str, ...], Parameter(help=f"shorthand or TOML file; may be given again (with --plan: {PLANNED})")
    ] = ()
    plan: Annotated[
        str | None,
        Parameter(group=PLANNING, help="auto: the least error for a budget; paper: PTQD's rule; or a plan's file"),
    ] = None
    planning: PlanOptions = PlanOptions()
    out: Annotated[Path | None, Parameter(help="run folder")] = None
    pipeline: Annotated[
        str | None, Parameter(name="--model", group=STUDY, help="the converted checkpoint it is about")
    ] = None
    twin: Annotated[bool, Parameter(group=STUDY, help="on the embedded model, at a size that two cores run")] = False
    dry_run: Annotated[bool, Parameter(group=STUDY, help="build it on the meta device, and print what it takes")] = (
        False
    )
    gpu: Annotated[str, Parameter(group=STUDY, help="for --dry-run: whose time to estimate")] = "rtx3090"
    measured: Annotated[int, Parameter(help="samples the statistics are taken on")] = MEASURED
    methods: Annotated[str, Parameter(help=METHODS_HELP)] = "auto"
    ablation: Annotated[bool, Parameter(help="rows for none, cnc, cnc,bc, cnc,bc,vsc and auto")] = False
    no_images: Annotated[
        bool, Parameter(help="keep what the judge sees of images as they come, and only the first few images")
    ] = False
    wide: Annotated[bool, Parameter(help="print every metric and cost")] = False
    judging: JudgeOptions = JudgeOptions()
    samples: Annotated[int | None, Parameter(help=f"how many (default: {SAMPLES}, or the study's)")] = None
    sampling: SamplingOptions = SamplingOptions()

    def run(self) -> None:
        """Run an experiment or a study, and show its report."""
        if Path(self.model).suffix == ".toml":
            self._study()
        else:
            self._experiment()

    def _experiment(self) -> None:
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.experiment import ABLATION, Experiment, named_recipes
        from ptqd.experiments.manifest import run_with_manifest
        from ptqd.zoo import MODELS
        from ptqd_cli.show_report import show_report

        if self.out is None:
            raise InputError("give --out, a run folder")
        if self.dry_run or self.twin or self.pipeline is not None:
            raise InputError(
                "--dry-run, --twin and --model go with a study, a TOML file such as those under reproduce/"
            )
        recipes, request = self.recipe, None
        if self.plan is not None:
            weights = PLANNED_WEIGHTS if self.plan == "auto" and not recipes else None
            recipes = recipes or (PLANNED,)
            request = self.planning.request(self.plan, weights)
        elif self.planning.any:
            raise InputError("--budget, --floor, --weights and --groups go with --plan auto; give that too")
        if not recipes:
            raise InputError("give a --recipe, such as w4a8, or a --plan")
        named, methods = named_recipes(recipes), correction_methods(self.methods)
        samples = SAMPLES if self.samples is None else self.samples
        corrections = ABLATION if self.ablation else ((), methods)
        self.sampling.check_all(samples)
        settings = (self.sampling.sampling(None, samples=samples, batch=self.sampling.batch, seed=self.sampling.seed),)
        Experiment(self.model, settings, named, self.measured, corrections, request, not self.no_images).check()
        self._claim(self.model, *recipes, self.plan)
        judge = self.judging.load("fashion" if self.model in MODELS else "none", self.sampling.device)
        if self.no_images and (judge is None or judge.extractor is None):
            raise InputError("--no-images keeps what a judge sees of them; give --judge")
        pipe = self.sampling.load(self.model)
        experiment = Experiment(
            model=self.model,
            settings=(self.sampling.of(pipe, samples),),
            recipes=named,
            measured=self.measured,
            corrections=corrections,
            plan=request,
            images=not self.no_images,
        )
        report, _ = run_with_manifest(pipe, experiment, self.out, judge)
        if processes.is_main():
            show_report(report, self.out, wide=self.wide)

    def _claim(self, *inputs: str | None) -> None:
        """Whether the run folder may be written, before any work."""
        from ptqd import processes
        from ptqd.outputs import check_output, claim

        assert self.out is not None
        check_output(self.out, [*inputs, self.judging.reference])
        if processes.is_main():
            claim(self.out, "run")

    def _study(self) -> None:
        from ptqd import processes
        from ptqd.errors import InputError
        from ptqd.experiments.manifest import run_with_manifest
        from ptqd.experiments.report.study import estimate_table, published_table
        from ptqd.experiments.study import Study, compare_with_published, estimate
        from ptqd_cli.show_report import show_report

        self._refuse_what_the_study_says()
        if self.twin and self.pipeline is not None:
            raise InputError("--twin runs on the embedded model; leave out --model")
        study, model = Study.load(Path(self.model)), self.pipeline
        if self.twin:
            study, model = study.as_twin(), study.twin.model
        if self.samples is not None:
            study = dataclasses.replace(study, sampling=dataclasses.replace(study.sampling, samples=self.samples))
        if self.dry_run:
            show(estimate_table(study, estimate(study, model, images=not self.no_images), self.gpu), width=160)
            return
        if model is None:
            raise InputError(
                f"give --model, the folder of {study.architecture} (see 'ptqd convert'), --twin or --dry-run"
            )
        if self.out is None:
            raise InputError("give --out, a run folder")
        judging = self._judging(study)
        self.sampling.check_all(study.sampling.samples)
        self._claim(self.model, model)
        experiment = dataclasses.replace(study.experiment(model), images=not self.no_images)
        judge = judging.load("none", self.sampling.device)
        report, _ = run_with_manifest(self.sampling.load(model), experiment, self.out, judge)
        if not processes.is_main():
            return
        if study.published:
            report.published = compare_with_published(study, report.rows)
            report.save(self.out)
            show(published_table(report.published), width=160)
        show_report(report, self.out, wide=self.wide)

    def _refuse_what_the_study_says(self) -> None:
        from ptqd.errors import InputError

        mine, defaults = self.sampling, SamplingOptions()
        given = [name for name in ("recipe", "plan", "ablation") if getattr(self, name)]
        given += [name for name in ("budget", "floor", "weights", "groups") if getattr(self.planning, name)]
        given += [name for name in ("call", "shared", "guidance", "scheduler") if getattr(mine, name)]
        given += [name for name in ("steps", "eta", "seed") if getattr(mine, name) != getattr(defaults, name)]
        given += ["measured"] * (self.measured != MEASURED) + ["methods"] * (self.methods != "auto")
        if given:
            raise InputError(f"{self.model} says what is run; leave out {', '.join(f'--{name}' for name in given)}")

    def _judging(self, study: "Study") -> JudgeOptions:
        """What the study is judged by, where the command does not say."""
        from ptqd.errors import InputError

        if self.twin:
            return dataclasses.replace(self.judging, judge=self.judging.judge or "fashion")
        reference = self.judging.reference
        if reference is None:
            reference = Path(study.judge.reference)
            if not reference.exists():
                raise InputError(f"{reference} is not here; get {study.judge.published_at} and give its --reference")
        return dataclasses.replace(self.judging, judge=self.judging.judge or study.judge.features, reference=reference)

"""The command line: verbs only. torch is imported when a verb runs, so that ``--help`` is quick."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqd.errors import InputError, PtqdError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ptqd.diffusion.sampling import Sampling
    from ptqd.metrics.evaluator import Judge

RECIPE = "w4a8-best"
PLANNED, PLANNED_WEIGHTS = "w8a4+5+6+7+8", "4,5,6,7,8"  # what a plan chooses among where no recipe says
MODEL_HELP = "fashion-ldm, -ddpm, -dit or -flow, a diffusers pipeline's folder, or a hub id"
METHODS_HELP = (
    "auto, or for the mean cnc,bc, tac, d2 or joint; and for the variance vsc, dns, qdrift or stepbaq "
    "(default: %(default)s)"
)


def _cmd_convert(args: argparse.Namespace) -> None:
    """Make a diffusers pipeline of a checkpoint in CompVis' latent-diffusion format and its YAML."""
    from ptqd.diffusion.compvis.pipeline import convert, save_converted
    from ptqd.files import replacing

    _check_replaceable(args.out)
    pipe = convert(args.checkpoint, args.config)
    with replacing(args.out) as temporary:
        save_converted(pipe, temporary)
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"{args.out}: {type(pipe).__name__}, {count:,} parameters in the UNet")


def _cmd_quantize(args: argparse.Namespace) -> None:
    """Quantize a pipeline's denoiser and save it as a diffusers folder of packed codes; resumes after a kill."""
    import shutil

    from rich.console import Console

    from ptqd.experiments.report.layers import layer_table
    from ptqd.files import replacing
    from ptqd.quantization.explain import explain
    from ptqd.quantization.hf_quantizer import coverage_of
    from ptqd.quantization.quantize import quantize
    from ptqd.quantization.recipe import Recipe

    if args.out is None and not args.explain:
        raise InputError("give --out, a folder to write the pipeline to, or --explain")
    recipe = Recipe.parse(args.recipe)
    if args.out is not None:
        _check_replaceable(args.out)
    pipe = _pipeline(args, args.model)
    run = _sampling(args, pipe)
    scratch = None if args.out is None else args.out.parent / f".{args.out.name}.{_key(pipe, recipe.to_dict(), run)}"
    quantized = quantize(pipe, recipe, run, scratch=scratch, progress=True)
    matched = coverage_of(quantized)
    if args.out is not None:
        with replacing(args.out) as temporary:
            quantized.save_pretrained(temporary)
        shutil.rmtree(scratch, ignore_errors=True)  # type: ignore[arg-type]
        print(f"{args.out}: {len(matched.quantized)} layers and attention products quantized")
    if args.explain:
        Console(width=None if sys.stdout.isatty() else 160).print(layer_table(explain(pipe, quantized, run)))
    print("".join(f"  in full precision: {name} ({reason})\n" for name, reason in matched.skipped), end="")


def _cmd_measure(args: argparse.Namespace) -> None:
    """Measure, step by step, what quantization did to a pipeline's denoiser; resumes after a kill."""
    import shutil

    from ptqd import processes
    from ptqd.experiments.sharding import measure_shards
    from ptqd.noise.stats import NoiseStats

    pipe, quantized = _pipeline(args, args.model), _pipeline(args, args.quantized)
    run = _sampling(args, pipe)
    scratch = args.out.parent / f".{args.out.name}.{_key(pipe, quantized, run)}"
    measure_shards(pipe, quantized, run, args.out, scratch, title="measuring")
    if not processes.is_main():
        return
    shutil.rmtree(scratch)
    stats = NoiseStats.load(args.out)
    fit, repeated = stats.fit(), stats.residual_correlation()
    print(f"{args.out}: {stats.samples} samples, {len(stats.timesteps)} steps")
    for i, t in enumerate(stats.timesteps.tolist()):
        print(
            f"  t {t:5.0f}  k {fit.k.value[i]:+.4f} [{fit.k.low[i]:+.4f}, {fit.k.high[i]:+.4f}]"
            f"  R2 {fit.r2.value[i]:.3f}  "
            f"residual variance {fit.variance.value[i]:.2e}  SNR {fit.snr.value[i]:.1f}  "
            f"kurtosis {fit.kurtosis.value[i]:+.1f}" + (f"  repeats {repeated[i, i - 1]:.2f}" if i else "")
        )


def _cmd_correct(args: argparse.Namespace) -> None:
    """Give a quantized pipeline a scheduler that corrects, and save it."""
    from ptqd.correction.scheduler import correct
    from ptqd.correction.search import describe, fit_auto
    from ptqd.files import replacing
    from ptqd.noise.stats import NoiseStats

    _check_replaceable(args.out)
    methods, stats, quantized = _methods(args.methods), NoiseStats.load(args.noise), _pipeline(args, args.quantized)
    if methods == ("auto",):
        if args.steps not in (None, stats.measured_on.steps):
            raise InputError(f"auto runs the {stats.measured_on.steps} steps that were measured; name methods instead")
        args.steps, args.eta, args.samples = stats.measured_on.steps, stats.measured_on.eta, stats.samples
        args.guidance = stats.measured_on.call.get("guidance_scale")
        choice = fit_auto(quantized, stats, _sampling(args, quantized), progress=True)
        print("\n".join(describe(choice.trials)))
        corrected = correct(quantized, choice.correction)
    else:
        corrected = correct(quantized, stats, methods, steps=args.steps)
    with replacing(args.out) as temporary:
        corrected.save_pretrained(temporary)
    print(f"{args.out}: corrects {','.join(corrected.scheduler.correction.methods) or 'nothing'}")


def _cmd_plan(args: argparse.Namespace) -> None:
    """Choose a quantized pipeline's bits step by step, and save it with its plan; measured widths survive a kill."""
    import shutil

    from ptqd import processes
    from ptqd.experiments.plan_request import PlanRequest, load_widths, make_plan
    from ptqd.experiments.sharding import measure_width_shards
    from ptqd.files import replacing
    from ptqd.quantization.apply_plan import apply_plan

    _check_replaceable(args.out)
    request = PlanRequest.parse(args.plan, args.budget, args.floor, args.weights, args.groups)
    pipe, quantized = _pipeline(args, args.model), _pipeline(args, args.quantized)
    run = _sampling(args, pipe)
    scratch = args.out.parent / f".{args.out.name}.{_key(pipe, quantized, run)}"
    stats = {}
    if request.given is None:
        measure_width_shards(pipe, quantized, run, scratch / "widths", scratch, title="measuring widths")
    if not processes.is_main():
        return
    if request.given is None:
        stats = load_widths(scratch / "widths")
    plan, _ = make_plan(pipe, quantized, run, request, stats, progress=True)
    planned = apply_plan(quantized, plan, pipe)
    with replacing(args.out) as temporary:
        planned.save_pretrained(temporary)
        plan.save(temporary / "plan.toml")
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"{args.out}: {plan.steps} steps, groups of layers: {len(plan.groups)}")
    print("".join(f"  {name.replace('_', ' ')}: {value}\n" for name, value in plan.made.items()), end="")
    for i, (t, row) in enumerate(zip(plan.timesteps, plan.bits, strict=True)):
        print(f"  step {i:3d}  t {t:7g}  bits {' '.join(map(str, row))}")


def _cmd_cost(args: argparse.Namespace) -> None:
    """Count multiply-accumulates, bit operations, parameters and bytes, without the weights where that suffices."""
    from rich.console import Console

    from ptqd.experiments.report.cost import cost_json, cost_table, counted
    from ptqd.loading import with_scheduler

    cost = counted(
        args.model,
        args.recipe,
        args.plan,
        lambda pipe: _sampling(args, pipe),
        lambda pipe: with_scheduler(pipe, args.scheduler),
    )
    if args.json:
        print(json.dumps(cost_json(cost), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in cost_table(str(args.model), cost, layers=args.layers):
        console.print(part)


def _cmd_sample(args: argparse.Namespace) -> None:
    """Sample images: one safetensors file, a grid, and PNG files or ADM's .npz if asked for; resumes after a kill."""
    from PIL import Image

    from ptqd import processes
    from ptqd.diffusion.fingerprints import pipeline_fingerprint
    from ptqd.experiments.report.pictures import grid
    from ptqd.experiments.sharding import labels_of, load_images, sample_images
    from ptqd.files import replacing
    from ptqd.metrics.images import write_npz
    from ptqd.run_folder import RunFolder

    if args.no_images and (args.png or args.npz):
        raise InputError("--no-images keeps none to write; leave it out, or --png and --npz")
    judge = _judge(args, needs_reference=False)
    if args.no_images and (judge is None or judge.extractor is None):
        raise InputError("--no-images keeps what a judge sees of them; give --judge")
    pipe = _pipeline(args, args.model)
    run = _sampling(args, pipe)
    inputs: dict[str, Any] = {"pipeline": pipeline_fingerprint(pipe), "setting": run.to_dict()}
    if judge is not None:
        inputs |= {"networks": judge.networks_key, "images": not args.no_images}
    path = RunFolder(args.out).stage(
        "samples.safetensors",
        inputs,
        lambda target, scratch: sample_images(
            pipe, run, target, scratch, title="sampling", judge=judge, keep=not args.no_images
        ),
        shared=True,
    )
    if not processes.is_main():
        return
    images = load_images(path)
    with replacing(args.out / "grid.png") as temporary:
        grid([*images[:100].split(10)] if len(images) >= 10 else [images]).save(temporary, "PNG")
    if args.png:
        for i, image in enumerate(images.numpy()):
            with replacing(args.out / f"{i:06d}.png") as temporary:
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")
    if args.npz:
        write_npz(args.out / "samples.npz", images, labels_of(run, len(images)))
    kept = ["images"] * (not args.no_images) + ["what the judge sees of them"] * (judge is not None)
    print(f"{args.out}: {run.samples} samples, {' and '.join(kept)}, grid.png")


def _cmd_evaluate(args: argparse.Namespace) -> None:
    """Judge images against a reference, and against full-precision samples of the same seeds; resumes after a kill."""
    from dataclasses import asdict

    from ptqd import processes
    from ptqd.diffusion.sampling import Sampling
    from ptqd.experiments.sharding import few_samples, observed_samples
    from ptqd.files import write_json
    from ptqd.metrics.evaluator import Judge

    judge = _judge(args) or Judge()
    if judge.extractor is None and args.against is None and (judge.clip is None or args.prompts is None):
        raise InputError("nothing judges these images; give --judge, --against, or --clip with --prompts")
    call: dict[str, Any] = {"class_labels": list(range(args.classes))} if args.classes else {}
    if args.prompts is not None:
        call["prompt"] = _lines(args.prompts)
    count, found = observed_samples(
        args.samples, args.against, judge, Sampling(call=call, batch=args.batch), title="looking at images"
    )
    if not processes.is_main():
        return
    metrics = {name: asdict(metric) for name, metric in found.items()}
    if args.out is not None:
        write_json(args.out, metrics)
    print(json.dumps(metrics, indent=2))
    note = few_samples(count, judge)
    if note is not None:
        print(note, file=sys.stderr)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}; give a file with a prompt on each line") from error


def _cmd_export(args: argparse.Namespace) -> None:
    """Write a quantized pipeline for an engine that multiplies integers; 'ptqd sample' and ptqd.load run it."""
    from ptqd.export.export import export

    _check_replaceable(args.out)
    pipes, run, _ = _kept(args, [args.row] if args.row else None)
    *_, pipe = pipes.values()
    made = export(pipe, run, args.engine, args.out, others=args.others, provider=args.provider, layout=args.layout)
    products = made.products
    print(f"{args.out}: {', '.join(made.components)} for {args.engine}")
    print(f"  products of integers: {len(products.integer)}; in floating point: {len(products.floating)}")
    print("".join(f"  in floating point: {name} ({reason})\n" for name, reason in products.floating), end="")


def _cmd_bench(args: argparse.Namespace) -> None:
    """Time a quantized pipeline in every engine that is installed, beside full precision, in turn, in one table."""
    from rich.console import Console

    from ptqd.experiments.report.speed import speed_table
    from ptqd.files import write_json

    facts = _timed(args)
    if args.json is not None:
        write_json(args.json, facts)
    Console(width=None if sys.stdout.isatty() else 160).print(speed_table(facts))
    print("".join(f"  without {what}: {reason}\n" for what, reason in facts["without"].items()), end="")


def _timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds by engine, which a run folder's report keeps."""
    from tempfile import TemporaryDirectory

    from ptqd.experiments.benchmark import contestants, race
    from ptqd.experiments.report.speed import speed_facts
    from ptqd.files import read_json, write_json
    from ptqd.loading import best_device
    from ptqd.run_folder import RunFolder

    pipes, run, model = _kept(args, args.row)
    run = run.replace(batch=args.batch)
    model = args.model or model
    if model is None:
        raise InputError("give --model, the pipeline in full precision that this one was quantized from")
    full, device, report = _pipeline(args, model), args.device or best_device(), args.run / "report.json"
    with TemporaryDirectory() as temporary:
        folder = RunFolder(args.run if report.is_file() else args.out or Path(temporary))
        found, refused = contestants(full, pipes, run, folder, args.engine, others=args.others, progress=True)
        timings, failed = race(found, run, repeats=args.repeats, threads=args.threads, device=device, progress=True)
    facts = speed_facts(timings, refused | failed, run, args.threads, device)
    if report.is_file():
        write_json(report, read_json(report) | {"speed": facts})
    return facts


def _kept(
    args: argparse.Namespace, names: Sequence[str] | None
) -> "tuple[dict[str, DiffusionPipeline], Sampling, str | None]":
    """The quantized pipelines of a run folder's rows, how they were sampled, and of which model; or a folder's own."""
    from ptqd.experiments.experiment import pipeline_of
    from ptqd.experiments.results import chosen_rows, row_name, sampling_of

    if not (args.run / "report.json").is_file():
        if names is not None:
            raise InputError(f"{args.run} is no run folder (it has no report.json), so it has no rows; leave out --row")
        pipe = _pipeline(args, args.run)
        return {args.run.name: pipe}, _sampling(args, pipe), None
    rows = chosen_rows(args.run, names)
    pipes = {row["recipe"] if names is None else row_name(row): pipeline_of(args.run, row) for row in rows}
    return pipes, sampling_of(rows[-1]), rows[-1]["model"]


def _cmd_report(args: argparse.Namespace) -> None:
    """Write a run folder's report.html and print its table."""
    from rich.console import Console

    from ptqd import processes
    from ptqd.experiments.report.page import write_page
    from ptqd.experiments.report.speed import speed_table
    from ptqd.experiments.report.table import markdown_table, terminal_table
    from ptqd.files import read_json
    from ptqd.progress import busy

    if not processes.is_main():
        return
    with busy("writing the report"):
        page = write_page(args.run)
    report = read_json(args.run / "report.json")
    if args.markdown:
        print(markdown_table(report["rows"]))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(terminal_table(report["rows"]))
    if "speed" in report:
        console.print(speed_table(report["speed"]))
    print(f"{args.run / 'report.json'}\n{page}")


def _cmd_compare(args: argparse.Namespace) -> None:
    """Compare the rows of run folders, on the same seeds: one table with paired differences and cost."""
    from rich.console import Console

    from ptqd.experiments.compare import compare_runs
    from ptqd.experiments.report import comparison
    from ptqd.files import write_json, write_text
    from ptqd.progress import busy

    if args.out is not None and args.format == "terminal":
        raise InputError("--out goes with --format markdown, html or latex")
    with busy("comparing"):
        rows = compare_runs(args.run, _judge(args), args.against)
    if args.json is not None:
        write_json(args.json, rows)
    if args.format == "terminal":
        Console(width=None if sys.stdout.isatty() else 240).print(*comparison.terminal(rows))
        return
    text = {"markdown": comparison.markdown, "html": comparison.page, "latex": comparison.latex}[args.format](rows)
    if args.out is None:
        print(text, end="")
    else:
        write_text(args.out, text)


def _cmd_run(args: argparse.Namespace) -> None:
    """Quantize, measure, correct, sample, evaluate and report, into one run folder; finished stages are skipped."""
    from ptqd.experiments.experiment import ABLATION, Experiment, named_recipes
    from ptqd.experiments.manifest import run_with_manifest
    from ptqd.experiments.plan_request import PlanRequest
    from ptqd.zoo import MODELS

    if Path(args.model).suffix == ".toml":
        _run_study(args)
        return
    if args.out is None:
        raise InputError("give --out, a run folder")
    if args.dry_run or args.twin or args.pipeline is not None:
        raise InputError("--dry-run, --twin and --model go with a study, a TOML file such as those under reproduce/")
    plan = None
    if args.plan is not None:
        if not args.recipe:
            args.recipe = [PLANNED]
            args.weights = args.weights or (PLANNED_WEIGHTS if args.plan == "auto" else None)
        plan = PlanRequest.parse(args.plan, args.budget, args.floor, args.weights, args.groups)
    elif args.budget or args.floor or args.weights or args.groups:
        raise InputError("--budget, --floor, --weights and --groups go with --plan auto; give that too")
    if not args.recipe:
        raise InputError("give a --recipe, such as w4a8, or a --plan")
    args.samples = 256 if args.samples is None else args.samples
    pipe = _pipeline(args, args.model)
    experiment = Experiment(
        model=str(args.model),
        settings=(_sampling(args, pipe),),
        recipes=named_recipes(args.recipe),
        measured=args.measured,
        corrections=ABLATION if args.ablation else ((), _methods(args.methods)),
        plan=plan,
        images=not args.no_images,
    )
    judge = _judge(args, default="fashion" if args.model in MODELS else "none")
    run_with_manifest(pipe, experiment, args.out, judge)
    args.run, args.markdown = args.out, False
    _cmd_report(args)


def _run_study(args: argparse.Namespace) -> None:
    """A file such as those under ``reproduce/``, or what it will take."""
    import dataclasses

    from rich.console import Console

    from ptqd import processes
    from ptqd.experiments.manifest import run_with_manifest
    from ptqd.experiments.report.study import outlook_table, published_table
    from ptqd.experiments.study import Study, held_against, outlook
    from ptqd.files import read_json, write_json

    said = ("recipe", "plan", "ablation", "budget", "floor", "weights", "groups", "call", "guidance", "scheduler")
    given = [name for name in said if getattr(args, name)]
    defaults = parser().parse_args(["run", "x"])
    given += [n for n in ("steps", "eta", "seed", "measured", "methods") if getattr(args, n) != getattr(defaults, n)]
    if given:
        raise InputError(f"{args.model} says what is run; leave out {', '.join(f'--{name}' for name in given)}")
    if args.twin and args.pipeline is not None:
        raise InputError("--twin runs on the embedded model; leave out --model")
    study, model = Study.load(Path(args.model)), args.pipeline
    if args.twin:
        study, model = study.as_twin(), study.twin.model
    if args.samples is not None:
        study = dataclasses.replace(study, sampling=dataclasses.replace(study.sampling, samples=args.samples))
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.dry_run:
        console.print(outlook_table(study, outlook(study, model, images=not args.no_images), args.gpu))
        return
    if model is None:
        raise InputError(f"give --model, the folder of {study.architecture} (see 'ptqd convert'), --twin or --dry-run")
    if args.out is None:
        raise InputError("give --out, a run folder")
    args.judge = args.judge or ("fashion" if args.twin else study.judge.features)
    if not args.twin and args.reference is None:
        args.reference = Path(study.judge.reference)
        if not args.reference.exists():
            raise InputError(f"{args.reference} is not here; get {study.judge.published_at} and give its --reference")
    experiment = dataclasses.replace(study.experiment(str(model)), images=not args.no_images)
    run_with_manifest(_pipeline(args, model), experiment, args.out, _judge(args))
    args.run, args.markdown = args.out, False
    if processes.is_main() and study.published:
        report = read_json(args.out / "report.json")
        report["published"] = held_against(study, report["rows"])
        write_json(args.out / "report.json", report)
        console.print(published_table(report["published"]))
    _cmd_report(args)


def _cmd_demo(args: argparse.Namespace) -> None:
    """The main job on the embedded fashion-ldm, in the paper's two settings."""
    from ptqd import processes
    from ptqd.experiments.demo import SIZES, demo
    from ptqd.experiments.manifest import run_with_manifest

    recipes = tuple(args.recipe) if args.recipe else None
    changes = {"samples": args.samples, "stochastic_steps": args.stochastic_steps, "recipes": recipes}
    size = SIZES[args.size] | {name: value for name, value in changes.items() if value is not None}
    args.judge, args.reference, args.lpips, args.clip = "fashion", None, None, None
    run_with_manifest(_pipeline(args, "fashion-ldm"), demo(**size), args.out, _judge(args))
    args.run, args.markdown = args.out, False
    if args.size != "quick" and processes.is_main():
        args.row, args.model, args.engine = None, None, ["onnxruntime", "openvino"]
        args.batch, args.repeats, args.threads, args.others = 32, 3, 0, "fp32"
        _timed(args)
    _cmd_report(args)


def _cmd_reproduce(args: argparse.Namespace) -> int:
    """Run what a manifest says again, and say of every figure whether it agrees within its interval."""
    from rich.console import Console

    from ptqd import processes
    from ptqd.experiments.manifest import load_manifest, reproduce
    from ptqd.experiments.report.reproduction import reproduction_table

    manifest = load_manifest(args.manifest)
    if args.out.resolve() in (args.manifest.resolve(), args.manifest.resolve().parent):
        raise InputError(f"{args.out} holds the manifest's own results; choose another folder for --out")
    pipe = _pipeline(args, args.model or manifest["model"])
    options = (manifest["judge"] or {}).get("options", {})
    for name in ("reference", "lpips", "clip"):
        if getattr(args, name) is None and options.get(name) is not None:
            setattr(args, name, Path(options[name]) if name == "reference" else options[name])
    judge = _judge(args, default=options.get("judge") or ("fashion" if manifest["judge"] else "none"))
    found = reproduce(manifest, pipe, args.out, judge)
    if not processes.is_main():
        return 0
    Console(width=None if sys.stdout.isatty() else 160).print(reproduction_table(found))
    print("".join(f"  changed: {change}\n" for change in found.changed), end="")
    differing = sum(not figure.agrees for figure in found.figures)
    print(f"{len(found.figures) - differing} of {len(found.figures)} figures agree within their intervals")
    return 1 if differing else 0


def _pipeline(args: argparse.Namespace, model: str | Path) -> "DiffusionPipeline":
    from ptqd import processes
    from ptqd.loading import best_device, load, with_scheduler

    pipe = with_scheduler(load(model), getattr(args, "scheduler", None))
    try:
        return pipe.to(processes.device() or args.device or best_device())
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _sampling(args: argparse.Namespace, pipe: "DiffusionPipeline | None") -> "Sampling":
    """How a pipeline is run; or, of None, a denoiser on its own."""
    import inspect

    from ptqd.diffusion.sampling import Sampling

    accepted = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {}
    if pipe is not None and "class_labels" in accepted:
        embedder = getattr(pipe, "class_embedder", None)
        known = range(embedder.config.classes) if embedder is not None else getattr(pipe, "labels", {}).values()
        call |= {"class_labels": sorted(set(known))} if known else {}
    if args.guidance is not None:
        call["guidance_scale"] = args.guidance
    for text in args.call or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--call {text!r} must be NAME=VALUE, the value in JSON")
        try:
            call[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(
                f"--call {name}: {value!r} is not JSON ({error}); quote strings, as in '\"a cat\"'"
            ) from error
    return Sampling(args.steps, args.eta, args.samples, args.batch, args.seed, call)


def _key(pipe: "DiffusionPipeline", other: Any, run: "Sampling") -> str:
    """What unfinished work on a pipeline, and another or plain values, is kept under."""
    from hashlib import sha256

    from ptqd.diffusion.fingerprints import pipeline_fingerprint

    with_what = other if isinstance(other, dict) else pipeline_fingerprint(other)
    inputs = [pipeline_fingerprint(pipe), with_what, run.to_dict()]
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _check_replaceable(folder: Path) -> None:
    """Only a pipeline's folder, or an empty one, is written over."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds other things than a pipeline; choose an empty or a new folder")


def _methods(text: str) -> tuple[Any, ...]:
    from ptqd.correction.fit import METHODS
    from ptqd.experiments.experiment import check_methods

    given = [part.strip() for part in text.split(",") if part.strip()]
    if given == ["auto"]:
        return ("auto",)
    check_methods(given)
    return tuple(method for method in METHODS if method in given)


def _judge(args: argparse.Namespace, *, default: str = "none", needs_reference: bool = True) -> "Judge | None":
    """What ``--judge``, ``--reference``, ``--lpips`` and ``--clip`` name; None without any of them."""
    from ptqd import processes
    from ptqd.loading import best_device
    from ptqd.metrics.evaluator import Judge
    from ptqd.metrics.features.extractor import Extractor, Reference
    from ptqd.metrics.features.fashion_classifier import FashionClassifier
    from ptqd.metrics.features.image_encoder import ImageEncoder
    from ptqd.metrics.features.inception import Inception
    from ptqd.metrics.features.lpips import Lpips
    from ptqd.metrics.references import load_reference
    from ptqd.zoo import CLASSIFIER, REFERENCE

    name, reference = args.judge or default, args.reference
    options = {"judge": name, "reference": None if reference is None else str(reference)}
    options |= {"lpips": args.lpips, "clip": args.clip}
    device = processes.device() or getattr(args, "device", None) or best_device()
    lpips: Lpips | None = None
    clip: ImageEncoder | None = None
    extractor: Extractor
    known: Reference | None = None
    if args.lpips is not None:
        lpips = Lpips.from_pretrained(Path(args.lpips) if args.lpips else None).to(device)
    if args.clip is not None:
        clip = ImageEncoder.from_pretrained(args.clip, texts=True)
        clip.model.to(device)
    if name == "none":
        if reference is not None:
            raise InputError("--reference goes with a --judge: fashion, inception, or an image encoder of transformers")
        named = " and ".join(["LPIPS"] * (lpips is not None) + [f"{args.clip}"] * (clip is not None))
        return Judge(name=named, lpips=lpips, clip=clip, options=options) if named else None
    shown, against = name, reference
    if name == "fashion":
        extractor, shown = (
            FashionClassifier.from_pretrained(CLASSIFIER).float().eval(),
            "ptqd's Fashion-MNIST classifier",
        )
    elif name == "inception" or Path(name).suffix in (".pth", ".pt", ".safetensors"):
        extractor = Inception.from_pretrained(None if name == "inception" else Path(name)).to(device)
        shown = "Inception v3 of the FID literature"
    else:
        encoder = ImageEncoder.from_pretrained(name)
        encoder.model.to(device)
        extractor = encoder
    if reference is not None or name == "fashion":
        known = load_reference(reference or REFERENCE, extractor)
    elif needs_reference:
        raise InputError(
            f"--judge {name} needs --reference: a folder of images, a dataset, an .npz or a .safetensors file"
        )
    if name == "fashion" and reference is None:
        against = "the 10,000 test images"
    return Judge(extractor, known, f"{shown}, against {against}", lpips, clip, options)


def _add_judge(parser: argparse.ArgumentParser, default: str | None = "fashion") -> None:
    group = parser.add_argument_group("judging")
    chosen = "%(default)s" if default else "fashion for the embedded models, none for others"
    group.add_argument(
        "--judge",
        default=default,
        help="features: fashion, none, inception (or its weights' file), or an image encoder of transformers, "
        f"folder or hub id (default: {chosen})",
    )
    group.add_argument(
        "--reference",
        type=Path,
        help="what images are compared with: a folder of images, a dataset's folder or hub id (with :SPLIT), .npz, or "
        ".safetensors (default: fashion's test images)",
    )
    group.add_argument(
        "--lpips",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="LPIPS to images of the same seeds too; its weights' folder (default: torch hub's)",
    )
    group.add_argument(
        "--clip", metavar="NAME", help="CLIP score of prompts too: a CLIP of transformers, folder or hub id"
    )


def _add_no_images(parser: argparse.ArgumentParser) -> None:
    text = "keep what the judge sees of images as they come, and only the first few images themselves"
    parser.add_argument("--no-images", action="store_true", help=text)


def _add_schedule(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    group.add_argument("--eta", type=float, default=0.0, help="noise of DDIM's step (default: %(default)s)")
    group.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    group.add_argument("--scheduler", help="a diffusers scheduler class to use instead of the pipeline's")
    group.add_argument("--call", action="append", metavar="NAME=JSON", help="a further argument of the pipeline's call")
    group.set_defaults(samples=1, batch=1, seed=0)
    return group


def _add_sampling(parser: argparse.ArgumentParser, samples: int | None) -> None:
    group = _add_schedule(parser)
    if samples is not None:
        group.add_argument("--samples", type=int, default=samples, help=f"how many (default: {samples})")
    group.add_argument("--batch", type=int, default=64, help="at once; never changes results (default: %(default)s)")
    group.add_argument(
        "--seed", type=int, default=0, help="sample i's seed comes from this and i (default: %(default)s)"
    )
    group.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")


def _add_others(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--others",
        choices=("fp32", "int8", "none"),
        default="fp32",
        help="decoders and text encoders: in full precision, as int8, or left to torch (default: %(default)s)",
    )


def _add_plan(parser: argparse.ArgumentParser, default: str | None) -> None:
    group = parser.add_argument_group("bits by step")
    text = "auto: the least error for a budget; paper: PTQD's rule; or a plan's file (default: %(default)s)"
    group.add_argument("--plan", default=default, metavar="auto|paper|FILE", help=text)
    group.add_argument("--budget", metavar="19.9x", help="auto: this many times fewer bit operations than FP32")
    group.add_argument("--floor", metavar="25dB", help="auto: instead, the final sample's SNR against full precision")
    group.add_argument("--weights", metavar="4,6,8", help="auto: bits that each layer's weights may get too")
    group.add_argument("--groups", type=int, metavar="8", help="auto: of layers with bits of their own; 1: all alike")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="ptqd", description="Quantize any diffusion model and correct its sampler.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        return added

    sub = verb("convert", _cmd_convert)
    sub.add_argument("checkpoint", type=Path, help="model.ckpt, or its state dict as .safetensors")
    sub.add_argument("config", type=Path, help="the YAML that came with it")
    sub.add_argument("out", type=Path, help="folder to write")

    sub = verb("quantize", _cmd_quantize)
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument(
        "--recipe", default=RECIPE, help="shorthand such as w4a8-brecq, or a TOML file (default: %(default)s)"
    )
    sub.add_argument("--out", type=Path, help="folder to write")
    sub.add_argument("--explain", action="store_true", help="print each layer's bits, methods, cost, range and error")
    _add_sampling(sub, None)

    sub = verb("measure", _cmd_measure)
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("quantized", help="the quantized pipeline's folder")
    sub.add_argument("--out", type=Path, required=True, help="statistics to write (.safetensors)")
    _add_sampling(sub, 64)

    sub = verb("correct", _cmd_correct)
    sub.add_argument("quantized", help="the quantized pipeline's folder")
    sub.add_argument("noise", type=Path, help="statistics that 'ptqd measure' wrote")
    sub.add_argument("--methods", default="auto", help=METHODS_HELP)
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--steps", type=int, help="of other than were measured: the statistics are interpolated")
    sub.add_argument("--scheduler", help="the scheduler class the statistics were measured with")
    sub.add_argument("--batch", type=int, default=64, help="for auto: at once (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="for auto: as measured (default: %(default)s)")
    sub.add_argument("--call", action="append", metavar="NAME=JSON", help="for auto: as measured")
    sub.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")

    sub = verb("plan", _cmd_plan)
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("quantized", help="the quantized pipeline's folder, of a recipe with several widths (w4a4+8)")
    sub.add_argument("--out", type=Path, required=True, help="folder to write: the pipeline with its plan")
    _add_plan(sub, "auto")
    _add_sampling(sub, 64)

    sub = verb("cost", _cmd_cost)
    published = "ldm4-imagenet, ldm4-bedrooms, ldm8-churches"
    sub.add_argument("model", help=f"{MODEL_HELP}; or a denoiser's folder or config.json, or {published}")
    sub.add_argument("--recipe", help="shorthand such as w4a8, or a TOML file (default: full precision)")
    sub.add_argument("--plan", type=Path, help="a plan (.toml) among the recipe's widths")
    sub.add_argument("--layers", action="store_true", help="a line for each layer, not for each block")
    sub.add_argument("--json", action="store_true", help="print everything, by layer and step, as JSON")
    _add_schedule(sub)

    sub = verb("sample", _cmd_sample)
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--png", action="store_true", help="write every image as a PNG file too")
    sub.add_argument("--npz", action="store_true", help="write samples.npz too, as ADM's evaluation takes it")
    _add_no_images(sub)
    _add_judge(sub, None)
    _add_sampling(sub, 64)

    sub = verb("evaluate", _cmd_evaluate)
    sub.add_argument("samples", type=Path, help="folder that 'ptqd sample' wrote, another of images, or an .npz")
    sub.add_argument("--against", type=Path, help="full-precision samples of the same seeds, for distances to them")
    _add_judge(sub)
    sub.add_argument(
        "--classes", type=int, default=10, help="sample i was asked for class i mod this; 0: unconditional"
    )
    sub.add_argument("--prompts", type=Path, help="a prompt on each line, in turn; for --clip")
    sub.add_argument("--out", type=Path, help="JSON file to write")
    sub.add_argument("--batch", type=int, default=64, help="images at once (default: %(default)s)")
    sub.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")

    sub = verb("export", _cmd_export)
    sub.add_argument("run", type=Path, help="run folder, or a quantized pipeline's folder")
    sub.add_argument("--row", help="of a run folder: recipe and correction, 'w4a8 auto' (default: the last row)")
    sub.add_argument("--engine", default="onnxruntime", help="onnxruntime, openvino or torchao (default: %(default)s)")
    sub.add_argument(
        "--provider", choices=("cpu", "cuda", "tensorrt"), default="cpu", help="of onnxruntime (default: %(default)s)"
    )
    sub.add_argument(
        "--layout", choices=("int8", "int4"), default="int8", help="of torchao's weights (default: %(default)s)"
    )
    _add_others(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    _add_sampling(sub, 64)

    sub = verb("bench", _cmd_bench)
    sub.add_argument("run", type=Path, help="run folder, or a quantized pipeline's folder")
    sub.add_argument(
        "--row", action="append", help="of a run folder; may be given again (default: the last row of each recipe)"
    )
    sub.add_argument("--model", help=f"in full precision (default: the run's): {MODEL_HELP}")
    sub.add_argument(
        "--engine",
        action="append",
        help="torch, torch.compile, onnxruntime or openvino; may be given again (default: all)",
    )
    _add_others(sub)
    sub.add_argument("--repeats", type=int, default=5, help="batches timed of each (default: %(default)s)")
    sub.add_argument("--threads", type=int, default=0, help="of the CPU (default: as torch)")
    sub.add_argument(
        "--out", type=Path, help="of a pipeline's folder: where to keep what is exported, for the next time"
    )
    sub.add_argument("--json", type=Path, help="file to write all values to")
    _add_sampling(sub, None)
    sub.set_defaults(batch=32)

    sub = verb("report", _cmd_report)
    sub.add_argument("run", type=Path, help="run folder with a report.json")
    sub.add_argument("--markdown", action="store_true", help="print the table as Markdown")

    sub = verb("compare", _cmd_compare)
    sub.add_argument("run", type=Path, nargs="+", help="run folders with a report.json, sampled alike")
    sub.add_argument(
        "--against",
        help="row that others are compared with: 'w4a8 none', after the folder's name where there are several",
    )
    _add_judge(sub)
    sub.add_argument("--format", choices=("terminal", "markdown", "html", "latex"), default="terminal")
    sub.add_argument("--out", type=Path, help="file to write (default: standard output)")
    sub.add_argument("--json", type=Path, help="file to write all values to")

    sub = verb("run", _cmd_run)
    sub.add_argument("model", help=f"{MODEL_HELP}; or a study, a TOML file such as those under reproduce/")
    sub.add_argument(
        "--recipe", action="append", help=f"shorthand or TOML file; may be given again (with --plan: {PLANNED})"
    )
    _add_plan(sub, None)
    sub.add_argument("--out", type=Path, help="run folder")
    group = sub.add_argument_group("a study")
    group.add_argument("--model", dest="pipeline", metavar="DIR", help="the converted checkpoint it is about")
    group.add_argument("--twin", action="store_true", help="on the embedded model, at a size that two cores run")
    group.add_argument("--dry-run", action="store_true", help="build it on the meta device, and print what it takes")
    group.add_argument("--gpu", default="rtx3090", help="for --dry-run: whose time to estimate (default: %(default)s)")
    sub.add_argument(
        "--measured", type=int, default=64, help="samples the statistics are taken on (default: %(default)s)"
    )
    sub.add_argument("--methods", default="auto", help=METHODS_HELP)
    sub.add_argument("--ablation", action="store_true", help="rows for none, cnc, cnc,bc, cnc,bc,vsc and auto")
    _add_no_images(sub)
    _add_judge(sub, None)
    _add_sampling(sub, 256)
    sub.set_defaults(samples=None)

    sub = verb("reproduce", _cmd_reproduce)
    sub.add_argument("manifest", type=Path, help="manifest.json that 'ptqd run' wrote, or its run folder")
    sub.add_argument("--model", help=f"where the pipeline is now: {MODEL_HELP} (default: where it was)")
    sub.add_argument("--out", type=Path, required=True, help="run folder")
    sub.add_argument("--scheduler", help="of diffusers, as the run had it")
    _add_judge(sub, None)
    sub.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")

    sub = verb("demo", _cmd_demo)
    size = sub.add_mutually_exclusive_group()
    for name, text in (("quick", "one recipe, within 2 minutes on two cores"), ("full", "5,000 samples a row; hours")):
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, default="standard", help=text)
    sub.add_argument("--samples", type=int, help="samples a row instead of the size's")
    sub.add_argument("--recipe", action="append", help="recipe instead of the size's; may be given again")
    sub.add_argument("--stochastic-steps", type=int, help="steps of the setting with eta 1 instead of the size's")
    sub.add_argument("--out", type=Path, default=Path("ptqd-demo"), help="run folder (default: %(default)s)")
    sub.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    return top


SHARED = (_cmd_run, _cmd_demo, _cmd_reproduce, _cmd_measure, _cmd_plan, _cmd_sample, _cmd_evaluate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for anything the user can mend, said in one line."""
    args = parser().parse_args(argv)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.function not in SHARED:
            shared = ", ".join(function.__name__.removeprefix("_cmd_") for function in SHARED)
            raise InputError(f"this verb is for one process; processes share {shared}")
        status: int | None = args.function(args)
    except PtqdError as error:
        print(f"ptqd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"ptqd: {error.filename or 'a file'}: {error.strerror or error}; check the disk and the path",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("ptqd: interrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
    return status or 0

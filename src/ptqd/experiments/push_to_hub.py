"""A quantized pipeline on a hub, with a page that says what it is."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ptqd.errors import InputError, lack_of
from ptqd.experiments.experiment import pipeline_of
from ptqd.experiments.report.model_card import model_card
from ptqd.experiments.results import REPORT, Report, select_rows
from ptqd.files import explained
from ptqd.loading import load

_NETWORK = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # the hub's library
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push_to_hub(
    source: DiffusionPipeline | str | Path,
    repo_id: str,
    *,
    row: str | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Put a quantized pipeline on the Hugging Face hub, with a model card; :func:`ptqd.load` loads it from there.

    Args:
        source: the pipeline, its folder, or the folder of a run, whose report the card then has figures of.
        repo_id: ``"user/name"``; made where it does not exist.
        row: of a run folder: recipe and correction, as in ``"w4a8 auto"``; the last where it is not said.
        base_model: hub id of the model it was made from; of a run of a hub's model it need not be said.
        private: whether others may see it; as the account has it where it is not said.
        token: of the account; the one that ``hf auth login`` left where it is not said.

    Returns:
        The address of the commit.

    Raises:
        InputError: a name that is none, no pipeline that ptqd quantized, no such row, or the hub refuses it or cannot
            be reached.
    """
    _check_name(repo_id, "a repository")
    if base_model is not None:
        _check_name(base_model, "a base model")
    run = None if isinstance(source, DiffusionPipeline) else Path(source)
    if run is not None and not (run / REPORT).is_file():
        run = None
    if row is not None and run is None:
        raise InputError("a row is of a run folder, with a report.json; leave row out for a pipeline")
    hub = HfApi(token=token)
    report, chosen = None, None
    if isinstance(source, DiffusionPipeline):
        pipe = source
    elif run is not None:
        report = Report.load(run)
        *_, chosen = select_rows(report, run, None if row is None else [row])
        pipe = pipeline_of(run, chosen)
        if base_model is None and _REPOSITORY.fullmatch(chosen.model) and not Path(chosen.model).exists():
            with _on_hub(chosen.model, "looked for"):  # a folder of another working directory may be called so
                base_model = chosen.model if hub.repo_exists(chosen.model) else None
    elif not Path(source).is_dir():
        raise InputError(f"{source} is no folder; give the folder of a pipeline or of a run")
    else:
        pipe = load(source)
    card = model_card(pipe, repo_id, base_model=base_model, report=report, row=chosen)
    with _on_hub(repo_id, "written"):  # before gigabytes are saved
        hub.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with explained(folder / "model_index.json"):
            pipe.save_pretrained(folder)
            (folder / "README.md").write_text(card, "utf-8")
        stale = [f"{part.name}/*" for part in folder.iterdir() if part.is_dir()]  # shards of what was there before
        with _on_hub(repo_id, "written"):
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=f"Upload {type(pipe).__name__} quantized by ptqd",
                delete_patterns=[*stale, "plan.toml"],
            )
    return str(commit.commit_url)


def _check_name(name: str, what: str) -> None:
    """Refuse what the hub would refuse after minutes, or what would break a page.

    Raises:
        InputError: so it is.
    """
    try:
        validate_repo_id(name)
        valid = _REPOSITORY.fullmatch(name) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"{what} is named like 'user/name'; got {name!r}")


@contextmanager
def _on_hub(name: str, done: str) -> Iterator[None]:
    """What the hub, or the way to it, has against a request becomes an error that says what to do.

    Raises:
        InputError: so it is.
    """
    try:
        yield
    except Exception as error:
        of_network = type(error).__module__.split(".")[0] in _NETWORK or isinstance(error, OSError | ValueError)
        if not of_network or lack_of(error) is not None:
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "try again"
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403, 404):
            remedy = "log in with 'hf auth login', or give another name"
        elif status is None:
            remedy = "is there a connection to the hub, and is HF_HUB_OFFLINE unset?"
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name} cannot be {done} on the hub: {reason}; {remedy}") from error

"""A quantized pipeline on a hub, with a page that says what it is."""

import re
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from ptqd.errors import InputError, lack_of
from ptqd.experiments.experiment import pipeline_of
from ptqd.experiments.report.model_card import model_card
from ptqd.experiments.results import REPORT, Report, select_rows
from ptqd.loading import load

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
    if _REPOSITORY.fullmatch(repo_id) is None:
        raise InputError(f"a repository is named like 'user/name'; got {repo_id!r}")
    report, chosen = None, None
    if isinstance(source, DiffusionPipeline):
        pipe = source
    elif (Path(source) / REPORT).is_file():
        report = Report.load(Path(source))
        *_, chosen = select_rows(report, Path(source), None if row is None else [row])
        pipe = pipeline_of(Path(source), chosen)
        if base_model is None and _REPOSITORY.fullmatch(chosen.model) and not Path(chosen.model).exists():
            base_model = chosen.model
    else:
        pipe = load(source)
    if row is not None and chosen is None:
        raise InputError(f"{source} is no run folder (it has no report.json), so it has no rows; leave row out")
    card = model_card(pipe, repo_id, base_model=base_model, report=report, row=chosen)
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary)
        (Path(temporary) / "README.md").write_text(card, "utf-8")
        hub = HfApi(token=token)
        try:
            hub.create_repo(repo_id, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repo_id, folder_path=temporary, commit_message=f"Upload {type(pipe).__name__} quantized by ptqd"
            )
        except Exception as error:  # the hub's library may be built on any of several for HTTP
            if lack_of(error) is not None:
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{repo_id} cannot be written on the hub: {reason}; log in with 'hf auth login', or give another name"
            ) from error
    return str(commit.commit_url)

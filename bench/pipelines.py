"""What goes through, pipeline by pipeline: the table of docs/models.md, of tests/integration/test_every_pipeline.py.

python bench/pipelines.py                 # runs the tests (half an hour on two cores), and writes the table
python bench/pipelines.py results.xml     # writes it of results that pytest --junitxml wrote
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
TESTS = "tests/integration/test_every_pipeline.py"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python bench/pipelines.py -->", "<!-- end of table -->"
COLUMNS = {
    "quantized": "quantized",
    "products": "attention products",
    "measured": "measured",
    "searched": "corrected",
    "saved": "saved, loaded equal",
    "exported": "ONNX Runtime",
    "compiled": "compiled",
    "offloaded": "offloaded",
    "tuned": "LoRA",
}
LONGEST = 160  # of a note
SHORT = {
    "its class takes no LoRA": "no LoRA in diffusers",
    "nor without ptqd": "nor without ptqd",
}


def run_tests(results: Path) -> None:
    """Run the tests; some may fail, which the table says."""
    command = [sys.executable, "-m", "pytest", TESTS, "-m", "slow", "-q", "-n", "2", f"--junitxml={results}"]
    subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def rows_of(results: Path) -> list[tuple[str, str, dict[str, str]]]:
    """The case, the class and the outcome of each column, in alphabetical order of the classes."""
    rows = []
    for test in ElementTree.parse(results).iter("testcase"):
        found = {p.get("name", ""): p.get("value", "") for p in test.iter("property")}
        if "class" in found:
            case = test.get("name", "").partition("[")[2].rstrip("]")
            rows.append((case, found.pop("class"), found))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def table(rows: list[tuple[str, str, dict[str, str]]]) -> str:
    """Markdown: the table, its sums, and in words what does not go through."""
    notes: dict[str, int] = {}
    lines = [
        "| class | the tests' pipeline | " + " | ".join(COLUMNS.values()) + " |",
        "| --- | --- |" + " --- |" * len(COLUMNS),
    ]
    for case, kind, found in rows:
        cells = []
        for column in COLUMNS:
            outcome = found.get(column, "-")
            if outcome.startswith(("refused: ", "no: ")):
                note = re.sub(r"/\S*/", "", outcome.replace("|", "\\|"))  # no path of a machine
                note = note if len(note) <= LONGEST else f"{note[:LONGEST]} ..."
                outcome = f"{note.partition(':')[0]} [{notes.setdefault(note, len(notes) + 1)}]"
            cells.append(SHORT.get(outcome, outcome))
        lines.append(f"| `{kind}` | {case} | " + " | ".join(cells) + " |")
    classes = len({kind for _, kind, _ in rows})
    sums = []
    for column, title in COLUMNS.items():
        if column != "products":
            outcomes = [found.get(column, "-") for _, _, found in rows]
            sums.append(f"{title} {sum(o == 'yes' for o in outcomes)} of {len(rows)}")
    lines += ["", f"{classes} classes of pipelines: {', '.join(sums)}.", ""]
    lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="what pytest --junitxml wrote; else the tests are run")
    given = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        results = given or Path(folder) / "results.xml"
        if given is None:
            run_tests(results)
        rows = rows_of(results)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", "utf-8")
    print(f"{PAGE}: {len(rows)} pipelines")


if __name__ == "__main__":
    main()

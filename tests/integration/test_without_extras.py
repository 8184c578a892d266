"""What is installed without extras: the library and the command line, but no page, no plots and no engines."""

import subprocess
import sys
from pathlib import Path

EXTRAS = ("matplotlib", "jinja2", "onnx", "onnxscript", "onnxruntime", "openvino", "torchao", "optimum", "datasets")
CODE = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None
from ptqd_cli.main import main
folder = sys.argv[1]
common = ["--steps", "2", "--samples", "2", "--batch", "2"]
assert main(["sample", "fashion-ddpm", "--out", folder + "/samples", *common]) == 0
run = ["run", "fashion-ddpm", "--recipe", folder + "/small.toml", "--methods", "bc", "--measured", "2", "--out"]
assert main([*run, folder + "/run", "--judge", "none", *common]) == 0
assert main(["export", folder + "/run", "--out", folder + "/engine"]) == 2
"""


def test_the_main_job_runs(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text('calibration_samples = 2\n[weights]\nrange = "minmax"\n')
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "no page: pages need jinja2, which is not installed: pip install 'ptqd[report]'" in run.stdout
    assert "onnx is not installed: pip install 'ptqd[engines]'" in run.stderr.replace("onnxruntime", "onnx")

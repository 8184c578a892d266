"""A process that samples batches of one pipeline and says how long each took; ``benchmark`` starts it.

It is told on its standard input, a line of JSON each: first what to load, then ``"run"`` again and again, then
``"end"``.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ptqd.diffusion.pipeline_parts import denoisers_of
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.loading import load


def peak_memory() -> int:
    """Bytes of resident memory that this process took at most."""
    status = Path("/proc/self/status")  # what the system counts otherwise begins with the parent's
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Serve until told to end."""
    timestep = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(**facts: object) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    try:
        torch.set_num_threads(timestep["threads"])
        pipe, run = load(timestep["folder"]).to(timestep["device"]), Sampling(**timestep["run"])
        if timestep["compiled"]:
            for denoiser in denoisers_of(pipe).values():
                denoiser.compile()
        answer(ready=True)
        images = np.empty(0)
        for line in sys.stdin:
            if json.loads(line) == "end":
                break
            start = time.perf_counter()
            images = run_batch(pipe, run, range(run.batch))
            answer(seconds=time.perf_counter() - start)
        np.save(Path(timestep["images"]), images)
        answer(peak=peak_memory())
    except Exception as error:  # engines have errors of their own
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()

"""A script of all the work that processes share: writes a digest of each result. Run by test_processes.py."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

import ptqd.quantization.quantize as quantizing
from conftest import tiny_pipeline
from ptqd import InputError, Recipe, Sampling, measure, processes, quantize
from ptqd.correction.search import fit_along_runs, search_correction
from ptqd.mixed_precision.sensitivity import measure_sensitivity
from ptqd.quantization import calibration

RUN = Sampling(2, 1.0, 10, 2, call={"class_labels": [0, 1], "guidance_scale": 2.0})
RECIPES = {
    "range by step, time embedding": "w4a8-time-steps2",
    "errors by step, wide": "w4a8-wide",
    "learned": "w4a4+8-smooth-gptq-distill",
}


def recipe(text: str) -> Recipe:
    values: dict[str, Any] = {**Recipe.parse(text).to_dict(), "calibration_samples": 7}
    values["weights"]["range"] = "minmax"
    few = {"distill": {"iterations": 2, "batch": 24, "inputs": 28, "drop": 0.2}, "wide": {"inputs": 16}}
    values["methods"] = [method | few.get(method["name"], {}) for method in values["methods"]]
    if "wide" in text:
        values["calibration_steps"] = "error"
    return Recipe.from_dict(values)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    every = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        every.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return every.hexdigest()


def work() -> dict[str, str]:
    pipe: Any = tiny_pipeline()
    result, quantized = {}, pipe
    quantizing.BUCKETS, calibration.OBSERVERS_AT_ONCE = 2, 7  # of steps that share an observer; told each other at once
    for name, text in RECIPES.items():
        run = RUN.replace(batch=4) if name == "learned" else RUN.replace(steps=3)  # 2 batches of up to 4, or 4 of 2
        quantized = quantize(pipe, recipe(text), run)
        result[name] = digest(quantized.unet.state_dict())
    run = RUN.replace(samples=24, batch=4)
    stats = measure(pipe, quantized, run)
    result["statistics"] = digest({"moments": stats.moments, "paths": stats.paths})
    choice = search_correction(quantized, stats, run)
    result["auto"] = json.dumps(choice.to_dict())
    result["energy"] = json.dumps(fit_along_runs(quantized, stats, run, ("cnc", "bc", "energy")).to_dict())
    shares = measure_sensitivity(pipe, quantized, run, weight_bits=(3, 4))
    result["shares"] = digest({"activations": shares.activations, "weights": shares.weights})
    return result


def primitives() -> None:
    """What the shared work is made of, in two processes."""
    me, items = processes.number(), list(range(5))
    assert processes.mine(items) == items  # nobody shares outside the block
    assert processes.everyone(me) == [me]
    with processes.together():
        assert processes.mine(items) == items[me::2]
        assert processes.joined([10 * i for i in processes.mine(items)]) == [0, 10, 20, 30, 40]
        assert processes.joined([]) == []
        assert [list(part) for part in processes.rounds(items)] == [[0, 1], [2, 3], [4]]
        assert processes.as_main(me) == 0
        assert processes.by_main(lambda: (processes.is_shared(), processes.number())) == (False, 0)
        own = [torch.full((3,), float(i)) for i in processes.mine(items)]
        assert [float(x.sum()) for x in processes.tensors_in_order(own, 5, torch.empty(3))] == [0, 3, 6, 9, 12]
        for failing in (0, 1):
            said = ""
            try:
                with processes.failing_alike():
                    if me == failing:
                        raise InputError("one of us")
            except InputError as error:
                said = str(error)
            assert said == "one of us"
        try:
            processes.check_alike({"seed": me})
        except InputError as error:
            said = str(error)
        assert "another seed" in said


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if sys.argv[2:] == ["primitives"]:
        primitives()
        out.with_suffix(f".{processes.number()}").touch()
    else:
        with processes.together():
            found = work()
        out.with_suffix(f".{processes.number()}.json").write_text(json.dumps(found))

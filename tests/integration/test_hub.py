"""A quantized pipeline goes to a hub and comes back, by a stand-in for the hub that speaks its protocol."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import quick_recipe, tiny_pipeline
from ptqd import InputError, PtqdConfig, Recipe, Sampling, push_to_hub, quantize
from ptqd.diffusion import run_batch
from ptqd.experiments.report.model_card import model_card
from ptqd.quantization.modules import QuantLinear
from ptqd.quantization.sites import activation_quantizers, quantized_layers

RUN = Sampling(3, 0.0, samples=4, batch=4, call={"class_labels": [0, 1], "guidance_scale": 2.0})
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Keeps one commit of each repository in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.unknown: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if self.headers.get("Authorization") != "Bearer right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.address}/{name}", "name": name, "id": name})
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path)) is not None:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)) is not None:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[found[1]][entry["value"]["path"]] = content
                elif entry["key"] == "deletedFile":
                    del self.server.files[found[1]][entry["value"]["path"]]
            self.answer(
                {"commitUrl": f"{self.address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        else:
            self.server.unknown.append(f"POST {path}")
            self.answer({"error": "not found"}, 404)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)) is not None:
            files = self.server.files.get(found[1], {})
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": found[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+.*", path)) is not None:
            files = self.server.files.get(found[1], {})
            self.answer([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()])
        elif (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) is not None:
            content = self.server.files.get(found[1], {}).get(found[2])
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
        else:
            self.server.unknown.append(f"{self.command} {path}")
            self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def python(hub: Hub, tmp_path: Path, *words: str, token: str = "right") -> "subprocess.CompletedProcess[str]":
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env={**os.environ, **cache}
    )


def test_there_and_back(hub: Hub, tmp_path: Path) -> None:
    """In the type that it is stored in; of what was there before, only what is not the pipeline's stays."""
    quantized = quantize(tiny_pipeline(), quick_recipe("w4a8", 1), RUN).to(torch.bfloat16)
    quantized.save_pretrained(tmp_path / "folder")
    index, shard = (
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001.safetensors",
    )
    hub.files["user/small"] = {index: b"{}", shard: b"", "plan.toml": b"", "images/first.png": b"mine"}
    want = torch.as_tensor(run_batch(quantized, RUN, range(2), "latent"))
    words = ["push", str(tmp_path / "folder"), "user/small", "--base-model", "user/base"]
    done = python(hub, tmp_path, "-m", "ptqd", *words)
    assert done.returncode == 0, done.stderr
    assert COMMIT in done.stdout
    assert not {index, shard, "plan.toml"} & hub.files["user/small"].keys()
    assert hub.files["user/small"]["images/first.png"] == b"mine"
    card = hub.files["user/small"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\nbase_model: user/base\n")
    assert 'ptqd.load("user/small")' in card
    script = (
        "import sys, torch, ptqd; from ptqd.diffusion import run_batch; from pathlib import Path\n"
        "run = ptqd.Sampling(3, 0.0, samples=4, batch=4, call={'class_labels': [0, 1], 'guidance_scale': 2.0})\n"
        f"torch.save(run_batch(ptqd.load('user/small'), run, range(2), 'latent'), {str(tmp_path / 'found.pt')!r})\n"
    )
    done = python(hub, tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "found.pt", weights_only=True), want)


def test_what_the_hub_refuses_is_said(hub: Hub, pipe: Any, tmp_path: Path) -> None:
    quantize(pipe, quick_recipe("w8a8", 1), RUN).save_pretrained(tmp_path / "folder")
    done = python(hub, tmp_path, "-m", "ptqd", "push", str(tmp_path / "folder"), "user/small", token="wrong")
    assert done.returncode == 2
    assert "user/small cannot be written on the hub" in done.stderr
    assert "hf auth login" in done.stderr
    assert not hub.files
    for name in ("small", "user/na..me"):
        with pytest.raises(InputError, match=f"a repository is named like 'user/name'; got '{name}'"):
            push_to_hub(tmp_path / "folder", name)
    with pytest.raises(InputError, match="a base model is named like 'user/name'"):
        push_to_hub(tmp_path / "folder", "user/small", base_model="not a model: x")
    with pytest.raises(InputError, match="nowhere is no folder"):
        push_to_hub(tmp_path / "nowhere", "user/small")
    with pytest.raises(InputError, match="a row is of a run folder"):
        push_to_hub(tmp_path / "folder", "user/small", row="w8a8 auto")


def test_the_card_of_a_run_has_its_figures(pipe: Any, tmp_path: Path) -> None:
    from ptqd.experiments.results import Interval, Report, Row, RowKey, SamplerSettings

    settings = SamplerSettings("DDIMScheduler", 3, 0.0, 2.0)
    metrics = {"psnr": Interval(27.5, 27.0, 28.0)}
    rows = [
        Row("user/base", settings, key, {"steps": 3}, 64, found, False, 10, 19.9, 1000, 1.0, "a/b/c", "")
        for key, found in (
            (RowKey("fp32"), {}),
            (RowKey("w4a8"), {"psnr": Interval(25.0, 24.5, 25.5)}),
            (RowKey("w4a8", None, ("auto",)), metrics),
            (RowKey("w8a8", None, ("auto",)), {"psnr": Interval(40.0, 39.0, 41.0)}),
        )
    ]
    report = Report(rows=rows, judge="a classifier")
    quantized = quantize(pipe, quick_recipe("w4a8", 1), RUN)
    card = model_card(quantized, "user/small", base_model="user/base", report=report, row=rows[2])
    assert "27.50 ±0.50" in card
    assert "25.00 ±0.50" in card
    assert "40.00" not in card
    assert "19.9 times fewer" in card
    assert "64 samples of the same seeds" in card
    layers = [layer for _, layer in quantized_layers(quantized.unet)]
    four = sum(layer.weights.bits == 4 and layer.kind == "conv" for layer in layers)
    assert f"| 4-bit integers | 8-bit integers | {four} convolutions |" in card


@pytest.mark.parametrize("text", ["w8a8", "w4a8-affine", "wmxfp4a8"])
def test_diffusers_quantizes_while_it_loads(pipe: Any, text: str, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path / "unet")
    kind = type(pipe.unet)
    found = kind.from_pretrained(tmp_path / "unet", quantization_config=PtqdConfig(text))
    static = [name for name, quantizer in activation_quantizers(found) if quantizer.is_static]
    assert all(name.endswith("probabilities") for name in static)
    largest = [quantizer.scale for name, quantizer in activation_quantizers(found) if name in static]
    assert all(float(scale) == pytest.approx(1 / 255) for scale in largest)
    dynamic = quantize(pipe, Recipe.parse(text).uncalibrated(), RUN)
    fresh = {name: layer.integer_weight() for name, layer in quantized_layers(found)}
    want = {name: layer.integer_weight() for name, layer in quantized_layers(dynamic.unet)}
    assert fresh.keys() == want.keys()
    assert all(torch.equal(fresh[name], want[name]) for name in fresh)
    found.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    assert isinstance(next(layer for _, layer in quantized_layers(again) if layer.kind == "linear"), QuantLinear)
    assert all(torch.equal(fresh[name], layer.integer_weight()) for name, layer in quantized_layers(again))


def test_recipes_that_need_calibration_are_refused() -> None:
    for text, what in (("w4a8-gptq", "gptq"), ("w4a4+8", "step_bits"), ("w4a8-split", "split_shortcuts")):
        with pytest.raises(InputError, match=rf"the recipe has {what}.*, which need calibration"):
            PtqdConfig(text)

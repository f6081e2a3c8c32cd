"""Models that take images are pruned in their language model, and saved with the files of their processor."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
)

from experiments.architectures import example, image_arguments
from gprune.discovery import family_of
from gprune.export.hf import check_reload, save_pruned
from gprune.export.reload import align_weights
from gprune.models.agreement import random_masks
from gprune.models.loading import PROCESSOR_FILES
from gprune.models.surgery import slice_model
from tests import tiny_run
from tests.tiny_run import tiny_tokenizer
from tests.world import make_tiny_llama

PATCH, IMAGE = 8, 32  # pixels
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@dataclass(frozen=True)
class Pruned:
    """A pruned tiny model that takes images."""

    small: PreTrainedModel
    picture: dict[str, Tensor]  # arguments of a forward pass with one image

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        return model(**self.picture, use_cache=False).logits


@pytest.fixture(scope="module", params=["gemma3", "qwen3_vl"])
def pruned(request, tmp_path_factory):
    """One type with a causal class, a projector and fixed image sizes; one with neither, and images of any size."""
    with tiny_run.isolated(tmp_path_factory.mktemp("cache")):
        model = example(request.param)
        return Pruned(slice_model(model, random_masks(model)), image_arguments(model))


def reload(folder: Path) -> PreTrainedModel:
    options = {"trust_remote_code": True, "attn_implementation": "eager"}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    align_weights(model)
    return model


def test_a_text_model_with_another_attention_than_its_composite_reloads_with_the_same_bits(tmp_path):
    """The vision model of GOT-OCR2 has no SDPA, so its composite has `eager`, and its text model `sdpa`."""
    dense = example("got_ocr2")
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    family_of(loaded)
    assert (loaded.config._attn_implementation, loaded.config.text_config._attn_implementation) == ("eager", "sdpa")
    small, picture = slice_model(loaded, random_masks(loaded)), image_arguments(loaded)
    folder = save_pruned(small, None, tmp_path / "model")
    reloaded = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    align_weights(reloaded)
    assert reloaded.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(reloaded(**picture).logits, small(**picture).logits)
    assert check_reload(small, folder, picture["input_ids"]) == 0


def test_a_head_with_its_own_weights_stays_untied_in_a_composite(pruned, tmp_path):
    small = copy.deepcopy(pruned.small)
    configs = (small.config, small.config.text_config)
    for config in configs:
        config.tie_word_embeddings = True
    small.lm_head.weight = nn.Parameter(small.lm_head.weight.flip(0))
    reloaded = reload(save_pruned(small, None, tmp_path / "model"))
    assert torch.equal(pruned.logits(reloaded), pruned.logits(small))
    assert not reloaded.config.tie_word_embeddings
    assert not reloaded.config.text_config.tie_word_embeddings


# --- files of the processor


def write_processor_files(folder: Path) -> dict[str, bytes]:
    """Write a different content to each file of a processor, and return the contents by name."""
    contents = {name: f'{{"content": "{name}"}}\r\n'.encode() for name in PROCESSOR_FILES}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def processor_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).exists()}


def tokenizer_from(location: str | Path):
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = str(location)
    return tokenizer


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The snapshot folder of the model `owner/model` in the cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--owner--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize("on_hub", [False, True])
def test_processor_files_are_copied_from_a_folder_or_without_network_from_the_cache_of_the_hub(
    on_hub, pruned, hub_cache, tmp_path
):
    (tmp_path / "dense").mkdir()
    source = hub_cache if on_hub else tmp_path / "dense"
    contents = write_processor_files(source)
    (source / PROCESSOR_FILES[0]).unlink()  # few models have all files
    del contents[PROCESSOR_FILES[0]]
    tokenizer = tokenizer_from("owner/model" if on_hub else source)
    assert processor_files(save_pruned(pruned.small, tokenizer, tmp_path / "model")) == contents
    text_model = slice_model(make_tiny_llama(), random_masks(make_tiny_llama()))
    assert processor_files(save_pruned(text_model, tokenizer, tmp_path / "text")) == {}


def test_a_warning_names_the_processor_files_that_the_hub_does_not_provide(pruned, hub_cache, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "gprune"):
        folder = save_pruned(pruned.small, tokenizer_from("owner/model"), tmp_path / "model")
    assert processor_files(folder) == {}
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "The processor of 'owner/model' is not saved" in message
    assert "preprocessor_config.json" in message


# --- whole runs


def save_llava(folder: Path) -> Path:
    """Save a tiny LLaVA with its processor. Its type has no causal class."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    processor = LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=TEMPLATE,
    )  # fmt: skip
    model = example("llava")
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_command_line_run_saves_a_model_that_its_card_loads_with_its_processor(tmp_path):
    dense = save_llava(tmp_path / "llava")
    world = tiny_run.World(dense, tiny_run.make_world(tmp_path).corpora)
    with tiny_run.isolated(tmp_path / "cache"):
        result = world.run(tmp_path, "--sparsity.scope=attention+ffn", "--recovery=least_squares")
    assert result.summary["parameters_after"] < result.summary["parameters_before"]
    checks = json.loads((tmp_path / "run" / "manifest.json").read_text())["logits"]
    assert checks["sliced_minus_reloaded"] == 0.0
    folder = tmp_path / "run" / "model"
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (dense / name).read_bytes()

    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "AutoModelForImageTextToText" in code
    assert "pipeline_tag: image-text-to-text" in card
    loaded = {}
    exec(code.replace("path/to/this/folder", str(folder)), loaded)
    picture = Image.effect_mandelbrot((48, 40), (-2, -1, 1, 1), 20).convert("RGB")
    inputs, dense_inputs = (
        processor(text="bar <image> gos", images=picture, return_tensors="pt")
        for processor in (loaded["processor"], AutoProcessor.from_pretrained(dense))
    )
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(inputs[name], dense_inputs[name]) for name in inputs)
    assert loaded["processor"].chat_template == TEMPLATE
    with torch.no_grad():
        assert torch.equal(loaded["model"](**inputs).logits, result.model(**inputs).logits)

"""Models of `--model.made_elsewhere`: any causal language model, loaded as strictly as gprune's exports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.console import quieted
from gprune.errors import UserError, quoting
from gprune.models.folders import check_stored
from gprune.models.loading import check_complete, load_model, locate_model, read_config, skeleton
from gprune.models.lookup import auto_class
from gprune.storage.reading import expanded

FLAG = "--model.made_elsewhere"


def check_elsewhere(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Check that a model loads exactly as it was saved, before weights are loaded.

    Only headers of weight files are read. A model on the hub is downloaded.

    Returns:
        The model on the meta device, without weights.

    Raises:
        UserError: if weights are missing, which transformers would initialise at random; if weights have another shape
        or
            do not belong to the model, which transformers would ignore; if weights are quantised; if the model needs
            code without consent; if there is no model or no tokenizer.
    """
    consent = {"trust_remote_code": trust_remote_code}
    with _named(name):
        location = locate_model(name)
        if (expanded(name) / "manifest.json").is_file():
            raise UserError(f"{FLAG} must be a model folder, such as {name}/model; got the run '{name}'.")
        check_consent(name, location, trust_remote_code)
        config = read_config(name, **consent, prunable=False)
        if getattr(config, "quantization_config", None):
            floats = "float32, bfloat16 or float16"
            raise UserError(f"{FLAG} must have weights in {floats}; got '{name}', which is quantised.")
        check_stored(skeleton(config, **consent), location)
        settings: dict[str, Any] = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
        with quieted("transformers"):  # its table of missing weights, which are reported below
            model, report = auto_class(config).from_pretrained(location, **consent, **settings)
        check_complete(report | {"unexpected_keys": ()}, location)
        if mismatched := sorted(report["mismatched_keys"]):
            weight, stored, asked = mismatched[0]
            raise UserError(
                f"{FLAG}: Cannot load '{location}': {len(mismatched)} weights have other shapes than in config.json, "
                f"such as {weight}: {tuple(stored)} instead of {tuple(asked)}."
            )
        if unknown := sorted(report["unexpected_keys"]):
            raise UserError(
                f"{FLAG}: Cannot load '{location}': {len(unknown)} weights have no place in the model of config.json, "
                f"such as {unknown[0]}. Without them it would be another model. Save it with its own code (auto_map)."
            )
        if type(AutoTokenizer.from_pretrained(location, **consent)("a")["input_ids"]) is not list:
            raise UserError(f"{FLAG} must have a usable tokenizer; got '{name}'.")
    return model


def check_consent(name: str, location: str, given: bool) -> None:
    """Raise UserError if a model needs its own code, unless the user has consented to run it."""
    try:
        content = PreTrainedConfig.get_config_dict(location)[0]
    except Exception:  # of any class; reading the configuration later reports the error
        return
    if not given and content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING:
        flag, remedy = (
            "--model.trust_remote_code=true",
            "Read that code, then add the flag (after -- if you run a list)",
        )
        raise UserError(f"{FLAG}: '{name}' needs {flag}, because it has Python code of its own. {remedy}.")


def load_elsewhere(name: str, **settings: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal language model and its tokenizer like `load_model`, even if gprune cannot prune it.

    Raises:
        UserError: as `load_model`.
    """
    with _named(name):
        return load_model(name, **settings, prunable=False)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Replace `--model.name` in errors by the flag of this model."""
    try:
        with quoting(f"{FLAG}: '{name}' cannot be loaded: "):
            yield
    except UserError as error:
        raise UserError(str(error).replace("--model.name", FLAG, 1)) from error

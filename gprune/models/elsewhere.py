"""Models that gprune did not make: any causal language model, loaded as strictly as gprune's exports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.console import quieted
from gprune.errors import UserError, quoting
from gprune.models.copies import auto_class
from gprune.models.families import PRUNED
from gprune.models.loading import check_complete, load_model, locate_model, read_config
from gprune.storage.paths import expanded

SUBJECT = "The model made elsewhere"  # beginning of errors


def check_elsewhere(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Check that a model loads exactly as it was saved, before weights are loaded.

    Only headers of weight files are read. A model on the hub is downloaded.
    """
    code_option = {"trust_remote_code": trust_remote_code}
    with _errors_name_model(name):
        location = locate_model(name)
        if (expanded(name) / "manifest.json").is_file():
            raise UserError(f"{SUBJECT} must be a model folder, such as {name}/model; got the run '{name}'.")
        check_remote_code(name, location, trusted=trust_remote_code)
        config = read_config(name, **code_option)
        if getattr(config, "quantization_config", None):
            floats = "float32, bfloat16 or float16"
            raise UserError(f"{SUBJECT} must have weights in {floats}; got '{name}', which is quantised.")
        options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
        with quieted("transformers"):  # its table of missing weights, which are reported below
            model, report = auto_class(config).from_pretrained(location, **code_option, **options)
        check_complete(report | {"unexpected_keys": ()}, location)  # unexpected weights are an error here, see below
        if mismatched := sorted(report["mismatched_keys"]):
            weight, stored_shape, config_shape = mismatched[0]
            raise UserError(
                f"{SUBJECT}: Cannot load '{location}': {len(mismatched)} weights have other shapes than in "
                f"config.json, such as {weight}: {tuple(stored_shape)} instead of {tuple(config_shape)}."
            )
        if unknown := sorted(report["unexpected_keys"]):
            raise UserError(
                f"{SUBJECT}: Cannot load '{location}': {len(unknown)} weights have no place in the model of "
                f"config.json, such as {unknown[0]}. Without them it would be another model. Save it with its own code "
                "(auto_map)."
            )
        tokenizer = AutoTokenizer.from_pretrained(location, **code_option)
        if type(tokenizer("a")["input_ids"]) is not list:
            raise UserError(f"{SUBJECT} must have a usable tokenizer; got '{name}'.")
    return model


def check_remote_code(name: str, location: str, *, trusted: bool) -> None:
    """Raise UserError if a model needs Python code of its own that the user does not trust."""
    try:
        content = PreTrainedConfig.get_config_dict(location)[0]
    except Exception:  # of any class; reading the configuration later reports the error
        return
    dense_type = str(content.get("model_type")).removeprefix(PRUNED)  # gprune has the code of its own exports
    needs_code = content.get("auto_map") and dense_type not in CONFIG_MAPPING
    if needs_code and not trusted:
        flag = "--model.trust_remote_code=true"
        remedy = "Read that code, then add the flag (after -- if you run a list)"
        raise UserError(f"{SUBJECT}: '{name}' needs {flag}, because it has Python code of its own. {remedy}.")


def load_elsewhere(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal language model and its tokenizer like `load_model`, even if gprune cannot prune it."""
    with _errors_name_model(name):
        return load_model(name, **options)


@contextmanager
def _errors_name_model(name: str) -> Iterator[None]:
    """Convert exceptions to UserErrors that begin with `SUBJECT` instead of `--model.name`."""
    try:
        with quoting(f"{SUBJECT}: '{name}' cannot be loaded: "):
            yield
    except UserError as error:
        raise UserError(str(error).replace("--model.name", SUBJECT, 1)) from error

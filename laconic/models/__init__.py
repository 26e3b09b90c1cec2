"""Models: ``load`` opens a built-in model, a local folder or a model of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from laconic.errors import LaconicError, quote
from laconic.models.reading import sees, text_side

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["builtin_models", "load", "vocabulary"]

ZOO = Path(__file__).parent / "zoo"


def builtin_models() -> list[str]:
    """Names of the models inside the package, each trained by a command of this project (see its README.md)."""
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def load(
    name_or_path: str | os.PathLike[str], dtype: str | torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """A causal language model in eval mode with sdpa attention, and its tokenizer, which pads on the left.

    A vision-language model comes with its processor, which takes pictures as well, in the tokenizer's place.

    Args:
        name_or_path: the name of a built-in model, a folder, or a hub id such as ``owner/model``, in this order.
        dtype: of the weights, as a torch dtype or its name. By default the checkpoint's own, except for built-in
            models: they are stored in bfloat16 and computed in float32, which is faster on most processors.

    Raises:
        LaconicError: nothing of that name exists or can be reached, it is damaged, it does not fit into memory, or it
            is not a causal language model.
    """
    name = os.fspath(name_or_path)
    builtin = name in builtin_models()
    source = str(ZOO / name) if builtin else str(Path(name).expanduser()) if name.startswith("~") else name
    wanted = _dtype(dtype, torch.float32 if builtin else "auto")
    if not builtin:
        _check_source(source)
    with _quiet():
        options = {"trust_remote_code": False, "local_files_only": Path(source).is_dir() or not _hub_answers()}
        config = _load_config(name, source, options)
        tokenizer = _load_processor(name, source, options) if _sees(config) else _load_tokenizer(name, source, options)
        model = _load_weights(name, source, config, {**options, "dtype": wanted})
    words = text_side(tokenizer)
    words.padding_side = "left"
    if words.pad_token_id is None:
        words.pad_token = words.eos_token or words.convert_ids_to_tokens(0)
    return model.eval(), tokenizer


@functools.cache
def vocabulary(source: str) -> dict[str, int] | None:
    """Id of every piece of a tokenizer that lies here, in a folder or in the hub's cache; None where there is none."""
    from transformers import AutoTokenizer

    with _quiet(), contextlib.suppress(Exception):  # whatever is wrong with it, it tells nothing
        return AutoTokenizer.from_pretrained(source, local_files_only=True).get_vocab() if source else None
    return None


def _dtype(dtype: str | torch.dtype | None, default: Any) -> Any:
    if dtype is None:
        return default
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise LaconicError(f"There is no weight type {quote(dtype)}: use float32, bfloat16 or float16.")
    return found


def _check_source(source: str) -> None:
    """Refuses what is neither a folder with a model nor can be a hub id."""
    path = Path(source)
    if not source.strip():
        raise LaconicError(f"The model name is empty: give a folder or a hub id{_suggest('')}.")
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise LaconicError(f"{source} is a file: give the folder that holds config.json, weights and tokenizer.")
    elif "/" not in source and (near := difflib.get_close_matches(source.lower(), builtin_models(), n=1, cutoff=0.7)):
        raise LaconicError(f"There is no built-in model or folder {quote(source)}: did you mean '{near[0]}'?")
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source:
        raise LaconicError(f"There is no model folder {source}: check the path{_suggest(path.name)}.")


def _check_folder(path: Path) -> None:
    """A damaged config.json would otherwise be blamed on something else."""
    if not (path / "config.json").is_file():
        raise LaconicError(f"The folder {path} has no config.json: give the folder of a saved transformers model.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaconicError(f"The config.json in {path} cannot be read ({_reason(error)}): copy it again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise LaconicError(f"The config.json in {path} names no model_type: give the folder of a transformers model.")


def _suggest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), builtin_models(), n=1, cutoff=0.5) or ["needle"]
    return f", or use the built-in model '{near[0]}'"


def _hub_answers() -> bool:
    """Whether the hub's address is known here; without asking this first, each file costs half a minute of retries."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies():  # then the proxy knows the address
        return True
    with contextlib.suppress(OSError):
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443))
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers and the hub client: what matters is raised."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    bars, level, hub_level = logging.is_progress_bar_enabled(), logging.get_verbosity(), hub_logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def _reason(error: BaseException) -> str:
    """The first line of an error message, which in transformers may be a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return quote(lines[0] if lines else type(error).__name__, 160).strip("'")


def _load_config(name: str, source: str, options: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # the hub client, JSON and transformers each raise their own kinds
        if Path(source).is_dir():
            raise LaconicError(f"The config.json of {name} cannot be used ({_reason(error)}): repair it.") from error
        raise LaconicError(
            f"There is no built-in model or folder {quote(name)}, and the hub gives none "
            f"({_hub_reason(error)}): check the name{_suggest(name)}."
        ) from error
    kinds = [kind for kind in getattr(config, "architectures", None) or [] if kind]
    # An encoder such as BERT can be opened as a causal model, but was not trained as one.
    masked = bool(kinds) and all(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in kinds)
    writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _sees(config)
    if not writes or masked or getattr(config, "is_encoder_decoder", False):
        found = kinds[0] if kinds else config.model_type
        raise LaconicError(f"{name} is not a causal language model ({found}): give one that writes text, such as a Llama.")
    return config


def _sees(config: PretrainedConfig) -> bool:
    """Whether it is a vision-language model's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return hasattr(config, "vision_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _hub_reason(error: BaseException) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    if "GatedRepoError" in kinds:
        return "its owner has to grant you access"
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return "no such model there, or it is not public"
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "OfflineModeIsEnabled", "ProxyError"}:
        return "it is not reachable from here, and no copy lies in the cache"
    return _reason(error)


def _load_tokenizer(name: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
            raise ValueError("it makes no tokens of a text")
    except Exception as error:
        raise LaconicError(
            f"The tokenizer of {name} is missing or broken ({_reason(error)}): put its files beside the weights."
        ) from error
    return tokenizer


def _load_processor(name: str, source: str, options: dict[str, Any]) -> ProcessorMixin:
    """A processor that prepares pictures with Pillow where torchvision is missing."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        if not sees(processor):
            raise ValueError("it has nothing that prepares pictures")
    except ImportError as error:
        raise LaconicError(f"The processor of {name} needs a package that is missing: {_reason(error)}.") from error
    except Exception as error:
        raise LaconicError(
            f"The processor of {name} is missing or broken ({_reason(error)}): put its files beside the weights."
        ) from error
    return processor


def _load_weights(name: str, source: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    def read(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        kind = AutoModelForImageTextToText if _sees(config) else AutoModelForCausalLM
        return kind.from_pretrained(
            source, config=config, attn_implementation=attention, output_loading_info=True, **options
        )

    try:
        try:
            model, report = read("sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, report = read("eager")  # an architecture without sdpa
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise LaconicError(f"{name} does not fit into memory: load it as bfloat16, or a smaller model.") from error
        raise LaconicError(
            f"The weights of {name} are missing or broken ({_reason(error)}): save or download them again."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise LaconicError(
            f"The weights of {name} are incomplete ({len(missing)} tensors such as {missing[0]} are missing): "
            "give a checkpoint of the whole causal language model."
        )
    return model

"""Whether a Hugging Face directory can become a model: told by whoever adds it, not by the first run.

Nothing of its weights is read but names and shapes; the model is built without memory for its parameters.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concord_shared.errors import UsageError

__all__ = ["try_configuration", "try_tokenizer"]

ADVICE = "download the directory again, or name another"


def try_tokenizer(file: Path) -> None:
    """Raises: UsageError: `tokenizers`, where it is installed, cannot read it."""
    if importlib.util.find_spec("tokenizers") is None:
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its library is no Exception
        raise UsageError(f"{file}: not a tokenizer: {_first_line(error)}; {ADVICE}") from None


def try_configuration(file: Path, weights: Sequence[Path]) -> None:
    """Raises: UsageError: `transformers`, where it is installed, cannot build what the configuration describes, or it
    describes other shapes than the weights have.
    """
    if importlib.util.find_spec("transformers") is None:
        return
    shapes = _shapes(weights)
    try:
        built = _built(file, len(shapes))
    except UsageError:
        raise
    except Exception as error:  # whatever another party's configuration comes to
        raise UsageError(
            f"{file}: transformers cannot build what it describes: {_first_line(error)}; {ADVICE}"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    for name, shape in shapes.items():
        wanted = expected.get(name, expected.get(name.removeprefix(f"{built.base_model_prefix}."), shape))
        if wanted != shape:
            raise UsageError(
                f"{file}: describes a tensor {name} of shape {list(wanted)}, and the weights hold one of "
                f"{list(shape)}; {ADVICE}"
            )


def _built(file: Path, tensors: int) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > tensors:
        raise UsageError(f"{file}: describes {layers} layers, and the weights hold {tensors} tensors; {ADVICE}")
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config, trust_remote_code=False)


def _shapes(weights: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for each in weights:
        with safe_open(each, "np") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"

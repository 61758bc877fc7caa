"""Exports of a trained model, each loaded again from disk and compared with the model in memory.

The classes here are the configuration group `export`; what they do lives in `lora`, `merged_16bit` and `verify`,
imported when they run, so that a wrong command is answered without waiting for torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from selfdistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ExportError(RuntimeError):
    """The export could not be written, or what was written does not answer as the model in memory does."""


@dataclass
class Lora:
    """The adapter alone, for use on top of its base."""

    needs_adapter: ClassVar = True

    def run(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", folder: str | Path, prompts: Sequence[Any] = ()
    ) -> Path:
        """Write the adapter to `folder` and verify it on `prompts`.

        Raises:
            UserError: the model has no adapter.
            ExportError: the written adapter answers otherwise than the model in memory.
        """
        from selfdistill.models.export.lora import export_lora
        from selfdistill.models.export.verify import verify

        path = export_lora(model, tokenizer, folder)
        verify(model, tokenizer, path, prompts)
        return path


@dataclass
class Merged16bit:
    """One ordinary model, adapters merged, weights in `dtype`: bfloat16 or float16."""

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16"):
            raise UserError(f"export.dtype={self.dtype}: write bfloat16 or float16.")

    def run(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", folder: str | Path, prompts: Sequence[Any] = ()
    ) -> Path:
        """Write the merged model to `folder` and verify it on `prompts`.

        Raises:
            ExportError: a merged weight is not finite, or the written model answers otherwise than the one in memory.
        """
        from selfdistill.models.export.merged_16bit import export_merged_16bit
        from selfdistill.models.export.verify import verify

        path = export_merged_16bit(model, tokenizer, folder, self.dtype)
        verify(model, tokenizer, path, prompts)
        return path

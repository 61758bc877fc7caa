"""Exports of a trained model, each loaded again from disk and compared with the model in memory.

A format is a class in a module of its own, and an option of the configuration group `export` names it. Its module
imports torch only inside the methods, because the check of the configuration looks at the class before torch loads.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from selfdistill.errors import UserError
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfdistill.models.export.verify import TransformersModel, Verification


class ExportError(RuntimeError):
    """The export could not be written, or what was written does not answer as the model in memory does."""


@dataclass
class Format(ABC):
    """One way to hand a trained model on.

    Attributes:
        name: what the format is called in the configuration; its folder in a run is `export/NAME`.
        needs_adapter: whether only a model that was trained with an adapter can be exported so.
    """

    name: ClassVar[str]
    needs_adapter: ClassVar[bool] = False

    @abstractmethod
    def write(self, trained: "TransformersModel", folder: Path) -> None:
        """Write every file of the export to `folder`, which is empty; the model in memory stays as it is."""

    @abstractmethod
    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        """Load `folder` with the program that its users will load it with, and compare (`verify.compare`).

        Raises:
            ExportError: what was loaded answers otherwise than the model in memory.
        """

    def run(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        folder: str | Path,
        prompts: Sequence[Prompt] = (),
    ) -> Path:
        """Write the export to `folder` and verify it on `prompts`; returns the absolute path.

        Raises:
            UserError: the model has no adapter and the format needs one, or something that is no export is in the way.
            ExportError: it could not be written, or answers otherwise than the model in memory.
        """
        from selfdistill.models.export.folder import new_folder
        from selfdistill.models.export.verify import TransformersModel

        trained = TransformersModel(model, tokenizer)
        if self.needs_adapter and not trained.has_adapter:
            raise UserError(
                f"export={self.name} needs an adapter, but model.tuning=full trained all weights: "
                "write export=merged_16bit, or train with model.tuning=lora."
            )
        folder = Path(folder).absolute()
        with new_folder(folder) as partial:
            self.write(trained, partial)
        self.verify(trained, folder, prompts)
        return folder

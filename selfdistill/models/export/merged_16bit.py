"""One ordinary 16-bit model: base and adapter merged in float32, layer by layer, and rounded once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfdistill.errors import UserError
from selfdistill.models.card import WHOLE_MODEL_USAGE, Card
from selfdistill.models.export import Format
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from selfdistill.models.export.verify import TransformersModel, Verification


@dataclass
class Merged16bit(Format):
    """One ordinary model: adapters merged, 4-bit weights dequantised, all in `dtype`, bfloat16 or float16.

    Writing takes the main memory of the 16-bit weights beside the model.
    """

    name = "merged_16bit"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16"):
            raise UserError(f"export.dtype={self.dtype}: write bfloat16 or float16.")

    def write(self, trained: "TransformersModel", folder: Path) -> None:
        import torch

        from selfdistill.models.export.merge import write_merged

        write_merged(trained, folder, getattr(torch, self.dtype))

    def described(self, card: Card, trained: "TransformersModel", folder: Path) -> Card:
        notes = (*card.notes, f"All weights in {self.dtype}, adapters merged; nothing else is needed to load it.")
        if trained.quantization is not None:
            notes += ("Trained on the base quantised to 4 bit: these are the dequantised weights plus the adapter.",)
        return replace(card, notes=notes, usage=WHOLE_MODEL_USAGE)

    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        from selfdistill.models.export.merge import merged_tensors
        from selfdistill.models.export.verify import compare, load_written, loaded, same_tensors
        from selfdistill.models.export.vllm_check import check_with_vllm

        written = load_written(folder, trained, dtype="auto")
        equal = same_tensors(merged_tensors(trained.base, written.dtype), written.state_dict())
        return compare(
            trained,
            loaded(written, folder, trained),
            folder,
            prompts,
            weights_equal=equal,
            limit=self.limit,
            notes=check_with_vllm(trained, folder, prompts, limit=self.limit),
        )

"""One ordinary model in 4 bit: base and adapter merged, then quantised to bitsandbytes' nf4."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from selfdistill.models.card import WHOLE_MODEL_USAGE, Card
from selfdistill.models.export import Format
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from selfdistill.models.export.verify import TransformersModel, Verification


@dataclass
class Merged4bit(Format):
    """Adapters merged, the layers in nf4 with double quantisation; embedding, head and norms stay in 16 bit.

    The merged 16-bit weights lie beside the result on the disk while it is written.
    """

    name = "merged_4bit"

    def missing(self) -> str | None:
        if find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed: pip install 'selfdistill[quantization]' brings it."
        return None

    def write(self, trained: "TransformersModel", folder: Path) -> None:
        import torch
        from transformers import BitsAndBytesConfig

        from selfdistill.models.export.folder import write_companions
        from selfdistill.models.export.merge import write_merged
        from selfdistill.models.export.verify import load_written

        dtype = torch.float16 if trained.base.dtype == torch.float16 else torch.bfloat16
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        with TemporaryDirectory(dir=folder) as merged:
            write_merged(trained, Path(merged), dtype)
            trained.tell("quantising to nf4")
            model = load_written(Path(merged), trained, dtype=dtype, quantization_config=nf4)
        model.config._name_or_path = ""
        model.save_pretrained(folder)
        write_companions(trained, folder)

    def described(self, card: Card, trained: "TransformersModel", folder: Path) -> Card:
        notes = (*card.notes, "Layers in bitsandbytes' nf4 (pip install bitsandbytes), adapters merged.")
        return replace(card, notes=notes, usage=WHOLE_MODEL_USAGE)

    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        from importlib.metadata import version

        from selfdistill.models.export.verify import FOUR_BIT, compare, load_written, loaded

        written = load_written(folder, trained, dtype="auto")
        return compare(
            trained,
            loaded(written, folder, trained),
            folder,
            prompts,
            weights_equal=None,
            consumer=f"transformers and bitsandbytes {version('bitsandbytes')}",
            tolerance=FOUR_BIT,
            limit=self.limit,
        )

"""One ordinary 16-bit model: base and adapter merged in float32, layer by layer, and rounded once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selfdistill.errors import UserError
from selfdistill.models.export import ExportError, Format
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
        """Write the model to `folder`.

        Raises:
            UserError: the adapter is of a kind that cannot be merged.
            ExportError: a merged weight is not finite in `dtype`.
        """
        import torch

        from selfdistill.models.export.folder import base_location, write_card, write_companions
        from selfdistill.models.export.merge import head_is_tied, merged_tensors

        base = trained.base
        tensors = dict(merged_tensors(base, getattr(torch, self.dtype)))
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ExportError(f"the merged weight {name} is not finite in {self.dtype}; nothing was written")
        notes = [f"All weights in {self.dtype}; nothing else is needed to load it."]
        config = copy.deepcopy(base.config)
        if trained.quantization is not None:
            del config.quantization_config
            notes.append("Trained on the base quantised to 4 bit: these are the dequantised weights plus the adapter.")
        config.use_cache = True
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False) and head_is_tied(base, tensors)
        config._attn_implementation = "eager"  # the skeleton never computes; this one needs no extra package
        with torch.device("meta"):
            skeleton = type(base)(config)
        skeleton.load_state_dict(tensors, strict=True, assign=True)
        skeleton.tie_weights()
        skeleton.save_pretrained(folder)
        write_companions(trained, folder)
        origin = base_location(base) if base.name_or_path else "trained from scratch"
        loader = "transformers.AutoModelForCausalLM"
        write_card(folder, title=f"Merged model, {self.dtype}", base=origin, loader=loader, notes=notes)

    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        from selfdistill.models.export.merge import merged_tensors
        from selfdistill.models.export.verify import compare, load, loaded, roomy_device, same_tensors

        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        written = load(folder, trained, dtype="auto", device_map={"": roomy_device(trained.base.device, size)})
        equal = same_tensors(merged_tensors(trained.base, written.dtype), written.state_dict())
        return compare(trained, loaded(written, folder), folder, prompts, weights_equal=equal)

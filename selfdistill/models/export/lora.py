"""The adapter as PEFT saves it, with an absolute reference to its base."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfdistill.models.card import Card, python_usage
from selfdistill.models.export import ExportError, Format
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from selfdistill.models.export.verify import TransformersModel, Verification


@dataclass
class Lora(Format):
    """The active adapter alone, for use on top of its base."""

    name = "lora"
    needs_adapter = True

    def write(self, trained: "TransformersModel", folder: Path) -> None:
        from selfdistill.models.card import ADAPTER
        from selfdistill.models.export.folder import base_location, write_companions

        base, adapter = base_location(trained.base), str(trained.model.active_adapter)
        if not base:
            raise ExportError("the base model was made in memory, so that an adapter alone can refer to nothing")
        trained.model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
        if (folder / adapter).is_dir():  # PEFT puts every adapter but "default" into a folder of its own
            for file in (folder / adapter).iterdir():
                shutil.move(file, folder / file.name)
            (folder / adapter).rmdir()
        config = json.loads((folder / ADAPTER).read_text()) | {"base_model_name_or_path": base}
        (folder / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_companions(trained, folder)

    def described(self, card: Card, trained: "TransformersModel", folder: Path) -> Card:
        notes = card.notes
        if trained.quantization is not None:
            notes += ("Trained on the base quantised to 4 bit: load the base the same way for the same answers.",)
        served = f"vllm serve {card.base} --enable-lora --lora-modules mine=THIS_FOLDER"
        usage = f"{python_usage('peft', 'AutoPeftModelForCausalLM')}\n\nvLLM: `{served}`"
        return replace(card, notes=notes, usage=usage)

    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        import peft
        from peft import PeftModel, get_peft_model_state_dict

        from selfdistill.models.export.verify import compare, load, loaded, same_tensors
        from selfdistill.models.export.vllm_check import check_with_vllm

        config = json.loads((folder / "adapter_config.json").read_text())
        base = load(
            config["base_model_name_or_path"],
            trained,
            revision=config.get("revision") or "main",
            dtype=trained.base.dtype,
            quantization_config=trained.quantization,
            device_map={"": trained.base.device},
        )
        written = PeftModel.from_pretrained(base, folder)
        adapter = str(trained.model.active_adapter)
        ours = get_peft_model_state_dict(trained.model, adapter_name=adapter, save_embedding_layers=False)
        theirs = get_peft_model_state_dict(written, save_embedding_layers=False)
        equal = same_tensors(ours.items(), theirs)
        where, rank = config["base_model_name_or_path"], int(config.get("r") or 16)
        notes = (
            []
            if trained.quantization is not None
            else check_with_vllm(trained, folder, prompts, base=where, rank=rank, limit=self.limit)
        )
        return compare(
            trained,
            loaded(written, folder, trained),
            folder,
            prompts,
            weights_equal=equal,
            consumer=f"PEFT {peft.__version__}",
            limit=self.limit,
            notes=notes,
        )

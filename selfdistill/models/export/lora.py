"""The adapter as PEFT saves it, with an absolute reference to its base."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selfdistill.models.export import Format
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from selfdistill.models.export.verify import TransformersModel, Verification


@dataclass
class Lora(Format):
    """The active adapter alone, for use on top of its base."""

    name = "lora"
    needs_adapter = True

    def write(self, trained: "TransformersModel", folder: Path) -> None:
        from selfdistill.models.export.folder import base_location, write_card, write_companions

        base, adapter = base_location(trained.base), str(trained.model.active_adapter)
        trained.model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
        if (folder / adapter).is_dir():  # PEFT puts every adapter but "default" into a folder of its own
            for file in (folder / adapter).iterdir():
                shutil.move(file, folder / file.name)
            (folder / adapter).rmdir()
        config_file = folder / "adapter_config.json"
        config = json.loads(config_file.read_text()) | {"base_model_name_or_path": base}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_companions(trained, folder)
        notes = ["A LoRA adapter: it works on top of this base only, which is not part of this folder."]
        if Path(base).is_absolute():
            notes.append(
                "The base is a folder of the machine that trained. Elsewhere, change `base_model_name_or_path` in "
                "`adapter_config.json` to where the base lies there, or export with `export=merged_16bit`."
            )
        if trained.quantization is not None:
            notes.append("Trained on the base quantised to 4 bit: load the base the same way for the same answers.")
        write_card(folder, title="LoRA adapter", base=base, loader="peft.AutoPeftModelForCausalLM", notes=notes)

    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        from peft import PeftModel, get_peft_model_state_dict

        from selfdistill.models.export.verify import compare, load, loaded, same_tensors

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
        return compare(trained, loaded(written, folder), folder, prompts, weights_equal=equal)

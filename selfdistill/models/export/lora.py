"""The adapter as PEFT saves it, with an absolute reference to its base."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.models.export.folder import base_location, new_folder, write_card, write_companions
from selfdistill.models.generation import base_model


def export_lora(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write the active adapter of a PEFT model to `folder`. The model in memory is not changed.

    Raises:
        UserError: the model has no adapter, because the run trained all weights.
    """
    if not hasattr(model, "peft_config"):
        raise UserError(
            "export=lora needs an adapter, but model.tuning=full trained all weights: "
            "write export=merged_16bit, or train with model.tuning=lora."
        )
    base = base_location(model)
    adapter = model.active_adapter
    with new_folder(folder) as partial:
        model.save_pretrained(partial, selected_adapters=[adapter], save_embedding_layers=False)
        if (partial / adapter).is_dir():  # PEFT puts every adapter but "default" into a folder of its own
            for file in (partial / adapter).iterdir():
                shutil.move(file, partial / file.name)
            (partial / adapter).rmdir()
        config_file = partial / "adapter_config.json"
        config = json.loads(config_file.read_text()) | {"base_model_name_or_path": base}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_companions(model, tokenizer, partial)
        notes = ["A LoRA adapter: it works on top of this base only, which is not part of this folder."]
        if Path(base).is_absolute():
            notes.append(
                "The base is a folder of the machine that trained. Elsewhere, change `base_model_name_or_path` in "
                "`adapter_config.json` to where the base lies there, or export with `export=merged_16bit`."
            )
        if getattr(base_model(model).config, "quantization_config", None) is not None:
            notes.append("Trained on the base quantised to 4 bit: load the base the same way for the same answers.")
        usage = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
        )
        write_card(partial, title="LoRA adapter", base=base, usage=usage, notes=notes, library="peft")
    return Path(folder).absolute()

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
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfdistill.models.export.verify import Verification


@dataclass
class Lora(Format):
    """The active adapter alone, for use on top of its base."""

    name = "lora"
    needs_adapter = True

    def write(self, model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
        from peft import PeftModel

        from selfdistill.models.export.folder import base_location, quantization, write_card, write_companions

        assert isinstance(model, PeftModel)
        base, adapter = base_location(model), model.active_adapter
        model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
        if (folder / adapter).is_dir():  # PEFT puts every adapter but "default" into a folder of its own
            for file in (folder / adapter).iterdir():
                shutil.move(file, folder / file.name)
            (folder / adapter).rmdir()
        config_file = folder / "adapter_config.json"
        config = json.loads(config_file.read_text()) | {"base_model_name_or_path": base}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_companions(model, tokenizer, folder)
        notes = ["A LoRA adapter: it works on top of this base only, which is not part of this folder."]
        if Path(base).is_absolute():
            notes.append(
                "The base is a folder of the machine that trained. Elsewhere, change `base_model_name_or_path` in "
                "`adapter_config.json` to where the base lies there, or export with `export=merged_16bit`."
            )
        if quantization(model) is not None:
            notes.append("Trained on the base quantised to 4 bit: load the base the same way for the same answers.")
        write_card(folder, title="LoRA adapter", base=base, loader="peft.AutoPeftModelForCausalLM", notes=notes)

    def verify(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        folder: Path,
        prompts: Sequence[Prompt] = (),
    ) -> "Verification":
        from peft import PeftModel, get_peft_model_state_dict
        from transformers import AutoModelForCausalLM

        from selfdistill.models.export.folder import quantization
        from selfdistill.models.export.verify import compare, loaded, loading_options, same_tensors
        from selfdistill.models.structure import inner_model

        assert isinstance(model, PeftModel)
        config, inner = json.loads((folder / "adapter_config.json").read_text()), inner_model(model)
        base = AutoModelForCausalLM.from_pretrained(
            config["base_model_name_or_path"],
            revision=config.get("revision") or "main",
            dtype=inner.dtype,
            quantization_config=quantization(model),
            device_map={"": inner.device},
            **loading_options(inner),
        )
        written = PeftModel.from_pretrained(base, folder)
        ours = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
        theirs = get_peft_model_state_dict(written, save_embedding_layers=False)
        return compare(
            model, tokenizer, folder, loaded(written, folder), prompts, weights_equal=same_tensors(ours.items(), theirs)
        )

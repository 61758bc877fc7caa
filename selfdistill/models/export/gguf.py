"""One file for llama.cpp and Ollama, and the Modelfile that gives Ollama the model's own chat template."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from selfdistill.errors import UserError
from selfdistill.models.card import Card
from selfdistill.models.export import ExportError, Format
from selfdistill.models.export.llama_cpp import LlamaCpp, find
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from selfdistill.models.export.verify import TransformersModel, Verification

MODEL = "model.gguf"
MODELFILE = "Modelfile"
WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Type:
    """A type of GGUF file.

    Attributes:
        number: llama.cpp's `LLAMA_FTYPE`.
        limit: what a token's log-probability may differ by.
        direct: whether the converter itself writes it; the others are quantised from f16.
    """

    number: int
    limit: float
    direct: bool = False


# The types that llama.cpp writes without an importance matrix; docs/EXPORT.md has differences that were measured.
TYPES = {
    "f32": Type(0, 0.01, direct=True),
    "f16": Type(1, 0.01, direct=True),
    "bf16": Type(32, 0.1, direct=True),
    "q8_0": Type(7, 0.1, direct=True),
    "q6_k": Type(18, 0.5),
    "q5_k_m": Type(17, 1.0),
    "q5_k_s": Type(16, 1.0),
    "q5_1": Type(9, 1.0),
    "q5_0": Type(8, 1.0),
    "q4_k_m": Type(15, 2.0),
    "q4_k_s": Type(14, 2.0),
    "q4_1": Type(3, 2.0),
    "q4_0": Type(2, 2.0),
    "iq4_nl": Type(25, 2.0),
    "iq4_xs": Type(30, 2.0),
    "q3_k_l": Type(13, 4.0),
    "q3_k_m": Type(12, 4.0),
    "q3_k_s": Type(11, 4.0),
    "iq3_m": Type(27, 4.0),
    "iq3_s": Type(26, 4.0),
    "q2_k": Type(10, 8.0),
    "tq2_0": Type(37, 16.0, direct=True),
    "tq1_0": Type(36, 16.0, direct=True),
}


@dataclass
class Gguf(Format):
    """Adapters merged in float32, converted and quantised by llama.cpp.

    While it is written, the float32 weights lie beside it on the disk, and the f16 file of a type that is quantised.

    Attributes:
        type: one of TYPES.
        llama_cpp: the folder of llama.cpp, or of an environment that has it; None: it is looked for.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, instead of what its converter finds.
    """

    name = "gguf"
    type: str = "q8_0"
    llama_cpp: str | None = None
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise UserError(f"export.type={self.type}: write one of {', '.join(TYPES)}.")

    def missing(self) -> str | None:
        return find(self.llama_cpp).lacks()

    def write(self, trained: "TransformersModel", folder: Path) -> None:
        import torch

        from selfdistill.models.export.folder import base_location
        from selfdistill.models.export.gguf_tokenizer import prepare_tokenizer
        from selfdistill.models.export.merge import write_merged
        from selfdistill.models.export.modelfile import modelfile

        tools, kind = find(self.llama_cpp), TYPES[self.type]
        with TemporaryDirectory(dir=folder) as temporary:
            merged = Path(temporary) / "merged"
            merged.mkdir()
            write_merged(trained, merged, torch.float32)
            guess = prepare_tokenizer(merged, base_location(trained.base))
            first = folder / MODEL if kind.direct else Path(temporary) / "f16.gguf"
            trained.tell(f"converting to GGUF, {self.type if kind.direct else 'f16'}")
            self._convert(tools, merged, first, self.type if kind.direct else "f16", guess)
            if not kind.direct:
                trained.tell(f"quantising to {self.type}")
                self._quantise(tools, first, folder / MODEL)
        (folder / MODELFILE).write_text(modelfile(trained, MODEL)[0], encoding="utf-8")

    def described(self, card: Card, trained: "TransformersModel", folder: Path) -> Card:
        from selfdistill.models.export.modelfile import modelfile

        notes = (*card.notes, f"GGUF of type {self.type}, adapters merged.", *modelfile(trained, MODEL)[1])
        lines = ["```text", f"llama-server -m {MODEL} --jinja", "ollama create mine -f Modelfile && ollama run mine"]
        return replace(card, notes=notes, library="gguf", usage="\n".join([*lines, "```"]))

    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        from selfdistill.models.export.modelfile import compare_modelfile
        from selfdistill.models.export.verify import compare, compared_prompts
        from selfdistill.models.export.workers import Program

        tools, limit = find(self.llama_cpp), self.limit or TYPES[self.type].limit
        longest = max(len(trained.encode(prompt)) for prompt in compared_prompts(trained, prompts)) + 64
        settings = {"model": str(folder / MODEL), "context_tokens": max(512, longest)}
        with Program(
            "llama_cpp_python",
            settings,
            dtype=self.type,
            python=tools.python or sys.executable,
            chat_template_kwargs=trained.chat_template_kwargs,
        ) as written:
            notes = compare_modelfile(trained, written, folder / MODELFILE, prompts)
            return compare(
                trained,
                written,
                folder,
                prompts,
                weights_equal=None,
                consumer=written.ask("version"),
                limit=limit,
                notes=notes,
            )

    def _convert(self, tools: LlamaCpp, merged: Path, out: Path, kind: str, guess: str | None) -> None:
        named = self.pre_tokenizer or guess or "default"
        program = [sys.executable, str(WORKERS / "convert.py"), str(tools.converter), named]
        program += ["1" if self.pre_tokenizer or guess else "0"]
        _run([*program, str(merged), "--outfile", str(out), "--outtype", kind], "the converter")
        if not out.is_file():
            raise ExportError(f"llama.cpp's converter wrote no {out.name}")

    def _quantise(self, tools: LlamaCpp, source: Path, out: Path) -> None:
        if tools.quantise is not None:
            command = [tools.quantise, str(source), str(out), self.type.upper()]
        else:
            python, number = tools.python or sys.executable, str(TYPES[self.type].number)
            command = [python, str(WORKERS / "quantise.py"), str(source), str(out), number]
        _run(command, "quantisation")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise ExportError(f"llama.cpp: {what} ended with code {done.returncode}; it said: {' | '.join(said[-3:])}")

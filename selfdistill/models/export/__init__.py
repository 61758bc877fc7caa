"""Exports of a trained model, each loaded again from disk and compared with the model in memory.

A format is a class in a module of its own, and an option of the configuration group `export` names it; several are
chosen together with `export=[lora,gguf]`. Their modules import torch only inside the methods, because the check of the
configuration looks at the classes before torch loads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError
from selfdistill.models.card import Card
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfdistill.models.export.verify import TransformersModel, Verification

Tell = Callable[[str], None]


class ExportError(RuntimeError):
    """The export could not be written, or what was written does not answer as the model in memory does."""


@dataclass
class Format(ABC):
    """One way to hand a trained model on.

    Attributes:
        name: what the format is called in the configuration; its folder in a run is `export/NAME`.
        needs_adapter: whether only a model that was trained with an adapter can be exported so.
        limit: by how much the log-probability of a token may differ from that of the model in memory; None: the
            format's own limit.
    """

    name: ClassVar[str]
    needs_adapter: ClassVar[bool] = False

    limit: float | None = field(default=None, kw_only=True)

    def missing(self) -> str | None:
        """What is not installed here and how to install it, in a sentence; None where nothing is missing."""
        return None

    @abstractmethod
    def write(self, trained: "TransformersModel", folder: Path) -> None:
        """Write every file but the page to `folder`, which is empty; the model in memory stays as it is."""

    @abstractmethod
    def verify(self, trained: "TransformersModel", folder: Path, prompts: Sequence[Prompt] = ()) -> "Verification":
        """Load `folder` with the program that its users will load it with, and compare (`verify.compare`).

        Raises:
            ExportError: what was loaded answers otherwise than the model in memory.
        """

    def described(self, card: Card, trained: "TransformersModel", folder: Path) -> Card:
        """The run's card with what is to be said of this format: how it is loaded, what it needs."""
        return card

    def run(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        folder: str | Path,
        prompts: Sequence[Prompt] = (),
        *,
        card: Card | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tell: Tell = lambda line: None,
    ) -> Path:
        """Write the export to `folder`, verify it on `prompts`, and write its page; returns the absolute path.

        Args:
            card: what is known of the run; without it the page says what the model itself shows.
            chat_template_kwargs: arguments of the chat template that the model was trained with.
            tell: gets a line for each part of the work.

        Raises:
            UserError: the model has no adapter and the format needs one, or something that is no export is in the way.
            ExportError: it could not be written, or answers otherwise than the model in memory.
        """
        if lacks := self.missing():
            raise ExportError(f"export={self.name}: {lacks}")
        from selfdistill.models.card import write_card
        from selfdistill.models.export.folder import base_location, new_folder
        from selfdistill.models.export.verify import TransformersModel

        trained = TransformersModel(model, tokenizer, dict(chat_template_kwargs or {}), tell)
        if self.needs_adapter and not trained.has_adapter:
            raise UserError(
                f"export={self.name} needs an adapter, but model.tuning=full trained all weights: "
                "write export=merged_16bit, or train with model.tuning=lora."
            )
        folder = Path(folder).absolute()
        tell(f"{self.name}: writing {folder}")
        with new_folder(folder) as partial:
            self.write(trained, partial)
        tell(f"{self.name}: loading it again and comparing")
        found = self.verify(trained, folder, prompts)
        title = card.title if card else "A model trained with selfdistill"
        base = card.base if card else base_location(trained.base) or "made in memory"
        card = self.described(replace(card or Card(title, base), title=f"{title}: {self.name}"), trained, folder)
        write_card(folder, replace(card, notes=(*card.notes, *found.sentences())))
        return folder


@dataclass(frozen=True)
class Exported:
    """What came of one format: the folder and, where it was pushed, its address; or why there is none."""

    folder: Path | None = None
    url: str | None = None
    error: str | None = None


class Exports:
    """The formats that a run is exported to, one after the other; one that fails doesn't keep the others back.

    Args:
        formats: by their names in the configuration.
        push_to: the hub's OWNER/NAME that verified exports are uploaded to; of several formats, each to
            OWNER/NAME-FORMAT.
        private: whether a repository that has to be made is private.
        limit: see `Format`.
        settings: keys beside these that formats refer to, such as `type`.

    Raises:
        UserError: a setting that no format takes, or a repository without owner.
    """

    def __init__(
        self,
        formats: Mapping[str, Any],
        push_to: str | None = None,
        private: bool = True,
        limit: float | None = None,
        **settings: Any,
    ) -> None:
        self.formats: dict[str, Format] = dict(formats)
        self.push_to, self.private = push_to, private
        known = {known.name for format_ in self.formats.values() for known in fields(format_)}
        for key in settings:
            if key not in known:
                raise UserError(f"export.{key} is not a key: {closest(key, known | {'push_to', 'private', 'limit'})}")
        if limit is not None and not limit > 0:
            raise UserError(f"export.limit={limit}: write a number above 0, or null for each format's own.")
        if push_to is not None and (push_to.count("/") != 1 or not all(push_to.split("/"))):
            raise UserError(f"export.push_to={push_to}: write OWNER/NAME, a repository on the hub.")

    def missing(self) -> list[str]:
        """What is not installed here, a sentence for each format that needs it."""
        found = ((name, format_.missing()) for name, format_ in self.formats.items())
        return [f"export={name}: {lacks}" for name, lacks in found if lacks]

    def run(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        folder: Path,
        prompts: Sequence[Prompt] = (),
        **how: Any,
    ) -> dict[str, Exported]:
        """Exports to FOLDER/NAME for each format; what fails is said in its entry.

        Args:
            how: `card`, `chat_template_kwargs` and `tell` of `Format.run`.
        """
        done: dict[str, Exported] = {}
        for name, format_ in self.formats.items():
            place = None
            try:
                place = format_.run(model, tokenizer, folder / name, prompts, **how)
                done[name] = Exported(place, self._pushed(name, place, how.get("tell")))
            # Whatever an export breaks on, weights and record of the run are worth more than a traceback.
            except Exception as error:
                said = str(error) if isinstance(error, ExportError | UserError) else f"{type(error).__name__}: {error}"
                done[name] = Exported(place, error=said)
        return done

    def _pushed(self, name: str, folder: Path, tell: Tell | None) -> str | None:
        if self.push_to is None:
            return None
        from selfdistill.models.export.hub import push

        repository = self.push_to if len(self.formats) == 1 else f"{self.push_to}-{name}"
        if tell is not None:
            tell(f"{name}: uploading to {repository}")
        return push(folder, repository, private=self.private)

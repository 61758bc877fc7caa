"""What can be said of student and teacher from their files, before any weights load: for `--check` and the doctor."""

from typing import TYPE_CHECKING

from selfdistill.config.schema import Run
from selfdistill.config.targets import make
from selfdistill.data.chat import Prompts
from selfdistill.teachers.language import Speaker, files_of, own_findings

if TYPE_CHECKING:
    from selfdistill.teachers.interface import BaseTeacher


def language_findings(run: Run, *, ask_server: bool) -> list[str]:
    """How student and teacher are asked and end differently, each with what to set; none where files are not at hand.

    Args:
        ask_server: whether a served teacher is asked too.

    Raises:
        UserError: they have no end in common, or the chat template cannot be used.
    """
    try:
        tokenizer, ends = files_of(run.model.name, revision=run.model.revision, local_files_only=True)
    except (OSError, ValueError):
        return []
    data = {name: run.data.get(name) for name in ("prompt_tokens", "chat_template")}
    prompts = Prompts(
        system=None,
        prompt_tokens=data["prompt_tokens"],
        max_prompt_tokens=None,
        chat_template=data["chat_template"] or "default",
        template_kwargs=run.model.chat_template_kwargs,
    )
    student = Speaker(tokenizer, ends, run.model.chat_template_kwargs, prompts.prepare(tokenizer))
    found = own_findings(student)
    teacher: BaseTeacher | None = make(run.teacher, "teacher")
    if teacher is not None and (ask_server or not teacher.served):
        try:
            found += teacher.compare(student)
        except (OSError, ValueError):
            return found  # the teacher's files are not at hand
        finally:
            teacher.close()
    return found

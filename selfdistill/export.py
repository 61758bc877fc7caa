"""Export a finished run again, or to another format.

    python -m selfdistill.export run=outputs/RUN_ID export=merged_16bit [export.dtype=float16] [force=true]

The result lies in RUN_FOLDER/export/FORMAT, with verification.json saying how it compared with the run's weights.
"""

import sys
from pathlib import Path
from typing import Any

from selfdistill.config.conf import CONF
from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

FORMATS = CONF / "export"


def parse(arguments: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The command's own settings, and the configuration of the format that was asked for.

    Raises:
        UserError: an unknown key or format, or one that is missing.
    """
    from omegaconf import OmegaConf

    formats = sorted(path.stem for path in FORMATS.glob("*.yaml") if path.stem != "none")
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise UserError(f"'{argument}': write key=value, for example run=outputs/RUN_ID export={formats[0]}.")
        given[key] = value
    if "export" in given and given["export"] not in formats:
        raise UserError(f"export={given['export']}: there is no such format; {closest(given['export'], formats)}")
    config = dict(OmegaConf.load(FORMATS / f"{given['export']}.yaml")) if "export" in given else {}
    keys = ["run", "export", "force", *(f"export.{key}" for key in config if key != "_target_")]
    for key in given:
        if key not in keys:
            raise UserError(f"{key} is not a key: {closest(key, keys)}")
    for key in ("run", "export"):
        if key not in given:
            raise UserError(
                f"{key}= is missing: write run=outputs/RUN_ID export=FORMAT, FORMAT one of {', '.join(formats)}."
            )
    if given.setdefault("force", "false") not in ("true", "false"):
        raise UserError(f"force={given['force']}: write true or false.")
    dotlist = [f"{key.removeprefix('export.')}={value}" for key, value in given.items() if key.startswith("export.")]
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist(dotlist))
    return given, dict(OmegaConf.to_container(merged))


def main(arguments: list[str]) -> Path:
    """Load the run, export, verify; returns the folder of the export."""
    from selfdistill.runs.finished import load_policy, read_run

    given, config = parse(arguments)
    run = read_run(given["run"], force=given["force"] == "true")

    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        export = instantiate(config)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    model, tokenizer = load_policy(run)
    return export.run(model, tokenizer, run.folder / "export" / export.name, run.prompts)


if __name__ == "__main__":
    from selfdistill.models.export import ExportError

    if not sys.argv[1:] or set(sys.argv[1:]) & {"-h", "--help"}:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] else 2)
    try:
        folder = main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except ExportError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(f"{folder}\n{(folder / 'verification.json').read_text()}", end="")

"""Training and evaluation data written by a served model.

    python -m selfdistill.generate_data model=glm-4.7 base_url=http://localhost:8000/v1 prompts=prompts.jsonl
    python -m selfdistill.generate_data model=glm-4.7 topics=topics.txt train_samples=100 eval_samples=20

Prompts come from a file, or the model itself writes them about topics. Every prompt that gets a response worth keeping
becomes a row {"prompt", "golden_response"}. Started again with the same settings, it goes on where it was interrupted:
every answer is kept in OUTPUT/answers and none is asked for twice. Exit code 1 when there are fewer rows than wanted.
"""

from omegaconf import DictConfig

from selfdistill.config import doors
from selfdistill.config.conf import CONF


def run(cfg: DictConfig) -> None:
    """Check the settings, ask the server, write the files."""
    from selfdistill.teachers.server import dataset

    settings = doors.typed(dataset.DatasetSettings, cfg)
    if dataset.generate(settings, doors.built(cfg, "keep")):
        raise SystemExit(1)


def main() -> None:
    doors.main(CONF / "_commands" / "generate_data.yaml", run, __doc__)


if __name__ == "__main__":
    main()

"""The hub's own loading code, on a folder of parquet files: no network."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfdistill.errors import UserError
from tests.data.helpers import everything, load, rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    (folder / "data").mkdir(parents=True)
    for split, count in {"train": 30, "test": 6}.items():
        table = pa.Table.from_pylist([{**row, "meta": {"split": split}} for row in rows(count)])
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_train_is_taken_without_a_split(folder):
    splits = load(folder, format="hub")
    assert len(splits.train) == 27 and len(splits.eval) == 3
    found = everything(splits)[0]
    assert found["prompt"] == [{"role": "user", "content": "question 0"}]
    assert found["answer"] == "answer 0" and found["meta"] == {"split": "train"} and found["id"] == "1"


def test_splits(folder):
    assert len(everything(load(folder, format="hub", split="test"))) == 6
    assert len(everything(load(folder, format="hub", split="train[:50%]"))) == 15


def test_a_split_beside_the_name(folder, tmp_path, monkeypatch):
    from selfdistill.data.readers import hub_records

    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list(rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert len(list(hub_records("owner/other:test", "data.path", "train", "main", True))) == 2
    list(hub_records("owner/other", "data.path", "train", None, False))
    assert asked == [("owner/other", "main", "test", True), ("owner/other", None, "train", False)]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_an_owner_and_a_name_mean_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=r"data.path=owner/name: the dataset is not in the local cache"):
        load("owner/name", local_files_only=True)


def test_no_such_split(folder):
    with pytest.raises(UserError, match=r"no split 'validation': .*Write data.split=one of them"):
        load(folder, format="hub", split="validation")


def test_no_such_subset(folder):
    with pytest.raises(UserError, match=r"no subset 'french': .*Write data.subset=one of them"):
        load(folder, format="hub", subset="french")


def test_rows_are_checked_with_their_numbers(folder):
    with pytest.raises(UserError, match="row 1: no field 'question', and every row must have it"):
        load(folder, format="hub", answer_field="question")

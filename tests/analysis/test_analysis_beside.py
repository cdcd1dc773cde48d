"""A result of the same digest is taken from another experiment's directory, if it is whole."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semgap.analysis.beside import CODECS_DIGEST, digest_of_codecs, digest_of_json, digest_of_trial, experiments, first_equal
from semgap.experiment.measure_codecs import sealed_codecs
from semgap.seal import place_of, sealed_json

FILES = ("steps.parquet", "manifest.json")


def trial(directory: Path, digest: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "steps.parquet").write_text("")
    (directory / "manifest.json").write_bytes(sealed_json({"cell_digest": digest}))
    return directory


def test_an_experiment_looks_at_home_then_in_results_then_at_the_other_names(tmp_path: Path) -> None:
    for name in ("trials", "b/trials", "a/trials", "mine/trials", "tables", "c/tables"):
        (tmp_path / name).mkdir(parents=True)
    named = [tmp_path / name for name in ("a", "b", "mine")]
    assert experiments(tmp_path, tmp_path) == [tmp_path, *named]
    assert experiments(tmp_path, tmp_path / "mine") == [tmp_path / "mine", tmp_path, *named[:2]]
    assert experiments(tmp_path, tmp_path / "new") == [tmp_path / "new", tmp_path, *named]


@pytest.mark.parametrize(
    ("digests", "found"),
    [
        ({"own": "x", "other": "x"}, "own"),
        ({"own": "y", "other": "x"}, "other"),
        ({"own": "y", "other": "z"}, "own"),
        ({"other": "x"}, "other"),
        ({"other": "y"}, "own"),
        ({}, "own"),
    ],
)
def test_the_first_equal_trial_is_taken_and_without_one_its_place_is_at_home(tmp_path: Path, digests: dict[str, str], found: str) -> None:
    for name, digest in digests.items():
        trial(tmp_path / name, digest)
    places = [tmp_path / name for name in ("own", "other")]
    assert first_equal(places, "x", lambda place: digest_of_trial(place, FILES)) == tmp_path / found


@pytest.mark.parametrize("name", FILES)
def test_a_trial_that_lacks_a_file_is_not_taken(tmp_path: Path, name: str) -> None:
    (trial(tmp_path / "t", "x") / name).unlink()
    assert digest_of_trial(tmp_path / "t", FILES) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"cell_digest": "x"}', sealed_json({}), sealed_json({"cell_digest": 1})])
def test_a_damaged_manifest_has_no_digest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    assert digest_of_json(tmp_path / "manifest.json") is None


def test_the_digest_of_codecs_is_in_their_schema(tmp_path: Path) -> None:
    file, table = tmp_path / "model=m.parquet", pa.table({"ratio": [1.0]})
    assert digest_of_codecs(file) is None
    pq.write_table(table.replace_schema_metadata({CODECS_DIGEST: b"x"}), file)
    assert digest_of_codecs(file) is None, "it has no seal"
    file.write_bytes(sealed_codecs(table, "x", place_of(file)))
    assert digest_of_codecs(file) == "x"
    file.write_bytes(file.read_bytes().replace(b"x", b"y"))
    assert digest_of_codecs(file) is None

"""The log of evaluations."""

from pathlib import Path

from regrow.lab.search.log import Log


def test_records_are_read_back_and_a_torn_line_is_taken_off(tmp_path: Path) -> None:
    file = tmp_path / "new" / "log.jsonl"
    log = Log(file)
    for i in range(3):
        log.append({"i": i})
        assert file.read_text().count("\n") == i + 1
    log.close()
    with file.open("a") as opened:
        opened.write('{"i": 3, "va')
    again = Log(file)
    assert again.records == [{"i": i} for i in range(3)]
    again.append({"i": 4})
    again.close()
    assert Log(file).records == [*({"i": i} for i in range(3)), {"i": 4}]

"""Files that are broken somewhere: what is read of them, and what stands in place of the rest."""

import gzip
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from shades import png

from transformers_lmeye.data.records import BROKEN_RECORD, ROW_SOURCE, read_records


def _read(path: Path, content: bytes | str) -> list[tuple[str, dict | str]]:
    """Where each record stands, and the record, or what is wrong with it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = []
    for record in read_records([str(path)]):
        place = record.pop(ROW_SOURCE).removeprefix(f"{path.name}, ")
        found.append((place, record.get(BROKEN_RECORD) or record))
    return found


def _all_but_reasons(found: list[tuple[str, dict | str]]) -> list[tuple[str, dict | None]]:
    return [(place, record if isinstance(record, dict) else None) for place, record in found]


def test_broken_lines_of_json(tmp_path):
    found = _read(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"a": 1}\n{"a": tru}\n\n[1]\n{"a": "\\ud83d\\ude00"}\r\n{"a": "\xff"}\n{"a": 2',
    )
    assert _all_but_reasons(found) == [
        ("line 1", {"a": 1}),
        ("line 2", None),
        ("line 4", None),
        ("line 5", {"a": "😀"}),
        ("line 6", None),
        ("line 7", None),
    ]
    assert "a.jsonl, line 2: it is no JSON (Expecting value" in found[1][1]
    assert "it is no object but [1]" in found[2][1]
    assert "it is no UTF-8 (invalid start byte at byte 7)" in found[4][1]


def test_a_list_is_read_in_chunks(tmp_path, monkeypatch):
    """Whatever a chunk cuts: strings, numbers, escapes, characters of several bytes; records longer than chunks."""
    records = [{"n": n, 'é\\"': "ü" * (n % 40), "x": [n * 1000 + 0.25, True, None, {"k": "\n"}]} for n in range(60)]
    for chunk in (1, 7, 16, 1 << 20):
        monkeypatch.setattr("transformers_lmeye.data.records._CHUNK", chunk)
        for ensure_ascii in (True, False):
            for indent in (None, 1):
                text = json.dumps(records, ensure_ascii=ensure_ascii, indent=indent)
                found = _read(tmp_path / "a.json", f"  {text}\n")
                assert [record for _, record in found] == records, (chunk, ensure_ascii, indent)
    assert found[3][0] == "record 3"
    assert _read(tmp_path / "a.json", "[]") == []


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('[{"a": 1}, {"a" 2}, {"a": 3}]', 1),
        ('[{"a": 1}, {"a": "cut', 1),
        ('[{"a": 1}, {"a": 2}', 2),
        ('[{"a": 1}, {"a": 2},', 2),
        ('[{"a": 1}] and more', 1),
    ],
)
def test_a_broken_list_ends_with_a_broken_record(tmp_path, monkeypatch, chunk, text, good):
    monkeypatch.setattr("transformers_lmeye.data.records._CHUNK", chunk)
    found = _read(tmp_path / "a.json", text)
    assert [record for _, record in found[:good]] == [{"a": n + 1} for n in range(good)]
    assert len(found) == (good if "more" in text else good + 1)
    if "more" not in text:
        assert found[good][0] == f"record {good}"
        assert "it is no JSON" in found[good][1] and "nothing behind it in this file can be read" in found[good][1]


def test_broken_rows_of_tables(tmp_path):
    text = 'image,caption\na.png,"one\ntwo"\nb.png,x,y\nc.png\n\nd.png,"""ok"""\ne.png,"open\nf.png,g\n'
    found = _read(tmp_path / "a.csv", text)
    assert _all_but_reasons(found) == [
        ("lines 2 to 3", {"image": "a.png", "caption": "one\ntwo"}),
        ("line 4", None),
        ("line 5", None),
        ("line 7", {"image": "d.png", "caption": '"ok"'}),
        ("lines 8 to 9", None),
    ]
    assert found[1][1].endswith("a.csv, line 4: it has 3 fields, and the head has 2")
    assert "a quote" in found[4][1] and "before the end of the file" in found[4][1]
    # A quote that is closed far below takes what lies between with it, and says which lines.
    found = _read(tmp_path / "a.csv", "image,caption\n" + 'a.png,"x\n' + "b.png,y\n" * 20000 + "d.png,w\n")
    assert "lines 2 to" in found[0][0] and "field larger than field limit" in found[0][1]
    assert found[-1][1] == {"image": "d.png", "caption": "w"}


@pytest.mark.parametrize(
    ("head", "separator"),
    [("image\tcaption", "\t"), ("image;caption", ";"), ("image,caption", ","), ('"image","a,b\tc"', ",")],
)
def test_separators_are_those_of_the_head(tmp_path, head, separator):
    ((place, record),) = _read(tmp_path / "a.csv", f"{head}\r\na.png{separator}words\r\n")
    assert list(record.values()) == ["a.png", "words"]
    assert place == "line 2"


def test_encodings_of_tables(tmp_path):
    lines = ["image,caption", "1,été", "2,naïve", "3,plain"]
    texts = ["été", "naïve", "plain"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"):
        found = _read(tmp_path / "a.csv", "\n".join(lines).encode(encoding))
        assert [record["caption"] for _, record in found] == texts, encoding
    # One broken line among good ones does not make a file of UTF-8 one of Windows.
    content = "\n".join(lines).encode() + b"\n4,caf\xe9\n5,\xc3\xa9"
    found = _read(tmp_path / "a.csv", content)
    assert [record["caption"] if isinstance(record, dict) else None for _, record in found] == [*texts, None, "é"]
    assert "it is no UTF-8" in found[3][1]


def test_compressed_files_that_were_cut(tmp_path):
    content = gzip.compress(b"".join(b'{"a": %d}\n' % n for n in range(100_000)))
    found = _read(tmp_path / "a.jsonl.gz", content[: len(content) // 2])
    assert 10_000 < len(found) < 100_000
    assert [record["a"] for _, record in found[:-2]] == list(range(len(found) - 2))
    assert "the file ends or breaks" in found[-1][1]
    found = _read(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n1,2\n"))
    assert found == [("line 2", {"a": "1", "b": "2"})]


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return buffer.getvalue()


def test_broken_members_of_shards(tmp_path):
    members = [
        ("0.png", png(10)),
        ("0.txt", b"good"),
        ("1.png", png(10)),
        ("1.json", b'{"caption": '),
        ("2.png", png(10)),
        ("2.txt", b"caf\xe9"),
        ("3.png", b""),
        ("3.txt", b"an empty picture"),
        ("4.txt", b"no picture"),
        ("5.json", b"[1]"),
        ("README", b"no record"),
    ]
    found = _read(tmp_path / "a.tar", _tar(members))
    assert [place for place, _ in found] == ["0", "1", "2", "3", "4", "5"]
    assert found[0][1] == {"id": "0", "image": {"bytes": png(10), "path": "0.png"}, "caption": "good"}
    assert "a.tar, 1.json: it is no JSON" in found[1][1]
    assert "a.tar, 2.txt: it is no UTF-8" in found[2][1]
    assert found[3][1]["image"] == {"bytes": b"", "path": "3.png"}
    assert found[4][1] == {"id": "4", "caption": "no picture"}
    assert "a.tar, 5.json: it is no object" in found[5][1]


def test_shards_that_were_cut(tmp_path):
    """Wherever: the whole records before the cut are read, then one broken record says what happened."""
    members = [(f"{n}.{kind}", b"x" * 900) for n in range(6) for kind in ("jpg", "txt")]
    content = _tar(members)
    for length in range(100, 12 * 1536 - 100, 700):
        found = _read(tmp_path / "a.tar", content[:length])
        assert isinstance(found[-1][1], str), length
        assert "nothing behind them can be read" in found[-1][1]
        assert [record["id"] for _, record in found[:-1]] == [f"{n}" for n in range(len(found) - 1)]
        assert all(record["caption"] == "x" * 900 for _, record in found[:-1])
        assert len(found) - 1 <= length // 3072
    assert len(_read(tmp_path / "a.tar", content)) == 6
    ((_, reason),) = _read(tmp_path / "a.tar", b"no archive")
    assert "ends or breaks behind 0 records" in reason

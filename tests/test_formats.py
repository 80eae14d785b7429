"""Readers and writers: what users' files look like, good and bad."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from backports import zstd
from conftest import write_rows
from hypothesis import assume, example, given
from hypothesis import strategies as st

from inpars_lib import files, formats
from inpars_lib.cli import InputError
from inpars_lib.formats import lines
from inpars_lib.formats.fields import single_line
from inpars_lib.formats.records import Doc, Qrel, ScoredDoc, Topic
from inpars_lib.training.examples import TripleFile


def zst(data: bytes) -> bytes:
    """Compress as `zstd` does, with a checksum."""
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}
PACKERS["pzstd"] = lambda data: b"P*M\x18\4\0\0\0size" + zst(data[:9]) + zst(data[9:])  # a skippable frame and two


@pytest.mark.parametrize(
    "lines",
    [
        ["007\tfirst text", "d2\tsecond text"],
        ['{"id": "007", "contents": "first text"}', '{"id": "d2", "contents": "second text"}'],
        ['{"_id": "007", "title": "first", "text": "text"}', '{"_id": "d2", "title": "", "text": "second text"}'],
        ['{"doc_id": "007", "text": "first text"}', '{"doc_id": "d2", "text": "second text", "url": "u"}'],
    ],
    ids=["tsv", "anserini", "beir", "doc_id"],
)
@pytest.mark.parametrize("pack", ["plain", *PACKERS, "bom and crlf"])
def test_every_spelling_of_a_collection_reads_the_same(tmp_path: Path, lines: list[str], pack: str) -> None:
    data = ("\r\n" if pack == "bom and crlf" else "\n").join([*lines, ""]).encode()
    path = tmp_path / "collection"
    path.write_bytes(b"\xef\xbb\xbf" + data if pack == "bom and crlf" else PACKERS.get(pack, bytes)(data))
    assert list(formats.read_collection(str(path))) == [Doc("007", "first text"), Doc("d2", "second text")]
    assert formats.read_texts(str(path), {"d2", "absent"}) == {"d2": "second text"}


def test_newlines_and_tabs_inside_a_text_become_spaces(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "c.jsonl", [{"id": 7, "contents": " a\tb\r\nc\u2028d\0e "}])
    assert list(formats.read_collection(str(path))) == [Doc("7", "a b c d e")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"no tab here", "no tab"),
        (b"\ttext", "the id is empty"),
        (b"two words\ttext", "contains whitespace"),
        (b'{"id": "x", "contents": "cut off', "not JSON"),
        (b'{"contents": "text"}', "none of the fields"),
        (b'{"id": null, "contents": "text"}', "neither a string nor a whole number"),
        (b'{"id": "x", "contents": ["text"]}', "not a string"),
        (b"x\t\xff\xfe", "not valid UTF-8"),
    ],
)
def test_a_malformed_line_is_named_and_skipped(tmp_path: Path, capsys, line: bytes, reason: str) -> None:
    path = tmp_path / "collection.tsv"
    path.write_bytes(b"d1\tone\n" + line + b"\nd3\tthree\n")
    assert [doc.doc_id for doc in formats.read_collection(str(path))] == ["d1", "d3"]
    said = capsys.readouterr().err
    assert f"{path}, line 2: " in said
    assert reason in said
    path.write_bytes(line + b"\n")
    with pytest.raises(InputError, match="no usable line found"):
        list(formats.read_collection(str(path)))


def test_a_header_without_a_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "collection.tsv"
    path.write_text("id\ttitle\n1\tone\n")
    with pytest.raises(InputError, match=f"{path}, line 1: none of the fields contents, .* the row has 'id', 'title'"):
        list(formats.read_collection(str(path)))


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("what is it\ta document\t1\nwhat is it\tanother\t0\n", "pairs of a query and a document with a label"),
        ("5\td12\td7\n6\td3\td4\n", "ids of triples"),
        ("q1 Q0 d1 1 2.5 tag\n", "a run, which --run takes"),
        ("d1\tone text\nd2\ttwo\n", "lines `id<TAB>text`"),
    ],
)
def test_files_of_another_role_are_no_triples(tmp_path: Path, text: str, role: str) -> None:
    path = tmp_path / "triples.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"triples.tsv: this file seems to hold {role}"):
        TripleFile(str(path))


def test_the_first_malformed_lines_are_shown_and_all_are_counted(tmp_path: Path, capsys) -> None:
    path = tmp_path / "collection.tsv"
    path.write_text("d1\tone\n" * 8 + "bad\n" * 7)
    assert len(list(formats.read_collection(str(path)))) == 8
    said = capsys.readouterr().err
    assert said.count("no tab") == lines.QUOTED_PROBLEMS
    assert "7 of 15 lines are malformed" in said


@pytest.mark.parametrize("pack", PACKERS)
def test_damaged_data_is_an_error(tmp_path: Path, pack: str) -> None:
    path = tmp_path / "cut.tsv"
    data = b"".join(b"%d\t%s\n" % (i, os.urandom(50).hex().encode()) for i in range(100))
    path.write_bytes(PACKERS[pack](data)[:-500])
    with pytest.raises(InputError, match=f"{path}: damaged (gzip|bzip2|xz|Zstandard) data"):
        list(formats.read_collection(str(path)))
    with pytest.raises(InputError, match=f"{path}: damaged"):
        TripleFile(str(path))
    packed = bytearray(PACKERS[pack](data))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(InputError, match=f"{path}: damaged"):
        list(formats.read_collection(str(path)))
    path.write_bytes(PACKERS[pack](b"\n"))
    with pytest.raises(InputError, match="no usable line found"):
        list(formats.read_collection(str(path)))


def test_an_id_like_the_first_bytes_of_bzip2(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("BZh9\tfirst text\n")
    assert list(formats.read_collection(str(tmp_path / "c.tsv"))) == [Doc("BZh9", "first text")]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_suffix_compresses_an_output(tmp_path: Path, suffix: str) -> None:
    for name in (f"a.{suffix}", f"b.{suffix}"):
        formats.write_texts(str(tmp_path / name), [Topic("1", "é" * 99), Topic("2", "x")])
    data = (tmp_path / f"a.{suffix}").read_bytes()
    assert data == (tmp_path / f"b.{suffix}").read_bytes()
    assert data[4:8] == bytes(4) or suffix != "gz"  # no time stamp
    unpack = {"gz": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress, "zst": zstd.decompress}[suffix]
    assert unpack(data).decode() == f"1\t{'é' * 99}\n2\tx\n"
    with pytest.raises(RuntimeError), files.atomic_write(str(tmp_path / f"a.{suffix}")) as file:
        file.write("half")
        raise RuntimeError
    assert (tmp_path / f"a.{suffix}").read_bytes() == data
    assert not list(tmp_path.glob("*.unfinished"))


def test_duplicate_ids(tmp_path: Path) -> None:
    collection = tmp_path / "c.tsv"
    collection.write_text("a\tone\na\ttwo\nb\tsame\nb\tsame\n")
    assert formats.read_texts(str(collection), {"b"}) == {"b": "same"}
    with pytest.raises(InputError, match="the id a is on two lines"):
        formats.read_texts(str(collection), {"a"})
    topics = tmp_path / "t.tsv"
    topics.write_text("1\tone\n2\ttwo\n1\tthree\n")
    with pytest.raises(InputError, match=r"line 3: the query id 1 is repeated"):
        formats.read_topics(str(topics))
    run = tmp_path / "r.txt"
    run.write_text("1\ta\t1\n1\ta\t2\n")
    with pytest.raises(InputError, match="query 1 lists a document twice"):
        formats.read_run(str(run))
    qrels = tmp_path / "q.txt"
    qrels.write_text("1 0 a 1\n1 0 a 1\n1 0 a 2\n")
    with pytest.raises(InputError, match=r"line 3: query 1 and document a have another grade"):
        list(formats.read_qrels(str(qrels)))


def test_topics_of_beir_and_msmarco(tmp_path: Path) -> None:
    tsv = tmp_path / "t.tsv"
    tsv.write_text("01\twhat is x\n2\twhy\n")
    jsonl = write_rows(tmp_path / "t.jsonl", [{"_id": "01", "text": "what is x"}, {"_id": "2", "text": "why"}])
    assert formats.read_topics(str(tsv)) == formats.read_topics(str(jsonl)) == {"01": "what is x", "2": "why"}


ROBUST = """
<top>

<num> Number: 301
<title> International
  Organized Crime & AT&T

<desc> Description:
Identify organizations
</top>
<TOP lang='en'><NUM>007</NUM><TITLE> Topic: x &lt; y &amp; z < 3 </TITLE>
"""
WEB = """<?xml version="1.0" encoding="UTF-8"?>
<webtrack2009>
<topic number='301' type="faceted"><query>International Organized Crime &amp; AT&amp;T</query>
<description>d</description><subtopic number="1">s</subtopic></topic>
<topic number="007">
  <query> x &lt; y &amp; z &lt; 3</query></topic>
</webtrack2009>
"""


@pytest.mark.parametrize("text", [ROBUST, ROBUST.replace("\n", "\r\n"), "\ufeff" + ROBUST.strip(), WEB])
def test_trec_topics(tmp_path: Path, text: str) -> None:
    (tmp_path / "topics").write_bytes(text.encode())
    expected = {"301": "International Organized Crime & AT&T", "007": "x < y & z < 3"}
    assert formats.read_topics(str(tmp_path / "topics")) == expected


@pytest.mark.parametrize(
    ("fields", "query"),
    [
        ("<title> what does std::vector<int> do </title>", "what does std::vector<int> do"),
        ("<title> is a<b when p<0.05", "is a<b when p<0.05"),
        ("<title> x < y and a <b>bold</b> word\n<desc> d", "x < y and a <b>bold</b> word"),
        ("<!-- <title>old</title>\n --><title>new</title>", "new"),
        ("<desc>see the <title> field</desc><query>real query</query>", "real query"),
        ("<title> ?a=1&copy=2&amp;b", "?a=1&copy=2&b"),
        ("<title>how to use the <title> tag</title>", "how to use the <title> tag"),
        ("<title>html <time> element\n<a href></title>", "html <time> element <a href>"),
        ("<title><![CDATA[a < b]]></title>", "a < b"),
        ("<title></title><query>real query", "real query"),
    ],
)
def test_trec_topics_with_markup_in_the_query(tmp_path: Path, fields: str, query: str) -> None:
    (tmp_path / "topics").write_text(f"<top>\n<num> 1\n{fields}\n</top>\n")
    assert formats.read_topics(str(tmp_path / "topics")) == {"1": query}


def test_trec_topics_of_mixed_files(tmp_path: Path) -> None:
    """An unclosed description before a closed one, a comment with tags before the topics, a second number."""
    topics = "<!-- a > b <x> -->\n<top><num>1<title>one<desc>open</top>\n<top><num>2<title>two<desc>d</desc></top>\n"
    (tmp_path / "t").write_text(topics + "<top><num>3</num><title>three</title></top>\n")
    assert formats.read_topics(str(tmp_path / "t")) == {"1": "one", "2": "two", "3": "three"}
    (tmp_path / "t.xml").write_text('<t><topic number="1" sub-number="2"><query>q</query></topic></t>')
    assert formats.read_topics(str(tmp_path / "t.xml")) == {"1": "q"}


def test_a_comment_line_fixes_no_number_of_columns(tmp_path: Path) -> None:
    (tmp_path / "q").write_text("# my qrels\n1 0 a 2\n")
    assert list(formats.read_qrels(str(tmp_path / "q"))) == [Qrel("1", "a", 2)]
    (tmp_path / "r").write_text("# a comment line\n1 Q0 a 1 1.5 x\n")
    assert formats.read_run(str(tmp_path / "r")) == {"1": [("1", "a", 1.5)]}


def test_topics_that_name_a_document(tmp_path: Path) -> None:
    data = [{"qid": "1", "docid": "D5", "query": "foo"}, {"query_id": "2", "doc_id": "D", "text": "t", "query": "bar"}]
    assert formats.read_topics(str(write_rows(tmp_path / "t.jsonl", data))) == {"1": "foo", "2": "bar"}


def test_bad_trec_topics(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "topics"
    first = b"<top>\n<num> 1\n<title> x\n</top>\n"
    for topic, problem in ((b"<num> 2\n<title>\n<desc> x", "no <title> or <query>"), (b"<title> y", "no number")):
        path.write_bytes(first + b"<top>\n" + topic)
        with pytest.raises(InputError, match=f"topics, line 5: the topic has {problem}"):
            formats.read_topics(str(path))
    path.write_bytes(first + b"<top><num> 2<title> caf\xe9</top>\n")
    assert formats.read_topics(str(path)) == {"1": "x"}
    assert "line 5: not valid UTF-8" in capsys.readouterr().err
    path.write_text("<top><num>1<title>x</top>\n\n<top><num>1<title>y</top>")
    with pytest.raises(InputError, match="line 3: the query id 1 is repeated"):
        formats.read_topics(str(path))
    path.write_text("<html><p>not found</p></html>\n")
    with pytest.raises(InputError, match="this is a web page, not the data"):
        formats.read_topics(str(path))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('qid,query\n1,"cats, dogs"\n', r"separated by commas \(CSV\). Run python -c .*c.txt"),
        ('"query_id","text"\r\n1,cats\r\n', r"separated by commas \(CSV\)"),
        ("docno,text\nd1,cats\n", r"separated by commas \(CSV\)"),
        ("<DOC>\n<DOCNO> FT911-1 </DOCNO>\n<TEXT>\ncats\n</TEXT>\n</DOC>\n", "TREC's SGML"),
        ('[{"number": 1, "turn": [{"number": 1, "raw_utterance": "cats?"}]}]', "conversations"),  # CAsT
        ('{"number": "9-1", "title": "t", "turns": [{"utterance": "cats?"}]}\n', "conversations"),  # iKAT
    ],
)
def test_topics_of_other_layouts(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "c.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
        formats.read_topics(str(path))


def test_a_text_that_begins_with_a_name_and_a_comma(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("id,ego\twhat is it\n2\tid, ego\n")
    assert formats.read_topics(str(tmp_path / "t.tsv")) == {"id,ego": "what is it", "2": "id, ego"}


def test_a_tsv_file_may_hold_tags(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("<http://a>\tthe <top> shelf\n2\t<title> tag\n")
    assert formats.read_topics(str(tmp_path / "t.tsv")) == {"<http://a>": "the <top> shelf", "2": "<title> tag"}


def test_other_usual_field_names(tmp_path: Path) -> None:
    data = [{"docid": "1", "title": "t", "text": "x"}, {"pid": "2", "passage": "y"}, {"docno": "3", "content": "z"}]
    data += [{"id": "4", "body": "b"}, {"_id": "5", "segment": "s"}, {"pid": "6", "passage": "p", "docid": "d"}]
    data += [
        {"docid": "7", "title": "t", "headings": "h", "segment": "s"},
        {"docid": "8", "headings": "h", "body": "b"},
    ]
    path = write_rows(tmp_path / "c.jsonl", [*data, {"id": "9", "title": "t", "contents": "c"}])
    texts = ["t x", "y", "z", "b", "s", "p", "t h s", "h b", "c"]
    assert list(formats.read_texts(str(path), set("123456789")).values()) == texts


def test_objects_without_a_text_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "c.jsonl", [{"id": "1", "abstract": "x"}, {"doc_id": "2", "question": "q"}])
    with pytest.raises(InputError, match="no usable line"):
        list(formats.read_collection(str(path)))


def test_a_header_line_is_no_document(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.tsv").write_text("pid\tpassage\n1\tone\n")
    assert [doc.doc_id for doc in formats.read_collection(str(tmp_path / "c.tsv"))] == ["1"]
    assert not capsys.readouterr().err


def test_utf16_is_refused(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "t.tsv").write_text("1\twhat is x\n", encoding=encoding)
        with pytest.raises(InputError, match="UTF-16"):
            formats.read_topics(str(tmp_path / "t.tsv"))


def test_scores_in_the_column_of_ranks_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "r.tsv"
    for text in ("1\ta\t30\n1\tb\t20\n", "1\ta\t0\n", "1\ta\t5\n1\tb\t5\n"):
        run.write_text(text)
        with pytest.raises(InputError, match="is not a rank"):
            formats.read_run(str(run))
    run.write_text("1\ta\t2\n1\tb\t1\n1\tc\t3\n")
    assert [hit.doc_id for hit in formats.read_run(str(run))["1"]] == ["b", "a", "c"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "docs.jsonl", [{"id": "1", "contents": "x"}])
    for name in ("topics.tsv", "queries.jsonl", "synthetic_queries.jsonl", "dev.queries.tsv"):
        (tmp_path / name).write_text("1\tx\n")
        with pytest.raises(InputError, match=f"also has {name}"):
            list(formats.read_collection(str(tmp_path)))
        (tmp_path / name).unlink()
    assert len(list(formats.read_collection(str(tmp_path)))) == 1


def test_qrels_of_trec_and_beir(tmp_path: Path) -> None:
    trec, beir = tmp_path / "q.txt", tmp_path / "q.tsv"
    trec.write_text("1 0 a 2\n1\t0\tb\t0\n")
    beir.write_text("query-id\tcorpus-id\tscore\n1\ta\t2.0\n1\tb\t0\n")
    assert (
        list(formats.read_qrels(str(trec)))
        == list(formats.read_qrels(str(beir)))
        == [Qrel("1", "a", 2), Qrel("1", "b", 0)]
    )


def test_a_fractional_grade_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("1 0 a 1.0\n1 0 b 0.5\n")
    with pytest.raises(InputError, match=r"q.txt, line 2: the grade 0.5 is not a whole number"):
        list(formats.read_qrels(str(tmp_path / "q.txt")))


def test_all_kinds_of_run_give_the_same_order(tmp_path: Path) -> None:
    trec, msmarco, colbert = tmp_path / "r.txt", tmp_path / "r.tsv", tmp_path / "ranking.tsv"
    # Score decides, not the order of lines; a tie goes by the rank of the file.
    trec.write_text("1 Q0 c 3 2.5 x\n1 Q0 a 1 9.5 x\n1 Q0 b 2 2.5 x\n2 Q0 a 1 1.0 x\n")
    msmarco.write_text("1\tc\t3\n1\ta\t1\n1\tb\t2\n2\ta\t1\n")
    colbert.write_text("1\tc\t3\t2.5\n1\ta\t1\t9.5\n1\tb\t2\t2.5\n2\ta\t1\t1.0\n")
    for path in (trec, msmarco, colbert):
        run = formats.read_run(str(path))
        assert {query: [hit.doc_id for hit in hits] for query, hits in run.items()} == {
            "1": ["a", "b", "c"],
            "2": ["a"],
        }
    assert list(formats.read_run(str(trec), {"2"})) == ["2"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("1 a 2 2\n1 b 1 1", "are not clearly"),  # rank and score, or score and rank
        ("1 a 9.5 1\n1 b 8.5 2", "line 1: '9.5' is not a rank"),  # score and rank
        ("1 a 30 1\n1 b 20 2", "are not clearly"),
        ("1 a 1 1.5\n1 b 1 0.5", "are not clearly"),
        ("1 a 1 0.5\n1 b 2 1.5", "are not clearly"),
        ("1 0 7067032 1\n2 0 7067056 1", "seems to hold relevance judgements, which --qrels takes"),
        ("1 0 1 1", "seems to hold relevance judgements"),
        ("1 Q0 7 1.5\n2 Q0 b 1 0.5 x", "are not clearly"),  # a torn line of a TREC run
    ],
)
def test_four_columns_that_could_mean_something_else_are_refused(tmp_path: Path, lines: str, reason: str) -> None:
    (tmp_path / "r.tsv").write_text(lines + "\n")
    with pytest.raises(InputError, match=reason):
        formats.read_run(str(tmp_path / "r.tsv"))


@pytest.mark.parametrize("kind", ["trec", "beir"])
def test_a_line_of_qrels_without_its_grade_is_named_and_skipped(tmp_path: Path, capsys, kind: str) -> None:
    """With numeric ids, the line would be another judgement in the other format."""
    lines = "1 0 7 2\n1 0 184\n1 0 9 1\n" if kind == "trec" else "query-id\tcorpus-id\tscore\n1 7 2\n1 0 9 4\n1 9 1\n"
    (tmp_path / "q").write_text(lines)
    assert list(formats.read_qrels(str(tmp_path / "q"))) == [Qrel("1", "7", 2), Qrel("1", "9", 1)]
    assert re.search("q, line [23]: expected [34] columns, found [34]", capsys.readouterr().err)


def test_a_cut_line_of_a_run_is_not_of_another_format(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.txt").write_text("1 Q0 7 1 1.5 x\n1 Q0 486\n")
    assert formats.read_run(str(tmp_path / "r.txt")) == {"1": [("1", "7", 1.5)]}
    assert "line 2: expected 6 columns, found 3" in capsys.readouterr().err


def test_a_torn_line_of_a_run_is_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.txt").write_text("1 Q0 7 1 1.5 x\n1 Q0 8 2\n")
    assert formats.read_run(str(tmp_path / "r.txt")) == {"1": [("1", "7", 1.5)]}
    assert "line 2: expected 6 columns, found 4" in capsys.readouterr().err


def test_a_written_run_is_read_back_by_us_and_by_ir_measures(tmp_path: Path) -> None:
    import ir_measures

    hits = [ScoredDoc("q1", "007", 1.5), ScoredDoc("q1", "b", -0.25), ScoredDoc("q2", "b", 0.0)]
    path = str(tmp_path / "new" / "run.txt")
    formats.write_run(path, hits, "tag")
    assert [hit for ranked in formats.read_run(path).values() for hit in ranked] == hits
    assert [tuple(hit) for hit in ir_measures.read_trec_run(path)] == [tuple(hit) for hit in hits]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    docs = [Doc("007", "a\ttext\nin lines"), Doc("x", 'quotes " and {braces} \u2028 é')]
    formats.write_texts(str(tmp_path / "c.tsv"), docs)
    assert list(formats.read_collection(str(tmp_path / "c.tsv"))) == [Doc(i, single_line(text)) for i, text in docs]
    formats.write_texts(str(tmp_path / "t.tsv"), [Topic("1", "why"), Topic("2", "what")])
    assert formats.read_topics(str(tmp_path / "t.tsv")) == {"1": "why", "2": "what"}
    (tmp_path / "triples.tsv").write_text(formats.tsv_line("q\tr", "p\np", "n"))
    assert list(TripleFile(str(tmp_path / "triples.tsv"))) == [("q r", "p p", "n")]


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(str(path)) as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]
    with files.atomic_write(str(path)) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_synthetic_queries_keep_their_fields(tmp_path: Path, capsys) -> None:
    good = {"doc_id": 7, "doc_text": "t", "question": "a\nb", "log_probs": [-1, -0.5], "extra": {"x": 1}}
    path = write_rows(tmp_path / "q.jsonl", [good, {"doc_id": "8", "question": "c"}])
    with path.open("a") as file:
        file.write(
            '{"doc_id": "9", "question": "d", "log_probs": [NaN]}\n{"doc_id": "9", "question": "d", "log_probs": "x"}\n'
        )
    first, second = formats.read_synthetic_queries(str(path))
    assert (first.line, first.doc_id, first.question, first.log_probs) == (0, "7", "a b", [-1, -0.5])
    assert json.loads(first.line_text) == good
    assert second.log_probs is None
    said = capsys.readouterr().err
    assert "line 3: 'log_probs' contains something other than finite numbers" in said
    assert "line 4: 'log_probs' is not a list" in said


@pytest.mark.parametrize("pack", ["plain", *PACKERS])
def test_triples_are_read_at_random(tmp_path: Path, capsys, pack: str) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes(PACKERS.get(pack, bytes)("q1\té one\tn1\nonly\ttwo\n\nq2\tp2\tn2\n".encode()))
    triples = TripleFile(str(path))
    assert len(triples) == 2
    assert triples[1] == ("q2", "p2", "n2")
    assert triples[0] == ("q1", "é one", "n1")
    assert [triple.query for triple in triples] == ["q1", "q2"]
    assert "line 2: expected three texts" in capsys.readouterr().err


def test_json_lines_hold_any_text() -> None:
    row = {"doc_id": "1", "question": 'tab\t"quote" \u2028 \ud83d\ude00 é'}
    line = files.json_line(row)
    assert line.count("\n") == 1
    assert json.loads(line) == row


# ------------------------------------------------------------------------- whatever a writer wrote, a reader reads back

# A file that begins with a bracket is JSON.
IDS = st.text(min_size=1, max_size=8).filter(lambda w: w.split() == [w] and w.isprintable() and w[0] not in "{[")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@given(st.dictionaries(IDS, TEXTS, min_size=1))
@example({'"': '"'})
def test_any_texts_are_read_back(texts: dict[str, str]) -> None:
    header = {"contents", "text", "body", "passage", "segment", "query"}  # in both columns: a header line
    assume(not any(text.strip().lower() in header for text in texts.values()))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/texts.tsv"
        formats.write_texts(path, [Topic(*item) for item in texts.items()])
        expected = {query_id: single_line(text) for query_id, text in texts.items()}
        assert formats.read_topics(path) == expected
        assert {doc.doc_id: doc.text for doc in formats.read_collection(path)} == expected
        with gzip.open(f"{path}.gz", "wb") as file:
            file.writelines(files.json_line({"_id": i, "title": "", "text": t}).encode() for i, t in texts.items())
        assert formats.read_topics(f"{path}.gz") == expected


@given(st.dictionaries(st.tuples(IDS, IDS), st.tuples(st.integers(-1, 9), st.floats(-1e6, 1e6)), min_size=1))
def test_any_judgements_and_any_run_are_read_back(pairs: dict[tuple[str, str], tuple[int, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        qrels = [Qrel(*pair, grade) for pair, (grade, _) in pairs.items()]
        Path(folder, "qrels").write_text("".join(f"{q} 0 {d} {grade}\n" for q, d, grade in qrels))
        assert list(formats.read_qrels(f"{folder}/qrels")) == qrels
        hits = [ScoredDoc(*pair, float(f"{score:.9g}")) for pair, (_, score) in pairs.items()]
        hits.sort(key=lambda hit: (hit.query_id, -hit.score))
        formats.write_run(f"{folder}/run", hits, "tag")
        read = [hit for ranked in formats.read_run(f"{folder}/run").values() for hit in ranked]
        assert read == hits


WORDS = TEXTS.filter(single_line)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1))
def test_any_triples_are_read_back(texts: list[tuple[str, str, str]]) -> None:
    triples = [
        (single_line(query), single_line(positive), f"no {single_line(text)}") for query, positive, text in texts
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "t.tsv").write_text("".join(formats.tsv_line(*triple) for triple in triples), newline="\n")
        assert list(TripleFile(f"{folder}/t.tsv")) == triples


# ------------------------------------------------------------------------------------------- folders and ir_datasets


def test_a_folder_of_beir_is_its_corpus(tmp_path: Path) -> None:
    write_rows(tmp_path / "corpus.jsonl", [{"_id": "1", "title": "a", "text": "b"}])
    packed = zstd.compress((tmp_path / "corpus.jsonl").read_bytes())
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "corpus.jsonl.zst").write_bytes(packed)
    assert list(formats.read_collection(str(tmp_path / "packed"))) == [Doc("1", "a b")]
    write_rows(tmp_path / "queries.jsonl", [{"_id": "2", "text": "c"}])
    assert list(formats.read_collection(str(tmp_path))) == [Doc("1", "a b")]
    (tmp_path / "corpus.jsonl").rename(tmp_path / "corpus.json")
    (tmp_path / "queries.jsonl").rename(tmp_path / "corpus.json.zst")
    with pytest.raises(InputError, match=r"this folder has both corpus.json and corpus.json.zst"):
        list(formats.read_collection(str(tmp_path)))
    (tmp_path / "corpus.json.zst").rename(tmp_path / "queries.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.tsv, \.jsonl or \.json file"):
        list(formats.read_collection(str(tmp_path / "empty")))
    assert formats.read_topics(str(tmp_path)) == {"2": "c"}
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n2\t1\t1\n")
    for folder in (tmp_path, tmp_path / "qrels"):
        assert list(formats.read_qrels(str(folder))) == [Qrel("2", "1", 1)]
    (tmp_path / "qrels" / "dev.tsv.gz").write_bytes(b"")
    (tmp_path / "qrels" / "train.tsv").write_bytes(b"")
    with pytest.raises(InputError, match=r"qrels: this folder has dev.tsv.gz, test.tsv, train.tsv.*qrels/test.tsv"):
        list(formats.read_qrels(str(tmp_path)))
    for read, names in (
        (formats.read_topics, "queries.jsonl"),
        (formats.read_qrels, "test.tsv or test.jsonl or dev.tsv"),
    ):
        with pytest.raises(InputError, match=f"empty: this folder has no {names}"):
            list(read(str(tmp_path / "empty")))


def test_a_bad_line_of_a_folder_is_named_with_its_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "1.tsv").write_text("a\tb\n")
    (tmp_path / "2.tsv").write_text("c\td\nbad\n")
    assert [doc.doc_id for doc in formats.read_collection(str(tmp_path))] == ["a", "c"]
    assert f"{tmp_path / '2.tsv'}, line 2: no tab" in capsys.readouterr().err


@pytest.fixture
def toy_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a data set `toy` of small files with ir_datasets, and `toy/docs` without queries."""
    import ir_datasets

    (tmp_path / "docs.tsv").write_text("007\tthe study of tides\nd2\tbread is baked\n")
    (tmp_path / "queries.tsv").write_text("1\twhat are tides\n")
    (tmp_path / "qrels.txt").write_text("1 0 007 2\n")
    files = {"docs_tsv": "docs.tsv", "queries_tsv": "queries.tsv", "qrels_trec": "qrels.txt"}
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "home"))
    sets = {"toy": ir_datasets.create_dataset(**{kind: str(tmp_path / name) for kind, name in files.items()})}
    sets["toy/docs"] = ir_datasets.create_dataset(docs_tsv=str(tmp_path / "docs.tsv"))
    for name, dataset in sets.items():
        monkeypatch.setitem(ir_datasets.registry._registered, name, dataset)


def test_ir_datasets(toy_dataset: None, tmp_path: Path) -> None:
    name = "ir_datasets:toy"
    assert list(formats.read_collection(name)) == [Doc("007", "the study of tides"), Doc("d2", "bread is baked")]
    assert formats.read_topics(name) == {"1": "what are tides"}
    assert list(formats.read_qrels(name)) == [Qrel("1", "007", 2)]
    with pytest.raises(InputError, match="ir_datasets knows no data set of this name"):
        formats.read_topics("ir_datasets:nosuch")
    with pytest.raises(InputError, match="ir_datasets:toy/docs: this data set has no queries"):
        formats.read_topics("ir_datasets:toy/docs")


def test_ir_datasets_without_a_network(toy_dataset: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConnectionError("no route to host")

    import ir_datasets

    dataset = ir_datasets.load("toy")
    for part, read in (
        ("docs", formats.read_collection),
        ("queries", formats.read_topics),
        ("qrels", formats.read_qrels),
    ):
        monkeypatch.setattr(dataset, f"{part}_iter", fail)
        with pytest.raises(InputError, match=r"ir_datasets:toy: cannot be downloaded \(no route to host\)"):
            list(read("ir_datasets:toy"))


def test_ir_datasets_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(InputError, match="ir_datasets:toy: the package ir_datasets is not installed"):
        formats.read_topics("ir_datasets:toy")

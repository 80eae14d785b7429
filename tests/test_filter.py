"""Stage 2."""

import json
import math
import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import error_line, kill_after, ok, rows, run, save_t5, write_rows

from inpars_lib.cli import InputError
from inpars_lib.files import exclusive
from inpars_lib.formats.records import SyntheticQuery
from inpars_lib.query_browser import QuerySample

SCRIPT = "filter_queries_by_score.py"


def query(doc_id: str, log_probs: list[float] | None, question: str = "what is it", text: str = "a text") -> dict:
    return {"doc_id": doc_id, "doc_text": text, "question": question, "log_probs": log_probs}


# Chosen so that each function has another favourite.
ROWS = [
    query("long", [-0.1] * 20),  # mean -0.1, sum -2, mean probability 0.90
    query("short", [-0.3] * 3),  # mean -0.3, sum -0.9, mean probability 0.74
    query("uneven", [-0.001] * 9 + [-4.0]),  # mean -0.4, sum -4.0, mean probability 0.90
    query("poor", [-2.0] * 4),
]


def kept(tmp_path: Path, data: list[dict], *args: object) -> list[str]:
    path = write_rows(tmp_path / "in.jsonl", data)
    ok(run(SCRIPT, "--input", path, "--output", tmp_path / "out.jsonl", *args))
    return [row["doc_id"] for row in rows(tmp_path / "out.jsonl")]


@pytest.mark.parametrize(
    ("name", "order", "formula"),
    [
        ("mean_log_probs", ["long", "short", "uneven", "poor"], lambda x: sum(x) / len(x)),
        ("sum_log_probs", ["short", "long", "uneven", "poor"], sum),
        ("mean_probs", ["long", "uneven", "short", "poor"], lambda x: sum(math.exp(p) for p in x) / len(x)),
    ],
)
def test_each_function_computes_what_its_name_says(tmp_path: Path, name: str, order: list[str], formula) -> None:
    if name == "mean_probs":  # 0.9 * 1 + 0.1 * exp(-4) = 0.9009 against exp(-0.1) = 0.9048
        assert formula(ROWS[0]["log_probs"]) > formula(ROWS[2]["log_probs"]) > formula(ROWS[1]["log_probs"])
    assert kept(tmp_path, ROWS, "--scoring_function", name) == order
    assert kept(tmp_path, ROWS, "--scoring_function", name, "--top_k", 2) == order[:2]
    for row in rows(tmp_path / "out.jsonl"):
        [original] = [r for r in ROWS if r["doc_id"] == row["doc_id"]]
        assert row.pop("score") == pytest.approx(formula(original["log_probs"]))
        assert row == original  # log_probs is unchanged


def test_ties_favour_no_ids(tmp_path: Path) -> None:
    data = [query(str(i), [-1.0, -1.0, -1.0]) for i in range(2000)]
    best = kept(tmp_path, data, "--top_k", 1000)
    assert kept(tmp_path, data[::-1], "--top_k", 1000) == best
    assert 400 < sum(doc_id.startswith("1") for doc_id in best) < 720  # 1,111 of 2,000; by id all 1,000 would


def test_the_query_browser_escapes_and_lists_rows(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 & <b>"
    data = [*ROWS, query("evil", [-0.2] * 3, question=evil, text=evil), query("few", [-0.1])]
    page = tmp_path / "page.html"
    kept(tmp_path, data, "--top_k", 3, "--sample_html", page)
    text = page.read_text()
    before, embedded = text.split('<script type="application/json" id="data">')
    embedded, after = embedded.split("</script>", 1)
    assert "alert" not in before + after
    assert not set("<>&") & set(embedded)
    shown = {row["doc_id"]: row for row in json.loads(embedded)["rows"]}
    assert {doc_id: row["status"] for doc_id, row in shown.items()} == {
        **dict.fromkeys(["long", "evil", "short"], "kept"),
        **dict.fromkeys(["uneven", "poor"], "below the cutoff"),
        "few": "with fewer than 3 tokens",
    }
    assert shown["evil"]["question"] == " ".join(evil.split())  # unchanged, but on one line
    assert shown["short"]["score"] == pytest.approx(-0.3)
    assert shown["few"]["score"] is None


def test_the_query_browser_marks_copies_and_repetition(tmp_path: Path) -> None:
    """Log-probability favours what the language model copied or repeats."""
    text = "Sourdough rises because of wild yeast, and of bacteria that live in the starter."
    document, prompt = "copied from the document", "copied from the prompt"
    flaws = {
        "Why does bread rise in the oven": "",
        "Is it because of wild yeast and bread": "",  # five words of the document
        "What rises because of wild yeast and so on": document,  # six
        "wild YEAST?": document,  # the whole query
        "wild yea": "",
        "How often should I feed a sourdough starter in the fridge?": prompt,
        "what is in my prompt": "",
        "the yeast of the yeast of the yeast of": "repeats itself",
    }
    data = [query(str(i), [-0.1] * 3, question, text) for i, question in enumerate(flaws)]
    page, own_prompt = tmp_path / "page.html", tmp_path / "prompt.txt"
    own_prompt.write_text("Document: {document_text}\nMy label: What is in my prompt?\n")

    def marked(*args: object) -> dict[str, str]:
        kept(tmp_path, data, "--sample_html", page, *args)
        shown = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])["rows"]
        return {row["question"]: row["flaw"] for row in shown}

    assert marked() == flaws
    of_shipped, of_own = [question for question in flaws if "fridge" in question or "my prompt" in question]
    assert marked("--prompt_template", own_prompt) == {**flaws, of_shipped: "", of_own: prompt}


def test_the_query_browser_shows_a_uniform_sample(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    sample = QuerySample(20)
    for i in range(200):
        sample.add(SyntheticQuery(i, str(i), "text", "question", None, {}), -i, None)
    with page.open("w") as file:
        sample.write(file, set(), "Summary.")
    sample = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    ids = {int(row["doc_id"]) for row in sample["rows"]}
    assert "20 of 200 rows, sampled at random" in sample["about"]
    assert len(ids) == 20
    assert min(ids) < 100 <= max(ids)  # from all over the file


def test_rows_that_are_dropped_are_counted_by_reason(tmp_path: Path) -> None:
    data = [
        query("good", [-1.0] * 5),
        query("few", [-0.1] * 2),
        query("many", [-0.1] * 9),
        query("copied", [-0.1] * 5, "A Text", "here is a text to copy"),
        query("empty", [], ""),
        query("none", None),
    ]
    path = write_rows(tmp_path / "in.jsonl", data)
    args = ["--input", path, "--output", tmp_path / "out.jsonl"]
    done = ok(run(SCRIPT, *args, "--max_tokens", 8, "--skip_questions_copied_from_context"))
    assert [row["doc_id"] for row in rows(tmp_path / "out.jsonl")] == ["good"]
    for reason in (
        "without a question",
        "without log-probabilities",
        "with fewer than 3 tokens",
        "with more than 8 tokens",
    ):
        assert f"dropped 1 row {reason}." in done.stderr
    assert "dropped 1 row copied from the document." in done.stderr
    assert "kept 1 of 6 rows" in done.stderr
    assert set(kept(tmp_path, data, "--min_tokens", 1)) == {"good", "few", "many", "copied"}


@pytest.mark.parametrize("function", ["mean_log_probs", "sum_log_probs", "mean_probs"])
def test_odd_bytes_and_numbers_in_a_row(tmp_path: Path, function: str) -> None:
    """They cost their row, or nothing."""
    good = json.dumps(query("good", [-1.0] * 3))
    odd = {
        "no UTF-8": good.encode().replace(b"what", b"wh\xff"),
        "no UTF-8 in the document": good.encode().replace(b"a text", b"\xe9"),
        "half a pair in the id": good.replace("good", "\\ud800").encode(),
        "deep": good.removesuffix("}").encode() + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "too large": good.replace("-1.0]", "-1e400]").encode(),
        "not negative": good.replace("-1.0]", "800]").encode(),
        "NaN": good.replace("-1.0]", "NaN]").encode(),
    }
    usable = [good.encode(), good.replace("good", "pair").replace("is it", "\\ud800").encode()]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*usable * 9, *odd.values()]))
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plot", tmp_path / "out.png"]
    files += ["--sample_html", tmp_path / "out.html", "--scoring_function", function]
    done = ok(run(SCRIPT, *files))
    assert "kept 18 of 19 rows" in done.stderr
    assert "dropped 1 row with log-probabilities above 0." in done.stderr
    assert "6 of 25 lines are malformed" in done.stderr
    assert "line 19: not valid UTF-8. The line is skipped." in done.stderr
    assert {row["doc_id"] for row in rows(tmp_path / "out.jsonl")} == {"good", "pair"}


def test_the_published_sets_are_valid_input(tmp_path: Path) -> None:
    """Published rows have numeric or string ids, questions with a leading space and further fields."""
    published = {
        "doc_id": 4983,
        "doc_text": "Text",
        "question": " What?\n",
        "log_probs": [-0.2, -0.3, -0.1],
        "tokens": 3,
    }
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(published) + "\n" + json.dumps({**published, "doc_id": "MED-1"}) + "\n")
    ok(run(SCRIPT, "--input", path, "--output", tmp_path / "out.jsonl"))
    assert {row["doc_id"] for row in rows(tmp_path / "out.jsonl")} == {4983, "MED-1"}


def test_the_histogram_is_a_png(tmp_path: Path) -> None:
    from matplotlib.image import imread

    kept(tmp_path, ROWS, "--top_k", 2, "--plot", tmp_path / "scores.png")
    picture = imread(tmp_path / "scores.png")
    colours = {tuple(round(float(c), 2) for c in pixel[:3]) for pixel in picture.reshape(-1, picture.shape[-1])}
    assert (0.12, 0.47, 0.71) in colours  # kept
    assert (0.75, 0.75, 0.75) in colours  # dropped
    assert (0.84, 0.15, 0.16) in colours  # the cut


def test_bad_input(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    empty = write_rows(tmp_path / "in.jsonl", [])
    assert "no usable line found" in error_line(run(SCRIPT, "--input", empty, "--output", output))
    short = write_rows(tmp_path / "in.jsonl", [query("few", [-0.1])])
    refused = run(SCRIPT, "--input", short, "--output", output)
    assert "every row was dropped (1 with fewer than 3 tokens)" in error_line(refused)
    no_probs = write_rows(tmp_path / "in.jsonl", [query("none", None)])
    assert "1 without log-probabilities" in error_line(run(SCRIPT, "--input", no_probs, "--output", output))
    assert "No such file" in error_line(run(SCRIPT, "--input", "absent", "--output", output))
    assert "--top_k" in error_line(run(SCRIPT, "--input", short, "--output", output, "--top_k", 0), 2)
    odd = run(SCRIPT, "--input", short, "--output", output, "--scoring_function", "x")
    assert "invalid choice" in error_line(odd, 2)
    assert output.read_text() == "old"


def test_a_reranker_scores_rows_without_log_probs(tmp_path: Path, separable: Path, tiny_t5: Path) -> None:
    """A tiny reranker learns to prefer documents that explain to documents that advertise."""
    training = [
        "--base_model",
        tiny_t5,
        "--triples_train",
        separable / "triples.tsv",
        "--output_dir",
        tmp_path / "model",
    ]
    more = ["--learning_rate", 3e-3, "--epochs", 8, "--gradient_accumulation_steps", 1]
    ok(run("train_t5.py", *training, *more, "--max_length", 64))
    texts = [line.split("\t") for line in (separable / "collection.tsv").read_text().splitlines()][:20]
    data = [query(doc_id, None, f"what are {text.split()[3]}", text) for doc_id, text in texts]
    del data[0]["log_probs"]
    chosen = ["--scoring_function", "monot5", "--model", tmp_path / "model", "--min_tokens", 3]
    assert all(doc_id.startswith("p") for doc_id in kept(tmp_path, data, *chosen, "--top_k", 10))
    scores = [row["score"] for row in rows(tmp_path / "out.jsonl")]
    assert scores == sorted(scores, reverse=True)
    usage = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "x", "--scoring_function", "monot5"]
    assert "--scoring_function monot5 and --model need each other" in error_line(run(SCRIPT, *usage), 2)


# ----------------------------------------------------------------------------------------------- resumed scoring


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return 4,200 rows, of which every seventh is dropped: 4 blocks."""
    words = ["tides", "bread", "violins", "glaciers", "bees", "bridges", "tea", "comets", "chess", "maps"]
    return [
        query(
            str(i), [-1.0] * (2 if i % 7 == 0 else 5), f"what are {words[i % 10]}", f"the {words[i // 10 % 10]} of {i}"
        )
        for i in range(4200)
    ]


def scoring_args(tmp_path: Path, data: list[dict], model: Path, output: str = "out.jsonl") -> list[object]:
    path = write_rows(tmp_path / "in.jsonl", data)
    files = ["--input", path, "--output", tmp_path / output, "--top_k", 3000]
    return [*files, "--scoring_function", "monot5", "--model", model]


def blocks(log: Path) -> int:
    """Return the number of finished blocks in a log."""
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


@pytest.mark.slow
def test_kills_do_not_change_the_kept_queries(tmp_path: Path, many: list[dict], tiny_t5: Path) -> None:
    """SIGKILL after one block more, several times. `KILLS=3 bash run_tests.sh -k kills` kills more often."""
    whole = ok(run(SCRIPT, *scoring_args(tmp_path, many, tiny_t5, "whole.jsonl")))
    assert "kept 3,000 of 4,200 rows" in whole.stderr
    args = scoring_args(tmp_path, many, tiny_t5)
    log = tmp_path / "out.jsonl.scores.jsonl"
    for _ in range(min(3, int(os.environ.get("KILLS", 2)))):
        kill_after(SCRIPT, *args, count=lambda: blocks(log))
        assert not (tmp_path / "out.jsonl").exists()
    with log.open("a") as file:
        file.write('{"pairs": "torn')
    finished = blocks(log)
    done = ok(run(SCRIPT, *args))
    assert "warning" not in done.stderr
    assert int(re.search(r"Scoring: +([0-9]+)%", done.stderr)[1]) >= 100 * finished // 5 > 0  # where the bar began
    assert re.search(r"Scoring: +100%.* 4200/4200 .*rows/s", done.stderr)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def unfinished(args: list[object]) -> str:
    """Score, but fail when the output is written, so that the log stays. Return the messages."""
    with patch("filter_queries_by_score.write_together", side_effect=InputError("not written")):
        done = run(SCRIPT, *args)
    assert "not written" in error_line(done)
    return done.stderr


def test_scores_of_other_rows_or_settings_are_not_used(
    tmp_path: Path, many: list[dict], separable: Path, tiny_t5: Path
) -> None:
    data, output = many[:1300], tmp_path / "out.jsonl"
    log = tmp_path / "out.jsonl.scores.jsonl"
    args = scoring_args(tmp_path, data, tiny_t5)
    unfinished(args)
    assert blocks(log) == 2
    assert "Scoring" not in unfinished(args)  # all is scored
    # A changed row: the block before it is used again, its own is not.
    changed = [*data[:1250], {**data[1250], "question": "what are changed tides"}, *data[1251:]]
    said = unfinished(scoring_args(tmp_path, changed, tiny_t5))
    assert "out.jsonl.scores.jsonl: has scores of other rows. Scoring resumes at line 1,025." in said
    assert blocks(log) == 3
    assert "at line 1,025" in unfinished(scoring_args(tmp_path, many[:1350], tiny_t5))  # more rows
    # Another model: refused, until --restart throws the scores away.
    other = save_t5(tmp_path / "other", (separable / "triples.tsv").read_text().splitlines()[:50])
    args = scoring_args(tmp_path, data, other)
    before = log.read_bytes()
    refused = error_line(run(SCRIPT, *args))
    differences = f'model "{tiny_t5}", now "{other}"; the state of the model\'s files differs'
    assert f"made with other settings ({differences})." in refused
    assert log.read_bytes() == before
    unfinished([*args, "--restart"])
    assert blocks(log) == 2
    ok(run(SCRIPT, *args))
    ok(run(SCRIPT, *scoring_args(tmp_path, data, other, "other.jsonl")))
    assert output.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    assert not log.exists()


def test_two_filters_on_one_output_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", ROWS)
    with exclusive(str(tmp_path / "out.jsonl")):
        second = run(SCRIPT, "--input", path, "--output", tmp_path / "out.jsonl")
        assert "out.jsonl: another process is writing" in error_line(second)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_causal_reranker_filters(tmp_path: Path, tiny_qwen3: Path) -> None:
    claim = ["--instruction", "Given a claim, retrieve documents that refute it"]
    args = scoring_args(tmp_path, ROWS, tiny_qwen3)
    scores = []
    for more in ([], claim):
        done = ok(run(SCRIPT, *args, *more))
        assert "scored with the prompt of qwen3-reranker" in done.stderr
        scores.append([row["score"] for row in rows(tmp_path / "out.jsonl")])
    assert scores[0] != scores[1]
    assert "--instruction needs --model" in error_line(run(SCRIPT, *args[:4], *claim), 2)
    special = [*args[:3], "/dev/null", *args[4:]]
    assert "scores are saved beside the output, so name a file" in error_line(run(SCRIPT, *special), 2)


# -------------------------------------------------------------------------------------------------- other first stages


def run_lines(path: Path, hits: dict[int | str, list[str]]) -> Path:
    lines = [f"{q} Q0 {doc_id} {i} {100 - i} dense\n" for q, ids in hits.items() for i, doc_id in enumerate(ids, 1)]
    path.write_text("".join(lines))
    return path


def test_a_run_replaces_bm25(tmp_path: Path) -> None:
    found = {3: ["x", "poor"], 0: ["long", "x"], 1: ["x", "y", "short"]}  # none of line 2, uneven
    dense = run_lines(tmp_path / "dense.txt", found)
    consistent = ["--run", dense, "--consistency_k", 2]
    assert kept(tmp_path, ROWS, *consistent) == ["long", "poor"]
    done = ok(run(SCRIPT, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *consistent))
    assert "dropped 1 row whose source document is not among the first 2 hits." in done.stderr
    assert f"dropped 1 row without hits in {dense}." in done.stderr
    assert "warning" not in done.stderr
    assert kept(tmp_path, ROWS, *consistent[:2], "--consistency_k", 3, "--scoring_function", "consistency") == [
        "long",
        "poor",
        "short",
    ]
    assert [row["score"] for row in rows(tmp_path / "out.jsonl")] == [1, 1 / 2, 1 / 3]
    done = ok(run(SCRIPT, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *consistent[:3], 20))
    assert "dense.txt: at most 3 hits per query, so --consistency_k 3 is used." in done.stderr


def test_a_new_index_needs_a_collection(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", ROWS)
    flags = ["--consistency_k", 2, "--index", tmp_path / "index"]
    refused = error_line(run(SCRIPT, "--input", path, "--output", tmp_path / "out.jsonl", *flags))
    assert "index: no such folder" in refused
    assert "add --corpus COLLECTION to build an index there." in refused
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("query_id", ["q1", "4", "01", "-1", "\u0663"])
def test_a_run_of_other_queries_is_refused(tmp_path: Path, query_id: str) -> None:
    dense = run_lines(tmp_path / "dense.txt", {0: ["long"], query_id: ["short"]})
    path = write_rows(tmp_path / "in.jsonl", ROWS)
    files = ["--input", path, "--output", tmp_path / "out.jsonl"]
    refused = error_line(run(SCRIPT, *files, "--run", dense, "--consistency_k", 2))
    assert f"dense.txt: the query id {query_id} is no line of {path}, whose lines count from 0 to 3." in refused


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--run r", "--consistency_k and either --index or --run need each other"),
        ("--consistency_k 2", "--consistency_k and either --index or --run need each other"),
        ("--consistency_k 2 --run r --index i", "--index and --run exclude each other"),
        ("--scoring_function consistency", "--scoring_function consistency needs --consistency_k"),
        ("--instruction Find.", "--instruction needs --model"),
    ],
)
def test_flags_that_need_or_exclude_each_other(tmp_path: Path, flags: str, problem: str) -> None:
    done = run(SCRIPT, "--input", "in", "--output", tmp_path / "out", *flags.split())
    assert problem in error_line(done, 2)
